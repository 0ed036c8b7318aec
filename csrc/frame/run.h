// Where a checked call runs: on the CPU, or on the GPU that holds its data.
#pragma once

#include "core/tensor.h"
#include "frame/frame.h"

namespace marquardt {

// Whether a call whose state is `view` runs on a GPU. In the emulated library the CPU plays the device.
inline bool on_gpu([[maybe_unused]] const View& view) {
#if defined(MARQUARDT_EMULATION)
  return true;
#elif defined(MARQUARDT_WITH_CUDA)
  return view.on_cuda();
#else
  return false;
#endif
}

// Runs the call on the device of its state. On a GPU: in the current stream, without waiting for it.
void run_frame(const FrameCall& call, const View& state);

}  // namespace marquardt
