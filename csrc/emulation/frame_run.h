// A frame call as named whole numbers and named arrays, and its run on the emulated machine: what the test module takes
// from Python and the stand-alone cases take from a folder of .npy files.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "core/device.h"
#include "frame/cuda.h"
#include "frame/frame.h"

namespace marquardt::emulation {

struct FrameRun {
  FrameCall call = {};
  DeviceLimits limits;
  int64_t variant = -1, threads = -1, cluster = -1, splits = -1, group = -1;  // of the plan; −1: as frame_plan has it
  int64_t seed = 0;                                                           // of the order in which threads run
  int64_t shared = -1;    // bytes of a CTA's shared memory; −1: as the plan needs it
  int64_t in_place = -1;  // the stream in whose memory output 0 lies
  int64_t stream_offset[kMaxVectors] = {}, output_offset[kMaxOutputs] = {};  // elements before the first of an array
};

// f(name, field) for every number of a run. The order is that of the numbers in a case's header.npy.
template <class F>
void each_field(FrameRun& run, F&& f) {
  FrameCall& c = run.call;
  f("op", c.op), f("mode", c.mode), f("batch", c.batch), f("size", c.size), f("compute", c.compute);
  f("streams", c.streams), f("ones", c.ones), f("seed_stride", c.seed_stride);
  f("pairs", c.pairs), f("prologue_stride", c.prologue_stride), f("rows", c.rows);
  f("sources", c.sources), f("clipped", c.clipped), f("guided", c.guided), f("step_outputs", c.step_outputs);
  f("step_direction", c.step_direction), f("step_converted", c.step_converted);
  f("gram", c.gram), f("exact", c.exact);
  f("parameter_stride", c.parameter_stride), f("parameter_count", c.parameter_count);
  f("host_parameters", c.host_parameters);
  f("outputs", c.outputs), f("scalar_stride", c.scalar_stride);
  f("variant", run.variant), f("threads", run.threads), f("cluster", run.cluster);
  f("splits", run.splits), f("group", run.group), f("shared", run.shared), f("order", run.seed);
  f("in_place", run.in_place);
  DeviceLimits& l = run.limits;
  f("major", l.major), f("minor", l.minor), f("sms", l.sms), f("shared_per_block", l.shared_per_block);
  f("shared_per_sm", l.shared_per_sm), f("threads_per_sm", l.threads_per_sm);
  f("max_cluster", l.max_cluster), f("l2_bytes", l.l2_bytes);
  for (int j = 0; j < kMaxVectors; ++j) {
    const std::string name = "stream" + std::to_string(j);
    f(name + "_dtype", c.stream[j].dtype), f(name + "_stride", c.stream[j].batch_stride);
    f(name + "_offset", run.stream_offset[j]);
  }
  for (int i = 0; i < kMaxOutputs; ++i) {
    const std::string name = "output" + std::to_string(i);
    f(name + "_dtype", c.output[i].dtype), f(name + "_stride", c.output[i].batch_stride);
    f(name + "_offset", run.output_offset[i]);
  }
}

template <class T>
void assign(T& field, int64_t value, const std::string& name) {
  bool fits = true;
  if constexpr (std::is_same_v<T, bool>) {
    fits = value == 0 || value == 1;
  } else if constexpr (std::is_same_v<T, int>) {
    fits = value >= std::numeric_limits<int>::min() && value <= std::numeric_limits<int>::max();
  } else if constexpr (std::is_same_v<T, uint8_t>) {
    fits = value >= 0 && value <= std::numeric_limits<uint8_t>::max();
  } else if constexpr (std::is_enum_v<T>) {
    const int last = std::is_same_v<T, FrameOp> ? 11 : std::is_same_v<T, DType> || std::is_same_v<T, GramKind> ? 3 : 2;
    fits = value >= 0 && value <= last;
  }
  if (!fits) throw std::invalid_argument("frame run: " + name + " cannot be " + std::to_string(value));
  field = static_cast<T>(value);
}

inline std::vector<std::string> field_names() {
  std::vector<std::string> names;
  FrameRun run;
  each_field(run, [&](const std::string& name, auto&) { names.push_back(name); });
  return names;
}

// Elements behind one another in memory; `type` as in .npy: f4, f8, u2, i8.
struct Array {
  void* data = nullptr;
  int64_t count = 0;
  std::string type;
};

inline const char* type_of(DType dtype) {
  return dtype == DType::f32 ? "f4" : dtype == DType::f64 ? "f8" : "u2";
}

// Gives the call its arrays: find(name) is the array or null. Each must have the elements that the numbers promise.
inline void bind(FrameRun& run, const std::function<Array(const std::string&)>& find) {
  FrameCall& c = run.call;
  const auto get = [&](const std::string& name, const std::string& type, int64_t least, bool needed) -> void* {
    const Array a = find(name);
    if (a.data == nullptr && needed) throw std::invalid_argument("frame run: no array " + name);
    if (a.data == nullptr) return nullptr;
    if (a.type != type) throw std::invalid_argument("frame run: " + name + " must be " + type + ", got " + a.type);
    if (a.count < least) {
      throw std::invalid_argument("frame run: " + name + " must have " + std::to_string(least) + " elements, got " +
                                  std::to_string(a.count));
    }
    return a.data;
  };
  const auto vector = [&](const std::string& name, DType dtype, int64_t stride, int64_t offset) {
    if (stride < 0 || offset < 0) throw std::invalid_argument("frame run: " + name + " lies before its array");
    const int64_t least = c.batch * c.size == 0 ? 0 : offset + (c.batch - 1) * stride + c.size;
    return static_cast<char*>(get(name, type_of(dtype), least, true)) + offset * size_of(dtype);
  };
  if (c.streams < 0 || c.streams > kMaxVectors || c.outputs < 0 || c.outputs > kMaxOutputs || c.rows < 0 ||
      c.rows > kMaxVectors || c.batch < 0 || c.size < 0) {
    throw std::invalid_argument("frame run: more vectors, rows or outputs than a frame has");
  }
  const auto times = [&](int64_t stride, int64_t one) { return c.batch == 0 ? 0 : (c.batch - 1) * stride + one; };
  const auto number = [](int i) { return std::to_string(i); };
  for (int j = 0; j < c.streams; ++j) {
    c.stream[j].data = vector("stream" + number(j), c.stream[j].dtype, c.stream[j].batch_stride, run.stream_offset[j]);
  }
  if (run.in_place >= 0) {
    const int64_t j = run.in_place;
    if (j >= c.streams || c.outputs == 0 || c.stream[j].dtype != c.output[0].dtype ||
        c.stream[j].batch_stride != c.output[0].batch_stride || run.stream_offset[j] != run.output_offset[0]) {
      throw std::invalid_argument("frame run: output 0 cannot lie in stream " + std::to_string(j));
    }
  }
  for (int i = 0; i < c.outputs; ++i) {
    if (i == 0 && run.in_place >= 0) {
      c.output[0].data = const_cast<void*>(c.stream[run.in_place].data);
      continue;
    }
    c.output[i].data = vector("output" + number(i), c.output[i].dtype, c.output[i].batch_stride, run.output_offset[i]);
  }
  c.seed = static_cast<const int64_t*>(get("seed", "i8", times(c.seed_stride, 2), false));
  const int vectors = c.streams + (c.ones ? 1 : 0) + (c.seed != nullptr ? 1 : 0);
  if (vectors > kMaxVectors) throw std::invalid_argument("frame run: more vectors than a frame has");
  c.prologue = static_cast<const double*>(get("prologue", "f8", times(c.prologue_stride, c.rows * vectors), false));
  c.clamp = static_cast<const double*>(get("clamp", "f8", 2 * c.rows, false));
  const int64_t parameters = times(c.parameter_stride, c.parameter_count);
  c.parameters = static_cast<const double*>(get("parameters", "f8", parameters, true));
  c.scalars = static_cast<double*>(get("scalars", "f8", times(c.scalar_stride, c.scalar_stride), false));
}

inline FramePlan plan_of(const FrameRun& run) {
  FramePlan plan = frame_plan(run.call, run.limits);
  if (run.variant >= 0) {
    assign(plan.variant, run.variant, "variant");
    plan.cluster = 1;  // what was chosen for another variant
    plan.splits = 1;
  }
  if (run.threads >= 0) assign(plan.threads, run.threads, "threads");
  if (run.cluster >= 0) assign(plan.cluster, run.cluster, "cluster");
  if (run.splits >= 0) plan.splits = run.splits;
  const bool changed = run.variant >= 0 || run.threads >= 0 || run.cluster >= 0 || run.splits >= 0;
  if (changed) plan = completed(run.call, run.limits, plan);
  if (run.group >= 0) plan.group = run.group;
  if (run.shared >= 0) plan.shared = run.shared;
  return plan;
}

// Launches the call with a workspace of exactly the size that was asked for, full of NaN. Where no address sanitizer
// watches, marked numbers behind it tell whether more was written.
inline void launch(const FrameRun& run, const FramePlan& plan) {
  const int64_t doubles = frame_workspace(run.call, plan);
  if (doubles < 0) throw std::logic_error("frame run: a negative workspace");
#if defined(__SANITIZE_ADDRESS__)
  const int64_t guard = 0;
#else
  const int64_t guard = 64;
#endif
  const double mark = -7777.0;
  std::vector<double> workspace(static_cast<size_t>(doubles + guard), mark);
  for (int64_t i = 0; i < doubles; ++i) workspace[static_cast<size_t>(i)] = std::numeric_limits<double>::quiet_NaN();
  frame_cuda(run.call, plan, doubles == 0 ? nullptr : workspace.data(), nullptr);
  for (int64_t i = doubles; i < doubles + guard; ++i) {
    if (workspace[static_cast<size_t>(i)] != mark) {
      throw std::runtime_error("frame run: double " + std::to_string(i) + " of a workspace of " +
                               std::to_string(doubles) + " was written");
    }
  }
}

}  // namespace marquardt::emulation
