// `_machine`: the checks on numpy arrays, for tests alone.
//
//   run(name, arrays, numbers=[], grid=1, block=32, cluster=1, shared=0, mode="fibers", seed=0, first_block=0, blocks=-1)
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "emulation/checks.h"

namespace py = pybind11;

namespace marquardt::checks {
namespace {

void run(const std::string& name, const std::vector<py::array>& arrays, const std::vector<int64_t>& numbers,
         int64_t grid, int64_t block, int64_t cluster, int64_t shared, const std::string& mode, uint64_t seed,
         int64_t first_block, int64_t blocks) {
  if (arrays.size() > kMostArrays || numbers.size() > kMostNumbers) throw std::invalid_argument("too many arguments");
  Arguments a;
  for (size_t i = 0; i < arrays.size(); ++i) a.array[i] = const_cast<void*>(arrays[i].data());
  for (size_t i = 0; i < numbers.size(); ++i) a.number[i] = numbers[i];
  emulation::Machine machine;
  machine.mode = mode == "threads" ? emulation::Mode::threads : emulation::Mode::fibers;
  machine.seed = seed;
  machine.first_block = first_block;
  machine.blocks = blocks;
  emulation::set_machine(machine);
  const emulation::Grid at{static_cast<unsigned>(grid), static_cast<unsigned>(block), static_cast<unsigned>(cluster),
                           static_cast<size_t>(shared)};
  const py::gil_scoped_release others;
  if (!run_machine_check(name, at, a) && !run_misuse_check(name, at, a) && !run_ptx_check(name, at, a)) {
    throw std::invalid_argument("there is no check " + name);
  }
}

}  // namespace
}  // namespace marquardt::checks

PYBIND11_MODULE(_machine, m) {
  using namespace py::literals;
  m.def("run", &marquardt::checks::run, "name"_a, "arrays"_a, "numbers"_a = std::vector<int64_t>(), "grid"_a = 1,
        "block"_a = 32, "cluster"_a = 1, "shared"_a = 0, "mode"_a = "fibers", "seed"_a = 0, "first_block"_a = 0,
        "blocks"_a = -1);
}
