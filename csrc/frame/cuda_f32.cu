#include "frame/cuda_launch.cuh"

namespace marquardt {
template void frame_launch<FrameAccess::f32, false>(const FrameCall&, const FramePlan&, double*, void*);
}
