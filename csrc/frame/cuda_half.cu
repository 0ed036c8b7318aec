#include "frame/cuda_launch.cuh"

namespace marquardt {
template void frame_launch<FrameAccess::half, false>(const FrameCall&, const FramePlan&, double*, void*);
}
