// Runs frame calls that lie in folders, one thread of the system per CUDA thread, so that a sanitizer sees what the
// kernels do:
//
//   frame_tsan [--fibers] [--write NAME] [--short N] FOLDER...     cases, or folders of cases
//   frame_tsan --fields                                the numbers of header.npy, in their order
//
// A case is a folder with header.npy (frame_run.h), stream0.npy …, parameters.npy and, where the call has them,
// seed.npy, prologue.npy, clamp.npy; output0.npy …, scalars.npy with what lies there before the call; expected0.npy …,
// expected_scalars.npy with allowed0.npy …, allowed_scalars.npy, float64: |found − expected| ≤ allowed, NaN for NaN.
// --write NAME leaves what was found as NAME_output0.npy … in the folder.
// Every array lies in memory of exactly its size; with --short N in N bytes less, a fault that a sanitizer must see.
// The exit status is 1 if a case failed.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>

#include "emulation/frame_run.h"
#include "emulation/machine.h"
#include "emulation/npy.h"

namespace marquardt::emulation {
namespace {

namespace fs = std::filesystem;

// Memory of exactly the size of an array, or `less`, aligned as device memory is.
struct Memory {
  Memory(Npy from, size_t less) : array(std::move(from)) {
    void* place = nullptr;
    const size_t bytes = array.bytes.size() - std::min(array.bytes.size(), less);
    if (posix_memalign(&place, 256, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
    data.reset(static_cast<unsigned char*>(place));
    std::copy_n(array.bytes.data(), bytes, data.get());
  }
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  Npy array;  // what it held at first
  std::unique_ptr<unsigned char, Free> data;
};

double number_of(const unsigned char* at, DType dtype) {
  uint16_t bits = 0;
  switch (dtype) {
    case DType::f32: {
      float x;
      std::memcpy(&x, at, 4);
      return x;
    }
    case DType::f64: {
      double x;
      std::memcpy(&x, at, 8);
      return x;
    }
    case DType::bf16: {
      std::memcpy(&bits, at, 2);
      const uint32_t wide = uint32_t{bits} << 16;
      float x;
      std::memcpy(&x, &wide, 4);
      return x;
    }
    case DType::f16: {
      std::memcpy(&bits, at, 2);
      const int exponent = bits >> 10 & 31, fraction = bits & 1023;
      const double size = exponent == 31  ? (fraction == 0 ? HUGE_VAL : std::nan(""))
                          : exponent == 0 ? std::ldexp(fraction, -24)
                                          : std::ldexp(1024 + fraction, exponent - 25);
      return bits >> 15 != 0 ? -size : size;
    }
  }
  return 0.0;
}

class Case {
 public:
  Case(fs::path folder, size_t less) : folder_(std::move(folder)) {
    const Npy header = read("header");
    const std::vector<std::string> names = field_names();
    if (header.type != "i8" || header.count() != static_cast<int64_t>(names.size())) {
      throw std::runtime_error("header.npy must hold " + std::to_string(names.size()) + " int64 numbers");
    }
    int64_t at = 0;
    each_field(run_, [&](const std::string& name, auto& field) {
      int64_t value = 0;
      std::memcpy(&value, header.bytes.data() + 8 * at++, 8);
      assign(field, value, name);
    });
    bind(run_, [&](const std::string& name) -> Array {
      if (!fs::exists(file(name))) return {};
      const Memory& m = memory_.try_emplace(name, read(name), less).first->second;
      return {m.data.get(), m.array.count(), m.array.type};
    });
  }

  std::string run(Mode mode) {
    const FramePlan plan = plan_of(run_);
    set_machine(mode, static_cast<uint64_t>(run_.seed));
    launch(run_, plan);
    return text_of(plan);
  }

  // Throws with the first difference.
  void judge() const {
    const FrameCall& c = run_.call;
    for (const auto& [name, m] : memory_) {
      const bool written = name.starts_with("output") || name == "scalars" || name == memory_of_output(0);
      if (!written && !std::equal(m.array.bytes.begin(), m.array.bytes.end(), m.data.get())) {
        throw std::runtime_error(name + " is an input and was written");
      }
    }
    for (int i = 0; i < c.outputs; ++i) {
      const std::string number = std::to_string(i);
      const Output& o = c.output[i];
      judge_gaps(memory_of_output(i), size_of(o.dtype), o.batch_stride, run_.output_offset[i]);
      judge_values(memory_of_output(i), number, o.dtype, o.batch_stride, run_.output_offset[i], c.size);
    }
    if (c.scalars != nullptr) judge_values("scalars", "_scalars", DType::f64, c.scalar_stride, 0, c.scalar_stride);
  }

  void write(const std::string& prefix) const {
    for (const auto& [name, m] : memory_) {
      const bool in_place = run_.in_place >= 0 && name == memory_of_output(0);
      if (!in_place && !name.starts_with("output") && name != "scalars") continue;
      Npy found = m.array;
      std::copy_n(m.data.get(), found.bytes.size(), found.bytes.data());
      write_npy(file(prefix + "_" + (in_place ? "output0" : name)), found);
    }
  }

 private:
  std::string memory_of_output(int i) const {
    const bool in_place = i == 0 && run_.in_place >= 0;
    return in_place ? "stream" + std::to_string(run_.in_place) : "output" + std::to_string(i);
  }
  std::string file(const std::string& name) const { return (folder_ / (name + ".npy")).string(); }
  Npy read(const std::string& name) const { return read_npy(file(name)); }

  // What lies beside the samples of an output is as it was.
  void judge_gaps(const std::string& name, int64_t item, int64_t stride, int64_t offset) const {
    const Memory& m = memory_.at(name);
    for (int64_t e = 0; e < m.array.count(); ++e) {
      const int64_t from = e - offset, sample = stride == 0 ? 0 : from / stride;
      if (from >= 0 && sample < run_.call.batch && from - sample * stride < run_.call.size) continue;
      if (std::memcmp(m.data.get() + e * item, m.array.bytes.data() + e * item, static_cast<size_t>(item)) != 0) {
        throw std::runtime_error(name + ": element " + std::to_string(e) + " lies beside the samples and was written");
      }
    }
  }

  void judge_values(const std::string& name, const std::string& suffix, DType dtype, int64_t stride, int64_t offset,
                    int64_t size) const {
    const Npy expected = read("expected" + suffix), allowed = read("allowed" + suffix);
    const int64_t count = run_.call.batch * size;
    if (expected.type != "f8" || allowed.type != "f8" || expected.count() != count || allowed.count() != count) {
      throw std::runtime_error(name + ": needs " + std::to_string(count) + " expected and allowed float64 numbers");
    }
    const unsigned char* data = memory_.at(name).data.get();
    for (int64_t b = 0, at = 0; b < run_.call.batch; ++b) {
      for (int64_t i = 0; i < size; ++i, ++at) {
        const double found = number_of(data + (offset + b * stride + i) * size_of(dtype), dtype);
        const double right = number_of(expected.bytes.data() + 8 * at, DType::f64);
        const double margin = number_of(allowed.bytes.data() + 8 * at, DType::f64);
        const bool good = std::isnan(right) ? std::isnan(found) : found == right || std::abs(found - right) <= margin;
        if (good) continue;
        char text[160];
        std::snprintf(text, sizeof(text), "[%lld, %lld] is %.17g, not %.17g within %.3g", static_cast<long long>(b),
                      static_cast<long long>(i), found, right, margin);
        throw std::runtime_error(name + text);
      }
    }
  }

  fs::path folder_;
  FrameRun run_;
  std::map<std::string, Memory> memory_;
};

// The cases in a folder, by name; the folder itself if it is one.
std::vector<fs::path> cases_in(const fs::path& folder) {
  if (fs::exists(folder / "header.npy")) return {folder};
  std::vector<fs::path> found;
  if (!fs::is_directory(folder)) throw std::runtime_error(folder.string() + ": no such folder");
  for (const auto& entry : fs::directory_iterator(folder))
    if (fs::exists(entry.path() / "header.npy")) found.push_back(entry.path());
  std::sort(found.begin(), found.end());
  if (found.empty()) throw std::runtime_error(folder.string() + ": no case in there");
  return found;
}

bool run_case(const fs::path& folder, Mode mode, const std::string& prefix, size_t less) {
  const auto begin = std::chrono::steady_clock::now();
  std::string outcome, text;
  try {
    Case one(folder, less);
    text = one.run(mode);
    if (!prefix.empty()) one.write(prefix);
    one.judge();
  } catch (const std::exception& error) {
    outcome = error.what();
  }
  const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - begin;
  std::printf("%s %s (%s, %.0f ms)%s%s\n", outcome.empty() ? "ok  " : "FAIL", folder.filename().c_str(), text.c_str(),
              time.count(), outcome.empty() ? "" : ": ", outcome.c_str());
  std::fflush(stdout);
  return outcome.empty();
}

int run_all(int count, char** words) {
  Mode mode = Mode::threads;
  std::string prefix;
  std::vector<fs::path> folders;
  size_t less = 0;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--fields") {
      for (const std::string& name : field_names()) std::puts(name.c_str());
      return 0;
    }
    if (word == "--fibers") {
      mode = Mode::fibers;
    } else if (word == "--write" && i + 1 < count) {
      prefix = words[++i];
    } else if (word == "--short" && i + 1 < count) {
      less = std::stoul(words[++i]);
    } else {
      folders.emplace_back(word);
    }
  }
  int failed = 0, ran = 0;
  for (const fs::path& folder : folders)
    for (const fs::path& one : cases_in(folder)) ++ran, failed += run_case(one, mode, prefix, less) ? 0 : 1;
  std::printf("%d cases, %d failed\n", ran, failed);
  return ran == 0 || failed > 0 ? 1 : 0;
}

}  // namespace
}  // namespace marquardt::emulation

int main(int count, char** words) {
  try {
    return marquardt::emulation::run_all(count, words);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
