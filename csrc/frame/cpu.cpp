// The frame engine on the CPU: which thread walks which chunk of which sample, and in what order sums are merged.
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "core/parallel.h"
#include "frame/cpu_kernels.h"
#include "frame/cpu_rows.h"
#include "frame/cpu_step_walk.h"
#include "frame/maps.h"

namespace marquardt {

const FrameKernels& frame_kernels() {
#if defined(__x86_64__)
  static const FrameKernels* const best = []() -> const FrameKernels* {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")) {
      return &avx512::frame_kernels;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return &avx2::frame_kernels;
    return &baseline::frame_kernels;
  }();
  return *best;
#else
  return baseline::frame_kernels;
#endif
}

const char* frame_cpu_isa() {
  return frame_kernels().isa;
}

namespace {

// Below this much work, in bytes of traffic, one thread does it all: waking a second costs more than it brings. Threads
// that share samples are woken twice, and read what another has in its cache.
constexpr int64_t kSerialWork = 384 << 10, kSharedWork = 1 << 20;
constexpr int64_t kProductBytes = 2;  // of traffic take as long as a double product of a Gram

// Samples this small take their products in double at once: it costs nothing there.
constexpr int64_t kExactSize = 256;

constexpr int64_t chunks_of(int64_t size) {
  return (size + kChunk - 1) / kChunk;
}

int gram_entries(const FrameCall& call) {
  return entries_of(call.gram, call.rows);
}

template <class T>
class FrameRunner {
 public:
  explicit FrameRunner(const FrameCall& call)
      : call_(call), kernels_(kernels_for()), reader_{call, kernels_}, step_(call, kernels_) {
    // The kernels subtract pairs in registers, for small frames only; a larger one takes a prologue.
    if (call.pairs > 0 && (call.rows > 4 || call.outputs > 2)) {
      throw std::logic_error("frame engine: residual pairs need at most 4 rows and 2 outputs");
    }
    vectors_ = call.streams + (call.ones ? 1 : 0) + (call.seed != nullptr ? 1 : 0);
    if (is_step()) {
      in_place_ = step_.in_place();
    } else if (call.prologue == nullptr) {
      in_place_ = true;
      for (int j = 0; j < vectors_; ++j) in_place_ = in_place_ && reader_.in_place(j);
      in_place_ = in_place_ && call.clamp == nullptr;
    }
    writes_in_place_ = true;
    for (int i = 0; i < call.outputs; ++i) writes_in_place_ = writes_in_place_ && call.output[i].dtype == compute();
    int64_t bytes = call.batch * sample_bytes();
    for (int i = 0; i < call.outputs; ++i) bytes += call.batch * call.size * size_of(call.output[i].dtype);
    const int64_t products = call.exact ? gram_entries(call) * call.batch * call.size : 0;
    const int64_t work = bytes + kProductBytes * products;
    threads_ = work < kSerialWork ? 1 : thread_count();
    shares_ = call.batch < 4 * threads_ && (call.batch < threads_ || call.batch % threads_ != 0);
    if (shares_ && work < kSharedWork && any_gram()) threads_ = 1;
    streaming_ = bytes > threads_ * core_cache_bytes();
    exact_ = call.exact || call.size <= kExactSize;
    keeps_noise_ =
        is_step() && call.seed != nullptr && call.size * static_cast<int64_t>(sizeof(T)) * 2 <= core_cache_bytes();
  }

  void run() {
    if (call_.batch == 0) return;
    if (call_.size == 0) return run_empty();
    if (!any_gram()) return run_without_gram();
    if (threads_ == 1 || !shares_) {
      parallel_for(call_.batch, threads_ > 1, [this](int64_t begin, int64_t end) {
        const Scratch<T> scratch(scratch_buffers());
        for (int64_t b = begin; b < end; ++b) run_sample(b, scratch);
        end_of_stores();
      });
      return;
    }
    run_split();
  }

 private:
  static constexpr DType compute() { return dtype_of<T>(); }

  static const TypedFrameKernels<T>& kernels_for() {
    if constexpr (std::is_same_v<T, double>) {
      return frame_kernels().f64;
    } else {
      return frame_kernels().f32;
    }
  }

  const double* parameters(int64_t b) const { return call_.parameters + b * call_.parameter_stride; }
  double* scalars(int64_t b) const {
    return call_.scalars == nullptr ? nullptr : call_.scalars + b * call_.scalar_stride;
  }
  bool is_step() const { return call_.op == FrameOp::lm_step; }
  // Scratch for the rows, and behind it for outputs.
  int row_buffers() const {
    if (is_step()) return step_.buffers();
    return in_place_ ? 0 : vectors_ + (call_.prologue != nullptr ? call_.rows : 0);
  }
  int scratch_buffers() const { return row_buffers() + (writes_in_place_ ? 0 : call_.outputs); }
  void end_of_stores() const { __atomic_thread_fence(__ATOMIC_SEQ_CST); }  // streamed stores are weakly ordered

  int64_t sample_bytes() const {
    int64_t bytes = 0;
    for (int j = 0; j < call_.streams; ++j) bytes += call_.size * size_of(call_.stream[j].dtype);
    return bytes;
  }

  bool any_gram() const {
    if (call_.gram != GramKind::none && call_.op != FrameOp::lm_direction && !is_step()) return true;
    const int64_t distinct = call_.parameter_stride == 0 ? 1 : call_.batch;
    for (int64_t b = 0; b < distinct; ++b)
      if (gram_rows(call_, parameters(b)) != 0u) return true;
    return false;
  }

  // D = 0: only the per-sample scalars exist; every inner product is 0.
  void run_empty() const {
    const std::vector<double> gram(kMaxGram, 0.0);
    FrameMap map;
    for (int64_t b = 0; b < call_.batch; ++b) frame_map(call_, gram.data(), parameters(b), map, scalars(b));
  }

  // The rows of `wanted` (others are null) over one chunk. With pairs they are still the two streams: the kernels
  // subtract in registers.
  void rows_of(int64_t b, int64_t begin, int64_t n, uint32_t wanted, const Scratch<T>& scratch, const T** rows) const {
    if (call_.prologue == nullptr) {
      for (int j = 0; j < call_.rows; ++j) {
        const bool base = call_.pairs > 0 && j % 2 == 0 && j < 2 * call_.pairs && (wanted >> (j + 1) & 1u);
        rows[j] = nullptr;
        if ((wanted >> j & 1u) || base) rows[j] = reader_.read(j, b, begin, n, scratch_for(scratch, j));
      }
      clamp_rows(n, wanted, scratch, rows);
      return;
    }
    const T* vectors[kMaxVectors];
    for (int j = 0; j < vectors_; ++j) vectors[j] = reader_.read(j, b, begin, n, scratch.buffer(j));
    const double* l = call_.prologue + b * call_.prologue_stride;
    T matrix[kMaxVectors * kMaxVectors];
    for (int i = 0; i < call_.rows * vectors_; ++i) matrix[i] = static_cast<T>(l[i]);
    T* out[kMaxVectors];
    for (int i = 0; i < call_.rows; ++i) rows[i] = out[i] = scratch.buffer(vectors_ + i);
    kernels_.apply(vectors, vectors_, 0, matrix, call_.rows, out, n, false);
    clamp_rows(n, wanted, scratch, rows);
  }

  T* scratch_for(const Scratch<T>& scratch, int j) const { return in_place_ ? nullptr : scratch.buffer(j); }

  void clamp_rows(int64_t n, uint32_t wanted, const Scratch<T>& scratch, const T** rows) const {
    if (call_.clamp == nullptr) return;
    for (int j = 0; j < call_.rows; ++j) {
      if (!(wanted >> j & 1u)) continue;
      T* own = scratch.buffer(call_.prologue == nullptr ? j : vectors_ + j);
      if (rows[j] != own) __builtin_memcpy(own, rows[j], static_cast<size_t>(n) * sizeof(T));
      kernels_.clamp(own, static_cast<T>(call_.clamp[2 * j]), static_cast<T>(call_.clamp[2 * j + 1]), n);
      rows[j] = own;
    }
  }

  // Adds the products of the rows in `wanted` over chunks [first, last) to acc.
  void gram_chunks(int64_t b, int64_t first, int64_t last, uint32_t wanted, bool exact, const Scratch<T>& scratch,
                   double (*acc)[kLanes]) const {
    const int64_t stop = last * kChunk < call_.size ? last * kChunk : call_.size;
    const int64_t step = in_place_ ? stop - first * kChunk : kChunk;
    for (int64_t begin = first * kChunk; begin < stop; begin += step) {
      const int64_t n = stop - begin < step ? stop - begin : step;
      if (is_step()) {
        step_.gram(StepPlan(call_, parameters(b)), b, begin, n, exact, parameters(b), scratch, acc);
        continue;
      }
      const T* rows[kMaxVectors];
      rows_of(b, begin, n, wanted, scratch, rows);
      // Subsets are prefixes: maps ask for row 0 alone or for all rows.
      const int count = wanted == 1u ? 1 : call_.rows;
      kernels_.gram(rows, count, count == 1 ? 0 : call_.pairs, call_.gram, exact, n, acc);
    }
  }

  static void merge(const double (*acc)[kLanes], int entries, double* gram) {
    for (int e = 0; e < entries; ++e) {
      double sum = 0.0;
      for (int lane = 0; lane < kLanes; ++lane) sum += acc[e][lane];
      gram[e] = sum;
    }
  }

  // The Gram of a whole sample by one thread, chunk after chunk.
  void gram_sample(int64_t b, uint32_t wanted, bool exact, const Scratch<T>& scratch, double* gram) const {
    double acc[kMaxGram][kLanes];
    const int entries = gram_entries(call_);
    __builtin_memset(acc, 0, sizeof(acc[0]) * static_cast<size_t>(entries));
    gram_chunks(b, 0, chunks_of(call_.size), wanted, exact, scratch, acc);
    merge(acc, entries, gram);
  }

  void map_sample(int64_t b, const double* gram, FrameMap& map) const {
    frame_map(call_, gram, parameters(b), map, scalars(b));
    if (sizeof(T) == sizeof(float) && is_direction(call_.op) && sums_cancel(call_, gram, map)) map.wide = true;
  }

  // Writes the outputs over [begin, begin + n) of a sample; any length if nothing passes through scratch.
  void apply_range(int64_t b, int64_t begin, int64_t n, const FrameMap& map, const Scratch<T>& scratch) const {
    if (call_.outputs == 0) return;
    if (is_step()) return apply_step(b, begin, n, map, scratch);
    const T* all[kMaxVectors];
    rows_of(b, begin, n, map.used, scratch, all);
    const bool whole = map.used == (1u << call_.rows) - 1u;
    const T* rows[kMaxVectors];
    int columns[kMaxVectors], count = 0, pairs = 0;
    // A subset is taken as it is if no residual row is in it; else rows not used have coefficient 0.
    bool residual = false;
    for (int j = 0; j < call_.pairs; ++j) residual = residual || (map.used >> (2 * j + 1) & 1u);
    if (whole || residual) pairs = call_.pairs;
    for (int j = 0; j < call_.rows; ++j)
      if (all[j] != nullptr && (pairs > 0 || (map.used >> j & 1u))) rows[count] = all[j], columns[count++] = j;

    T c[kMaxOutputs * kMaxVectors];
    double c_wide[kMaxOutputs * kMaxVectors];
    T* outs[kMaxOutputs];
    int written[kMaxOutputs], m = 0;
    for (int i = 0; i < call_.outputs; ++i) {
      if (map.zero >> i & 1u) {
        fill_zero(i, b, begin, n);
        continue;
      }
      for (int j = 0; j < count; ++j) {
        if (map.wide) {
          const int column = columns[j];
          double of_residual = 0.0;  // which is taken against this row
          if (column < 2 * pairs && column % 2 == 0) of_residual = map.c[i][column + 1];
          c_wide[m * count + j] = map.c[i][column] - of_residual;
        } else {
          c[m * count + j] = static_cast<T>(map.c[i][columns[j]]);
        }
      }
      outs[m] = out_pointer(i, b, begin, scratch);
      written[m++] = i;
    }
    if (map.wide) {
      kernels_.apply_wide(rows, count, c_wide, m, outs, n, streaming_ && writes_in_place_);
    } else {
      kernels_.apply(rows, count, pairs, c, m, outs, n, streaming_ && writes_in_place_);
    }
    for (int k = 0; k < m; ++k) store_output(written[k], b, begin, n, outs[k]);
  }

  void apply_step(int64_t b, int64_t begin, int64_t n, const FrameMap& map, const Scratch<T>& scratch) const {
    T* outs[kMaxOutputs];
    for (int i = 0; i < call_.outputs; ++i) outs[i] = out_pointer(i, b, begin, scratch);
    const StepPlan plan(call_, parameters(b));
    step_.apply(plan, map, b, begin, n, parameters(b), scratch, outs, streaming_ && writes_in_place_);
    for (int i = 0; i < call_.outputs; ++i) store_output(i, b, begin, n, outs[i]);
  }

  char* out_bytes(int i, int64_t b, int64_t begin) const {
    const Output& o = call_.output[i];
    return static_cast<char*>(o.data) + (b * o.batch_stride + begin) * size_of(o.dtype);
  }

  T* out_pointer(int i, int64_t b, int64_t begin, const Scratch<T>& scratch) const {
    if (call_.output[i].dtype == compute()) return reinterpret_cast<T*>(out_bytes(i, b, begin));
    return scratch.buffer(row_buffers() + i);
  }

  void store_output(int i, int64_t b, int64_t begin, int64_t n, const T* from) const {
    if (call_.output[i].dtype != compute()) kernels_.store(call_.output[i].dtype, from, out_bytes(i, b, begin), n);
  }

  void fill_zero(int i, int64_t b, int64_t begin, int64_t n) const {
    __builtin_memset(out_bytes(i, b, begin), 0, static_cast<size_t>(n * size_of(call_.output[i].dtype)));
  }

  // Chunks [first, last) of a sample, last chunk first: what the Gram read last is still in the cache.
  void apply_chunks(int64_t b, int64_t first, int64_t last, const FrameMap& map, const Scratch<T>& scratch) const {
    const int64_t step = in_place_ && writes_in_place_ ? 8 : 1;  // chunks per call
    for (int64_t end = last; end > first; end -= step) {
      const int64_t begin = end - step > first ? end - step : first;
      const int64_t stop = end * kChunk < call_.size ? end * kChunk : call_.size;
      apply_range(b, begin * kChunk, stop - begin * kChunk, map, scratch);
    }
  }

  void run_sample(int64_t b, const Scratch<T>& scratch) const {
    double gram[kMaxGram] = {};
    const uint32_t wanted = gram_rows(call_, parameters(b));
    if (wanted != 0u) {
      if (keeps_noise_) scratch.keep_noise(call_.size);
      gram_sample(b, wanted, exact_, scratch, gram);
      if (!exact_ && wants_exact_gram(call_, gram, wanted)) gram_sample(b, wanted, true, scratch, gram);
    }
    FrameMap map;
    map_sample(b, gram, map);
    if (map.wide && is_bent()) retake(b, wanted, scratch, gram, map);
    apply_chunks(b, 0, chunks_of(call_.size), map, scratch);
  }

  // Few samples: threads share them chunk by chunk. Sums of a chunk are the same whoever takes them, and are merged
  // in the order of the chunks, so the result does not depend on the number of threads.
  void run_split() const {
    const int64_t chunks = chunks_of(call_.size);
    int64_t group = threads_ * core_cache_bytes() / 2 / sample_bytes();
    group = group < 1 ? 1 : group > call_.batch ? call_.batch : group;
    const int entries = gram_entries(call_);
    const size_t per_chunk = static_cast<size_t>(entries) * kLanes;
    std::vector<double> partial(static_cast<size_t>(group * chunks) * per_chunk);
    std::vector<FrameMap> maps(static_cast<size_t>(group));
    for (int64_t b0 = 0; b0 < call_.batch; b0 += group) {
      const int64_t samples = call_.batch - b0 < group ? call_.batch - b0 : group;
      parallel_for(samples * chunks, true, [&](int64_t begin, int64_t end) {
        const Scratch<T> scratch(scratch_buffers());
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = b0 + i / chunks;
          const uint32_t wanted = gram_rows(call_, parameters(b));
          auto* acc = reinterpret_cast<double (*)[kLanes]>(partial.data() + static_cast<size_t>(i) * per_chunk);
          __builtin_memset(acc, 0, per_chunk * sizeof(double));
          if (wanted != 0u) gram_chunks(b, i % chunks, i % chunks + 1, wanted, exact_, scratch, acc);
        }
      });
      for (int64_t s = 0; s < samples; ++s) {
        map_split(b0 + s, partial.data() + static_cast<size_t>(s * chunks) * per_chunk, entries,
                  maps[static_cast<size_t>(s)]);
      }
      parallel_for(samples * chunks, true, [&](int64_t begin, int64_t end) {
        const Scratch<T> scratch(scratch_buffers());
        for_each_sample(begin, end, chunks, [&](int64_t s, int64_t first, int64_t last) {
          apply_chunks(b0 + s, first, last, maps[static_cast<size_t>(s)], scratch);
        });
        end_of_stores();
      });
    }
  }

  // Merges the chunks of sample b in their order.
  void map_split(int64_t b, const double* partial, int entries, FrameMap& map) const {
    double acc[kMaxGram][kLanes] = {};
    for (int64_t chunk = 0; chunk < chunks_of(call_.size); ++chunk)
      for (int e = 0; e < entries; ++e)
        for (int lane = 0; lane < kLanes; ++lane) acc[e][lane] += partial[(chunk * entries + e) * kLanes + lane];
    double gram[kMaxGram] = {};
    merge(acc, entries, gram);
    const uint32_t wanted = gram_rows(call_, parameters(b));
    if (wanted != 0u && !exact_ && wants_exact_gram(call_, gram, wanted)) {
      const Scratch<T> scratch(scratch_buffers());
      gram_sample(b, wanted, true, scratch, gram);
    }
    map_sample(b, gram, map);
    if (map.wide && is_bent()) retake(b, wanted, Scratch<T>(scratch_buffers()), gram, map);
  }

  // What has a direction of LM in it, and a Gram of float32 products.
  bool is_bent() const { return is_step() || (is_direction(call_.op) && !exact_); }

  // Where rounding would be seen: the Gram, the numbers and the outputs from sums in double.
  void retake(int64_t b, uint32_t wanted, const Scratch<T>& scratch, double* gram, FrameMap& map) const {
    gram_sample(b, wanted, true, scratch, gram);
    map_sample(b, gram, map);
    map.wide = true;
  }

  // Splits the flat range [begin, end) of (sample, chunk) into f(sample, first chunk, last chunk).
  template <class F>
  static void for_each_sample(int64_t begin, int64_t end, int64_t chunks, const F& f) {
    while (begin < end) {
      const int64_t sample = begin / chunks, stop = (sample + 1) * chunks < end ? (sample + 1) * chunks : end;
      f(sample, begin - sample * chunks, stop - sample * chunks);
      begin = stop;
    }
  }

  // No sums: one sweep, split anywhere.
  void run_without_gram() const {
    const int64_t chunks = chunks_of(call_.size);
    const double none[kMaxGram] = {};
    parallel_for(call_.batch * chunks, threads_ > 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(scratch_buffers());
      for_each_sample(begin, end, chunks, [&](int64_t b, int64_t first, int64_t last) {
        FrameMap map;
        frame_map(call_, none, parameters(b), map, first == 0 ? scalars(b) : nullptr);  // returned once per sample
        if (in_place_ && writes_in_place_) {
          const int64_t stop = last * kChunk < call_.size ? last * kChunk : call_.size;
          apply_range(b, first * kChunk, stop - first * kChunk, map, scratch);
        } else {
          apply_chunks(b, first, last, map, scratch);
        }
      });
      end_of_stores();
    });
  }

  const FrameCall& call_;
  const TypedFrameKernels<T>& kernels_;
  VectorReader<T> reader_;
  StepWalk<T> step_;
  int vectors_ = 0;
  bool in_place_ = false;         // rows are read where they lie
  bool writes_in_place_ = false;  // outputs are written where they lie
  bool streaming_ = false;
  bool exact_ = false;
  bool keeps_noise_ = false;  // that a Gram has drawn: drawing takes longer than all else
  int64_t threads_ = 1;
  bool shares_ = false;  // a sample among threads, because there are few
};

void run(const FrameCall& call) {
  if (call.compute == DType::f64) {
    FrameRunner<double>(call).run();
  } else {
    FrameRunner<float>(call).run();
  }
}

}  // namespace

void frame_cpu(const FrameCall& call) {
  if (flattens(call)) {
    run(flattened(call));
  } else {
    run(call);
  }
}

}  // namespace marquardt
