// The device of a call and torch's current stream there; the emulated machine has neither.
#pragma once

#include <stdexcept>

#include "core/tensor.h"

#if defined(MARQUARDT_WITH_CUDA)
// Lives in libtorch_cuda: weak, so that this library loads under a torch without CUDA too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace marquardt {

#if defined(MARQUARDT_WITH_CUDA)

// The device is current while this lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t index) {
    if (aoti_torch_create_device_guard(index, &guard_) != AOTI_TORCH_SUCCESS) {
      throw std::runtime_error(join("marquardt: cuda:", index, " cannot be made the current device"));
    }
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  ~CurrentDevice() { aoti_torch_delete_device_guard(guard_); }

  void* stream(int32_t index) const {
    void* found = nullptr;
    if (aoti_torch_get_current_cuda_stream == nullptr) {
      throw std::runtime_error("marquardt: this torch was built without CUDA");
    }
    if (aoti_torch_get_current_cuda_stream(index, &found) != AOTI_TORCH_SUCCESS) {
      throw std::runtime_error(join("marquardt: cuda:", index, " has no current stream"));
    }
    return found;
  }

 private:
  DeviceGuardHandle guard_ = nullptr;
};

#else

class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t) {}
  void* stream(int32_t) const { return nullptr; }
};

#endif

}  // namespace marquardt
