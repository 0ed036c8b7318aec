// Which sort of kernels runs a plan.
#include "frame/cuda.h"

namespace marquardt {

void frame_cuda(const FrameCall& given, const FramePlan& plan, double* workspace, void* stream) {
  const FrameCall call = flattened(given);
  if (call.batch == 0) return;
  const auto with = [&](auto launch) { launch(call, plan, workspace, stream); };
  if (plan.general) {
    return with(plan.access == FrameAccess::f64 ? frame_launch<FrameAccess::f64, true>
                                                : frame_launch<FrameAccess::mixed, true>);
  }
  switch (plan.access) {
    case FrameAccess::f32: return with(frame_launch<FrameAccess::f32, false>);
    case FrameAccess::half: return with(frame_launch<FrameAccess::half, false>);
    case FrameAccess::mixed: return with(frame_launch<FrameAccess::mixed, false>);
    case FrameAccess::f64: return with(frame_launch<FrameAccess::f64, false>);
  }
}

}  // namespace marquardt
