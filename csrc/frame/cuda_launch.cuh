// One sort of kernels, launched: included by a file for each, so that they compile side by side.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "core/launch.h"
#include "frame/cuda_kernels.cuh"

namespace marquardt {

template <bool G>
FrameArguments<G> arguments_of(const FrameCall& call, const FramePlan& plan, double* workspace) {
  FrameArguments<G> a{};
  a.call = call;
  a.layout = layout_of(call, plan.access, plan.threads);
  a.splits = plan.splits;
  a.tiles = plan.tiles;
  a.plain = !G && is_plain(call, plan.access, plan.threads, plan.tiles);
  a.workspace = workspace;
  if (call.host_parameters) {
    const int room = G ? kManyParameters : kSmallParameters;
    if (call.parameter_stride != 0 || call.parameter_count > room) {
      throw std::logic_error("frame engine: too many parameters on the host for a launch");
    }
    std::copy_n(call.parameters, call.parameter_count, a.parameters);
  }
  if constexpr (G) {
    if (call.prologue != nullptr && call.prologue_stride == 0)
      std::copy_n(call.prologue, call.rows * a.layout.vectors, a.prologue);
    if (call.clamp != nullptr) std::copy_n(call.clamp, 2 * call.rows, a.clamp);
  }
  return a;
}

// The samples in groups: as many as a grid holds, or L2 keeps.
template <FrameAccess A, bool G>
void frame_launch(const FrameCall& call, const FramePlan& plan, double* workspace, void* stream) {
  FrameArguments<G> a = arguments_of<G>(call, plan, workspace);
  for (int64_t first = 0; first < call.batch; first += plan.group) {
    const int64_t samples = std::min(plan.group, call.batch - first);
    a.first_sample = first;
    a.backwards = false;
    Launch at;
    at.grid = static_cast<unsigned>(samples * plan.splits);
    at.block = static_cast<unsigned>(plan.threads);
    at.cluster = static_cast<unsigned>(plan.cluster);
    at.shared = static_cast<size_t>(plan.shared);
    switch (plan.variant) {
      case FrameVariant::held: launch("frame_held", &frame_held<A, G>, at, stream, a); break;
      case FrameVariant::two_sweeps:
        launch("frame_gram", &frame_gram<A, G>, at, stream, a);
        a.backwards = true;  // what the first launch read last is in L2
        [[fallthrough]];
      case FrameVariant::one_sweep: launch("frame_apply", &frame_apply<A, G>, at, stream, a); break;
    }
  }
}

}  // namespace marquardt
