#include "frame/run.h"

#if defined(MARQUARDT_WITH_CUDA) || defined(MARQUARDT_EMULATION)
#include "core/current_device.h"
#include "core/device.h"
#include "core/planning.h"
#include "frame/cuda.h"

namespace marquardt {
namespace {

void run_on_gpu(const FrameCall& call, const View& state) {
  if (call.batch == 0) {
    if (planning()) planned("nothing to do");
    return;
  }
  const CurrentDevice device(state.device_index);
  const FramePlan plan = frame_plan(call, device_limits(state.device_index));
  if (planning()) return planned(text_of(plan));
  const int64_t doubles = frame_workspace(call, plan), one = 1;
  Tensor workspace;
  if (doubles > 0) workspace = empty_strided(state, &doubles, &one, 1, DType::f64);
  double* memory = doubles > 0 ? static_cast<double*>(workspace.data()) : nullptr;
  frame_cuda(call, plan, memory, device.stream(state.device_index));
}

}  // namespace
}  // namespace marquardt
#endif

namespace marquardt {

void run_frame(const FrameCall& call, [[maybe_unused]] const View& state) {
#if defined(MARQUARDT_EMULATION)
  run_on_gpu(call, state);
#elif defined(MARQUARDT_WITH_CUDA)
  if (state.on_cuda()) {
    run_on_gpu(call, state);
  } else {
    frame_cpu(call);
  }
#else
  frame_cpu(call);
#endif
}

}  // namespace marquardt
