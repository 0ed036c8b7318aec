// Dynamic thresholding on the CPU: which thread takes which sample, or which part of one.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "core/half.h"
#include "core/parallel.h"
#include "frame/cpu_kernels.h"
#include "select/cpu_selection.h"
#include "select/select.h"

namespace marquardt {
namespace {

constexpr int64_t kSerialBytes = 128 << 10;  // below this one thread does it all

const SelectKernels& select_kernels() {
#if defined(__x86_64__)
  static const SelectKernels& best = []() -> const SelectKernels& {
    if (std::strcmp(frame_cpu_isa(), "avx512") == 0) return avx512::select_kernels;
    if (std::strcmp(frame_cpu_isa(), "avx2") == 0) return avx2::select_kernels;
    return baseline::select_kernels;
  }();
  return best;
#else
  return baseline::select_kernels;
#endif
}

template <class K>
const TypedSelectKernels<K>& typed_kernels() {
  if constexpr (sizeof(K) == 4) {
    return select_kernels().narrow;
  } else {
    return select_kernels().wide;
  }
}

double number_of(int64_t key, DType dtype) {
  double x;
  switch (dtype) {
    case DType::f32: return float_of_bits(static_cast<uint32_t>(key));
    case DType::bf16: return float_of_bf16(static_cast<uint16_t>(key));
    case DType::f16: return float_of_f16(static_cast<uint16_t>(key));
    case DType::f64: break;
  }
  std::memcpy(&x, &key, sizeof(x));
  return x;
}

// --- the scale -------------------------------------------------------------------------------------------------------

// Passes over one sample that threads share: counts add up to the same, whoever counts.
template <class K>
class SharedPasses {
 public:
  SharedPasses(const TypedSelectKernels<K>& kernels, int64_t threads) : alone_{kernels}, parts_(threads) {}

  void sift(const Numbers& x, Band<K> band, Keys<K>& kept, Sifted<K>& found) const {
    each_part(x, [&](const Numbers& mine, Part& part) {
      part.kept.size = 0;
      part.found = {};
      alone_.sift(mine, band, part.kept, part.found);
    });
    for (const Part& part : parts_) {
      found.over += part.found.over, found.kept += part.found.kept;
      found.largest = std::max(found.largest, part.found.largest);
      std::copy_n(part.kept.get(), part.kept.size, kept.room(part.kept.size));
      kept.size += part.kept.size;
    }
  }

  int64_t count_below(const Numbers& x, K key) const {
    each_part(x, [&](const Numbers& mine, Part& part) { part.below = alone_.count_below(mine, key); });
    int64_t below = 0;
    for (const Part& part : parts_) below += part.below;
    return below;
  }

  K largest(const Numbers& x) const {
    each_part(x, [&](const Numbers& mine, Part& part) { part.found.largest = alone_.largest(mine); });
    K largest = 0;
    for (const Part& part : parts_) largest = std::max(largest, part.found.largest);
    return largest;
  }

 private:
  struct Part {
    Keys<K> kept;
    Sifted<K> found;
    int64_t below = 0;
  };

  template <class F>
  void each_part(const Numbers& x, const F& f) const {
    const auto count = static_cast<int64_t>(parts_.size());
    parallel_for(count, true, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        f(x.part(x.n * i / count, x.n * (i + 1) / count), parts_[static_cast<size_t>(i)]);
    });
  }

  Passes<K> alone_;
  mutable std::vector<Part> parts_;
};

// s of sample b.
template <class K, class P>
double scale_of(const SelectCall& call, int64_t b, const P& passes, Selection<K>& selection) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  const double* p = call.parameters + b * call.parameter_stride;
  const double ratio = p[0], maximum = p[1];
  if (!are_parameters(ratio, maximum)) return nan;
  if (call.size == 0) return 1.0;
  const auto* first = static_cast<const char*>(call.data) + b * call.batch_stride * size_of(call.dtype);
  const Numbers x{first, call.dtype, call.size};
  const auto infinity = static_cast<K>(infinity_key(call.dtype));
  if (maximum == 1.0) return passes.largest(x) > infinity ? nan : 1.0;  // between 1 and 1 there is nothing to find
  const Rank rank = rank_of(ratio, call.size);
  const Found<K> found = selection.find(passes, x, rank.k, rank.next, infinity);
  if (found.nan) return nan;
  const double a = number_of(found.first, call.dtype), c = number_of(found.second, call.dtype);
  return scale_between(a, c, rank.fraction, maximum);
}

template <class K>
void select_keys(const SelectCall& call) {
  const TypedSelectKernels<K>& kernels = typed_kernels<K>();
  const int64_t bytes = call.batch * call.size * size_of(call.dtype);
  const int64_t threads = bytes < kSerialBytes ? 1 : thread_count();
  if (threads == 1 || call.batch >= 4 * threads || call.batch % threads == 0) {
    parallel_for(call.batch, threads > 1, [&](int64_t begin, int64_t end) {
      const Passes<K> passes{kernels};
      Selection<K> selection(kernels);
      for (int64_t b = begin; b < end; ++b) call.scale[b] = scale_of(call, b, passes, selection);
    });
    return;
  }
  const SharedPasses<K> passes(kernels, threads);
  Selection<K> selection(kernels);
  for (int64_t b = 0; b < call.batch; ++b) call.scale[b] = scale_of(call, b, passes, selection);
}

// --- the result ------------------------------------------------------------------------------------------------------

constexpr int64_t kBlock = 2048;  // numbers of a 16-bit type that pass through float32 at a time

// n numbers of one sample.
void rescale(DType dtype, const char* x, double s, char* out, int64_t n, bool streaming) {
  const SelectKernels& kernels = select_kernels();
  if (dtype == DType::f64) {
    auto* to = reinterpret_cast<double*>(out);
    return kernels.rescale_f64(reinterpret_cast<const double*>(x), s, to, n, streaming);
  }
  const auto scale = static_cast<float>(s);
  if (dtype == DType::f32) {
    auto* to = reinterpret_cast<float*>(out);
    return kernels.rescale_f32(reinterpret_cast<const float*>(x), scale, to, n, streaming);
  }
  const TypedFrameKernels<float>& convert = frame_kernels().f32;
  alignas(64) float wide[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = std::min(kBlock, n - begin);
    convert.load(dtype, x + 2 * begin, wide, count);
    kernels.rescale_f32(wide, scale, wide, count, false);
    convert.store(dtype, wide, out + 2 * begin, count);
  }
}

}  // namespace

void select_cpu(const SelectCall& call) {
  if (call.dtype == DType::f64) {
    select_keys<int64_t>(call);
  } else {
    select_keys<int32_t>(call);
  }
}

void rescale_cpu(const RescaleCall& given) {
  const RescaleCall call = flattened(given);
  const int64_t each = size_of(call.dtype), blocks = (call.size + kBlock - 1) / kBlock;
  const int64_t bytes = 2 * call.batch * call.size * each;
  const int64_t threads = bytes < 2 * kSerialBytes ? 1 : thread_count();
  const bool streaming = bytes > threads * core_cache_bytes();
  parallel_for(call.batch * blocks, threads > 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / blocks, stop = std::min((b + 1) * blocks, end);
      const int64_t first = (begin - b * blocks) * kBlock, last = std::min((stop - b * blocks) * kBlock, call.size);
      rescale(call.dtype, static_cast<const char*>(call.data) + (b * call.batch_stride + first) * each,
              call.scale[b * call.scale_stride], static_cast<char*>(call.out) + (b * call.out_stride + first) * each,
              last - first, streaming);
      begin = stop;
    }
  });
}

}  // namespace marquardt
