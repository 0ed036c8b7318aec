#include "frame/run.h"

#include <string>

#if defined(MARQUARDT_WITH_CUDA) || defined(MARQUARDT_EMULATION)
#include "core/current_device.h"
#include "core/device.h"
#include "frame/cuda.h"

namespace marquardt {
namespace {

// `explain` asks for plans: then nothing is launched, and the last plan of this thread is kept in words.
thread_local bool plans_only = false;
thread_local std::string last_plan;

void run_on_gpu(const FrameCall& call, const View& state) {
  if (plans_only) last_plan = "nothing to do";
  if (call.batch == 0) return;
  const CurrentDevice device(state.device_index);
  const FramePlan plan = frame_plan(call, device_limits(state.device_index));
  if (plans_only) {
    last_plan = text_of(plan);
    return;
  }
  const int64_t doubles = frame_workspace(call, plan), one = 1;
  Tensor workspace;
  if (doubles > 0) workspace = empty_strided(state, &doubles, &one, 1, DType::f64);
  double* memory = doubles > 0 ? static_cast<double*>(workspace.data()) : nullptr;
  frame_cuda(call, plan, memory, device.stream(state.device_index));
}

}  // namespace
}  // namespace marquardt

// For marquardt.explain, by ctypes: between begin and end this thread plans its calls and launches nothing.
extern "C" __attribute__((visibility("default"))) void marquardt_plan_begin() {
  marquardt::plans_only = true;
  marquardt::last_plan.clear();
}

extern "C" __attribute__((visibility("default"))) const char* marquardt_plan_end() {
  marquardt::plans_only = false;
  return marquardt::last_plan.c_str();
}
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
