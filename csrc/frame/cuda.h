// The frame engine on a GPU: a plan (which variant runs, and how it is laid out on the chip) and its launches.
// Plain C++: the plan is made and tested without CUDA.
//
// Memory of a call: streams, outputs, seed and scalars are device pointers. Parameters lie on the host if
// `call.host_parameters`, prologue and clamp if their stride is 0: then their values travel with the launch.
#pragma once

#include <cstdint>
#include <string>

#include "core/device.h"
#include "frame/frame.h"

namespace marquardt {

enum class FrameVariant : uint8_t {
  held,        // a CTA or a cluster keeps its sample's frame in shared memory: device memory is read once
  two_sweeps,  // a launch for the Gram, another for the outputs, which finds the frame in L2 if it fits there
  one_sweep,   // no Gram
};

// How the vectors of a call lie in shared memory: a thread owns one slot of V elements of every vector.
enum class FrameAccess : uint8_t {
  f32,    // V = 4, all vectors float32: 16 bytes
  half,   // V = 8, all vectors bfloat16 or float16: 16 bytes
  mixed,  // V = 4, each vector float32 or a 16-bit type: 16 or 8 bytes
  f64,    // V = 2: 16 bytes
};

struct FramePlan {
  FrameVariant variant = FrameVariant::one_sweep;
  FrameAccess access = FrameAccess::f32;
  bool general = false;  // virtual rows of ones, a prologue, a clamp, or a matrix of the caller's: the slower kernels
  int threads = 128;     // of a CTA
  int cluster = 1;       // CTAs that share a sample's frame (held)
  int64_t splits = 1;    // CTAs per sample (two_sweeps, one_sweep); cluster if held
  int64_t tiles = 1;     // tiles (threads · V elements) that one CTA walks
  int stages = 1;        // tiles in shared memory at a time; all of them if held
  int64_t group = 1;     // samples per launch, or pair of launches
  int64_t shared = 0;    // bytes of shared memory per CTA
};

FramePlan frame_plan(const FrameCall& call, const DeviceLimits& limits);

// Fills in what follows from the variant, threads, cluster and splits of `plan` (tiles, stages, shared): for plans
// made by hand. Throws std::invalid_argument for a plan that cannot run.
FramePlan completed(const FrameCall& call, const DeviceLimits& limits, FramePlan plan);

// One line, for example "held: 2 CTAs x 256 threads a sample, 64.0 KiB shared, f32".
std::string text_of(const FramePlan& plan);

// Doubles of device memory that the launches want to themselves.
int64_t frame_workspace(const FrameCall& call, const FramePlan& plan);

// Launches the call, which is flattened, with one sort of kernels (cuda_*.cu).
template <FrameAccess A, bool General>
void frame_launch(const FrameCall& call, const FramePlan& plan, double* workspace, void* stream);

// Launches the call on `stream` of the current device; never waits for it.
void frame_cuda(const FrameCall& call, const FramePlan& plan, double* workspace, void* stream);

}  // namespace marquardt
