// torch.ops.marquardt._stream_floor, _read_floor, _arithmetic_floor and _noise_floor: bandwidth of this machine over the
// tensors of a benchmark, its rate of double arithmetic, and that of drawing normals.
#include "floor/floor_kernels.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "core/parallel.h"
#include "core/tensor.h"
#include "frame/cpu_kernels.h"

namespace marquardt {
namespace {

const FloorKernels& kernels() {
#if defined(__x86_64__)
  if (std::strcmp(frame_cpu_isa(), "avx512") == 0) return avx512::floor_kernels;
  if (std::strcmp(frame_cpu_isa(), "avx2") == 0) return avx2::floor_kernels;
#endif
  return baseline::floor_kernels;
}

// A dense float32 tensor as numbers in the order of memory.
float* numbers(const char* op, const char* argument, const Tensor& t) {
  const View view = floating_view(op, argument, t);
  if (view.dtype != DType::f32 || !t.is_contiguous()) {
    type_error(op, argument, "be a contiguous float32 tensor", name_of(view.dtype));
  }
  return static_cast<float*>(view.data);
}

void stream_floor(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outs, bool streaming) {
  const char* op = "_stream_floor";
  if (inputs.empty() || inputs.size() > 8) value_error(op, "inputs", "hold 1 to 8 tensors", inputs.size());
  if (outs.empty() || outs.size() > 2) value_error(op, "outs", "hold 1 or 2 tensors", outs.size());
  const int64_t n = outs[0].numel();
  std::vector<const float*> in;
  std::vector<float*> to;
  for (const Tensor& t : inputs) {
    if (t.numel() != n) value_error(op, "inputs", join("have ", n, " elements"), t.numel());
    in.push_back(numbers(op, "inputs", t));
  }
  for (const Tensor& t : outs) {
    if (t.numel() != n) value_error(op, "outs", join("have ", n, " elements"), t.numel());
    to.push_back(numbers(op, "outs", t));
  }
  constexpr int64_t kPiece = 4096;
  parallel_for((n + kPiece - 1) / kPiece, n * 4 > 96 << 10, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPiece, last = end * kPiece < n ? end * kPiece : n;
    std::vector<const float*> from(in);
    std::vector<float*> into(to);
    for (const float*& p : from) p += first;
    for (float*& p : into) p += first;
    kernels().triad(from.data(), static_cast<int>(in.size()), into.data(), static_cast<int>(to.size()), last - first,
                    streaming);
  });
}

// Reads every input, in `pieces` equal parts one after the other, each part `repeats` times: with a part the size
// of a cache level this is that level's read bandwidth. Threads take neighbouring shares of each part.
Tensor read_floor(const std::vector<Tensor>& inputs, int64_t repeats, int64_t pieces) {
  const char* op = "_read_floor";
  if (inputs.empty()) value_error(op, "inputs", "hold a tensor", 0);
  if (repeats < 1 || pieces < 1) value_error(op, "repeats", "be positive, as pieces", repeats);
  const int64_t threads = thread_count();
  const View like = floating_view(op, "inputs", inputs[0]);
  const int64_t sizes[1] = {threads}, strides[1] = {1};
  Tensor sums = empty_strided(like, sizes, strides, 1, DType::f32);
  float* to = static_cast<float*>(sums.data());
  std::memset(to, 0, static_cast<size_t>(threads) * sizeof(float));
  std::vector<const float*> in;
  for (const Tensor& t : inputs) in.push_back(numbers(op, "inputs", t));
  parallel_for(threads, true, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t piece = 0; piece < pieces; ++piece)
        for (int64_t r = 0; r < repeats; ++r)
          for (size_t j = 0; j < in.size(); ++j) {
            const int64_t part = inputs[j].numel() / pieces, share = part / threads;
            to[thread] += kernels().read(in[j] + piece * part + thread * share, share);
          }
  });
  return sums;
}

// Runs `steps` rounds of double fused multiply-adds on every thread; returns how many of them all threads did.
int64_t arithmetic_floor(int64_t steps) {
  if (steps < 1) value_error("_arithmetic_floor", "steps", "be positive", steps);
  const int64_t threads = thread_count();
  std::vector<int64_t> done(static_cast<size_t>(threads));
  parallel_for(threads, true, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      double sink = 1.0;
      const int64_t count = kernels().multiply(steps, &sink);
      done[static_cast<size_t>(thread)] = sink == sink ? count : 0;  // so that nothing is left out
    }
  });
  int64_t total = 0;
  for (const int64_t count : done) total += count;
  return total;
}

// Draws `count` normals on all threads, chunk by chunk into the first cache, and keeps none; returns how many.
int64_t noise_floor(int64_t count, int64_t key) {
  if (count < 1) value_error("_noise_floor", "count", "be positive", count);
  const auto draw = frame_kernels().f32.noise;
  parallel_for((count + kChunk - 1) / kChunk, count > kChunk, [&](int64_t begin, int64_t end) {
    alignas(64) float chunk[kChunk];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = count - i * kChunk < kChunk ? count - i * kChunk : kChunk;
      draw(static_cast<uint64_t>(key), 0, static_cast<uint64_t>(i * kChunk), chunk, n);
      __asm__ volatile("" : : "r"(chunk) : "memory");
    }
  });
  return count;
}

}  // namespace
}  // namespace marquardt

STABLE_TORCH_LIBRARY_FRAGMENT(marquardt, m) {
  m.def("_stream_floor(Tensor[] inputs, Tensor(a!)[] outs, bool streaming) -> ()");
  m.def("_read_floor(Tensor[] inputs, int repeats, int pieces) -> Tensor");
  m.def("_arithmetic_floor(int steps) -> int");
  m.def("_noise_floor(int count, int key) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(marquardt, CPU, m) {
  m.impl("_stream_floor", TORCH_BOX(&marquardt::stream_floor));
  m.impl("_read_floor", TORCH_BOX(&marquardt::read_floor));
}

STABLE_TORCH_LIBRARY_IMPL(marquardt, CompositeExplicitAutograd, m) {
  m.impl("_arithmetic_floor", TORCH_BOX(&marquardt::arithmetic_floor));
  m.impl("_noise_floor", TORCH_BOX(&marquardt::noise_floor));
}
