#include "select/run.h"

#if defined(MARQUARDT_WITH_CUDA) || defined(MARQUARDT_EMULATION)
#include "core/current_device.h"
#include "core/planning.h"
#include "frame/run.h"
#include "select/cuda.h"

namespace marquardt {
namespace {

template <class Call>
void on_device(const View& state, const Call& call, void (*f)(const Call& call, void* stream),
               std::string (*plan)(const Call& call)) {
  if (planning()) return planned(plan(call));
  const CurrentDevice device(state.device_index);
  f(call, device.stream(state.device_index));
}

}  // namespace
}  // namespace marquardt
#endif

namespace marquardt {

void run_select(const SelectCall& call, [[maybe_unused]] const View& state) {
#if defined(MARQUARDT_WITH_CUDA) || defined(MARQUARDT_EMULATION)
  if (on_gpu(state)) return on_device(state, call, &select_cuda, &select_plan);
#endif
#if !defined(MARQUARDT_EMULATION)
  select_cpu(call);
#endif
}

void run_rescale(const RescaleCall& call, [[maybe_unused]] const View& state) {
#if defined(MARQUARDT_WITH_CUDA) || defined(MARQUARDT_EMULATION)
  if (on_gpu(state)) return on_device(state, call, &rescale_cuda, &rescale_plan);
#endif
#if !defined(MARQUARDT_EMULATION)
  rescale_cpu(call);
#endif
}

}  // namespace marquardt
