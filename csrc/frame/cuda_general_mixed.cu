#include "frame/cuda_launch.cuh"

namespace marquardt {
template void frame_launch<FrameAccess::mixed, true>(const FrameCall&, const FramePlan&, double*, void*);
}
