#include "select/run.h"

#if defined(MARQUARDT_WITH_CUDA) || defined(MARQUARDT_EMULATION)
#include "frame/run.h"
#include "select/cuda.h"

#if defined(MARQUARDT_WITH_CUDA)
// Lives in libtorch_cuda: weak, so that this library loads under a torch without CUDA too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace marquardt {
namespace {

// Calls f(stream) with the device of `state` current.
template <class F>
void on_device(const View& state, const F& f) {
#if defined(MARQUARDT_WITH_CUDA)
  const int32_t index = state.device_index;
  DeviceGuardHandle guard = nullptr;
  if (aoti_torch_create_device_guard(index, &guard) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(join("marquardt: cuda:", index, " cannot be made the current device"));
  }
  const struct Guard {
    DeviceGuardHandle handle;
    ~Guard() { aoti_torch_delete_device_guard(handle); }
  } release{guard};
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("marquardt: this torch was built without CUDA");
  }
  if (aoti_torch_get_current_cuda_stream(index, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(join("marquardt: cuda:", index, " has no current stream"));
  }
  f(stream);
#else
  (void)state;
  f(static_cast<void*>(nullptr));
#endif
}

}  // namespace
}  // namespace marquardt
#endif

namespace marquardt {

void run_select(const SelectCall& call, [[maybe_unused]] const View& state) {
#if defined(MARQUARDT_WITH_CUDA) || defined(MARQUARDT_EMULATION)
  if (on_gpu(state)) return on_device(state, [&](void* stream) { select_cuda(call, stream); });
#endif
#if !defined(MARQUARDT_EMULATION)
  select_cpu(call);
#endif
}

void run_rescale(const RescaleCall& call, [[maybe_unused]] const View& state) {
#if defined(MARQUARDT_WITH_CUDA) || defined(MARQUARDT_EMULATION)
  if (on_gpu(state)) return on_device(state, [&](void* stream) { rescale_cuda(call, stream); });
#endif
#if !defined(MARQUARDT_EMULATION)
  rescale_cpu(call);
#endif
}

}  // namespace marquardt
