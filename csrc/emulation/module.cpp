// `_emulation`: the CUDA kernels of the frame engine on numpy arrays, on the emulated machine. For tests alone.
//
//   run_frame(numbers, arrays) -> plan       runs a call: numbers and arrays by the names of frame_run.h
//   frame_plan(numbers, arrays, present) -> plan    without running; streams and outputs need no memory for that,
//                                            nor do the arrays named in `present` (seed, prologue, clamp, scalars)
//   frame_map(numbers, gram, parameters) -> (C, used, zero, scalars)
//   noise_words(key, counter, high) -> [n, 4] words of the noise
//   fields() -> names                        the numbers of a call; those not given are 0, or as the plan has them
//
// A plan is a dict with all numbers of the FramePlan, its text and the workspace it wants. Arrays are one-dimensional:
// float32, float64, int64 (seed), uint16 (bits of bfloat16 and float16).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <set>

#include "core/philox.h"
#include "emulation/frame_run.h"
#include "emulation/machine.h"
#include "frame/maps.h"

namespace py = pybind11;

namespace marquardt::emulation {
namespace {

FrameRun run_of(const py::dict& numbers) {
  FrameRun run;
  std::set<std::string> left;
  for (const auto& item : numbers) left.insert(item.first.cast<std::string>());
  each_field(run, [&](const std::string& name, auto& field) {
    if (left.erase(name) > 0) assign(field, numbers[name.c_str()].cast<int64_t>(), name);
  });
  if (!left.empty()) throw std::invalid_argument("frame run: no number is called " + *left.begin());
  return run;
}

Array array_of(const py::dict& arrays, const std::string& name) {
  if (!arrays.contains(name)) return {};
  const auto a = py::array::ensure(arrays[name.c_str()]);
  if (!a || a.ptr() != py::object(arrays[name.c_str()]).ptr() || a.ndim() != 1 ||
      (a.size() > 1 && a.strides(0) != a.itemsize())) {
    throw std::invalid_argument("frame run: " + name + " must be a dense numpy array of one dimension");
  }
  const bool written = name.starts_with("output") || name == "scalars";
  if (written && !a.writeable()) throw std::invalid_argument("frame run: " + name + " must be writeable");
  std::string type(1, a.dtype().kind());
  type += std::to_string(a.itemsize());
  return {const_cast<void*>(a.data()), a.size(), type};
}

// An address that nobody reads, for plans: aligned, and as many elements as anybody may ask for.
Array pretended(const FrameRun& run, const std::string& name) {
  const auto number = [&](size_t skip) { return static_cast<size_t>(std::stoi(name.substr(skip))); };
  std::string type = "f8";
  if (name.starts_with("stream")) type = type_of(run.call.stream[number(6)].dtype);
  if (name.starts_with("output")) type = type_of(run.call.output[number(6)].dtype);
  if (name == "seed") type = "i8";
  return {reinterpret_cast<void*>(uintptr_t{1} << 40), std::numeric_limits<int64_t>::max(), type};
}

py::dict described(const FrameRun& run, const FramePlan& plan) {
  const char* variants[] = {"held", "two_sweeps", "one_sweep"};
  const char* accesses[] = {"f32", "half", "mixed", "f64"};
  py::dict d;
  d["variant"] = variants[static_cast<int>(plan.variant)];
  d["access"] = accesses[static_cast<int>(plan.access)];
  d["general"] = plan.general;
  d["threads"] = plan.threads;
  d["cluster"] = plan.cluster;
  d["splits"] = plan.splits;
  d["tiles"] = plan.tiles;
  d["stages"] = plan.stages;
  d["group"] = plan.group;
  d["shared"] = plan.shared;
  d["text"] = text_of(plan);
  d["workspace"] = frame_workspace(run.call, plan);
  return d;
}

py::dict run_frame(const py::dict& numbers, const py::dict& arrays) {
  FrameRun run = run_of(numbers);
  bind(run, [&](const std::string& name) { return array_of(arrays, name); });
  const FramePlan plan = plan_of(run);
  py::dict text = described(run, plan);
  set_machine(Mode::fibers, static_cast<uint64_t>(run.seed));
  {
    const py::gil_scoped_release others;
    launch(run, plan);
  }
  return text;
}

py::dict plan_frame(const py::dict& numbers, const py::dict& arrays, const std::vector<std::string>& present) {
  FrameRun run = run_of(numbers);
  bind(run, [&](const std::string& name) {
    const Array given = array_of(arrays, name);
    if (given.data != nullptr) return given;
    const bool needed = name.starts_with("stream") || name.starts_with("output");
    const bool pretend = needed || std::find(present.begin(), present.end(), name) != present.end();
    return pretend ? pretended(run, name) : Array{};
  });
  return described(run, plan_of(run));
}

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

py::tuple map_frame(const py::dict& numbers, const Doubles& gram, const Doubles& parameters) {
  FrameRun run = run_of(numbers);
  const FrameCall& call = run.call;
  if (gram.size() < kMaxGram) throw std::invalid_argument("frame map: gram must have room for every entry");
  double scratch = 0.0;
  const std::vector<py::ssize_t> shape = {call.outputs, call.rows};
  py::array_t<double> c(shape), scalars(call.scalar_stride);
  run.call.scalars = call.scalar_stride > 0 ? scalars.mutable_data() : nullptr;
  FrameMap map = {};
  frame_map(call, gram.data(), parameters.size() > 0 ? parameters.data() : &scratch, map, run.call.scalars);
  for (int i = 0; i < call.outputs; ++i)
    for (int j = 0; j < call.rows; ++j) c.mutable_at(i, j) = map.c[i][j];
  return py::make_tuple(c, map.used, map.zero, scalars);
}

py::array_t<uint32_t> noise_words(uint64_t key, const py::array_t<uint64_t>& counter, uint64_t high) {
  const std::vector<py::ssize_t> shape = {counter.size(), 4};
  py::array_t<uint32_t> words(shape);
  for (py::ssize_t i = 0; i < counter.size(); ++i) {
    const PhiloxWords w = philox(key, counter.at(i), high);
    for (int j = 0; j < 4; ++j) words.mutable_at(i, j) = w.w[j];
  }
  return words;
}

}  // namespace
}  // namespace marquardt::emulation

PYBIND11_MODULE(_emulation, m) {
  using namespace marquardt::emulation;
  m.def("fields", &field_names);
  m.def("run_frame", &run_frame, py::arg("numbers"), py::arg("arrays"));
  m.def("frame_plan", &plan_frame, py::arg("numbers"), py::arg("arrays"),
        py::arg("present") = std::vector<std::string>());
  m.def("noise_words", &noise_words, py::arg("key"), py::arg("counter"), py::arg("high"));
  m.def("frame_map", &map_frame, py::arg("numbers"), py::arg("gram"), py::arg("parameters"));
}
