#include "frame/cuda_launch.cuh"

namespace marquardt {
template void frame_launch<FrameAccess::f64, false>(const FrameCall&, const FramePlan&, double*, void*);
}
