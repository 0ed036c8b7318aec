#include "select/cuda.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/launch.h"
#include "select/cuda_select.cuh"

namespace marquardt {
namespace {

// --- the scale -------------------------------------------------------------------------------------------------------

struct SelectArguments {
  SelectCall call;
  double parameters[2];  // where they lie on the host
  int64_t first_sample, infinity;
};

MQ_DEVICE inline double number_of(Key key, DType dtype) {
  switch (dtype) {
    case DType::f32: return __uint_as_float(static_cast<unsigned>(key));
    case DType::bf16: return ptx::low_bf16(static_cast<uint32_t>(key));
    case DType::f16: return ptx::low_f16(static_cast<uint32_t>(key));
    case DType::f64: break;
  }
  return __longlong_as_double(static_cast<long long>(key));
}

// s of one sample, by all threads of its CTA.
template <class U>
MQ_DEVICE inline double scale_of(const SelectArguments& a, const U* x, double ratio, double maximum,
                                 SelectShared& shared) {
  const double nan = __longlong_as_double(0x7ff8000000000000);
  const int64_t n = a.call.size;
  if (!are_parameters(ratio, maximum)) return nan;
  if (n == 0) return 1.0;
  find_largest(x, n, shared);
  if (shared.largest > static_cast<Key>(a.infinity)) return nan;
  if (maximum == 1.0) return 1.0;  // between 1 and 1 there is nothing to find
  const Rank rank = rank_of(ratio, n);
  const Key first = find_key(x, n, rank.k, shared);
  const bool equal = rank.next == rank.k || shared.rank + 1 < shared.in_bin;
  const Key second = equal ? first : find_above(x, n, first, shared);
  return scale_between(number_of(first, a.call.dtype), number_of(second, a.call.dtype), rank.fraction, maximum);
}

// A sample's numbers are read five times at most (nine in float64), from L2 after the first. Samples that are not aligned
// are read number by number.
// promise: select_scale threads=512 shared=9K ctas>=2 wide=LDG.128 narrow=0

// A CTA a sample.
template <class U>
MQ_KERNEL(kSelectThreads, 2)
select_scale(const __grid_constant__ SelectArguments a) {
  auto& shared = *reinterpret_cast<SelectShared*>(shared_memory());
  if (threadIdx.x == 0) shared.largest = 0, shared.above = ~Key{0};
  __syncthreads();
  const int64_t b = a.first_sample + blockIdx.x;
  const double* p = a.call.host_parameters ? a.parameters : a.call.parameters + b * a.call.parameter_stride;
  const U* x = static_cast<const U*>(a.call.data) + b * a.call.batch_stride;
  const double s = scale_of<U>(a, x, p[0], p[1], shared);
  if (threadIdx.x == 0) a.call.scale[b] = s;
}

// --- the result ------------------------------------------------------------------------------------------------------

constexpr int kRescaleThreads = 256;
constexpr int kRescaleVectors = 4;      // of 16 bytes, that a thread takes
constexpr int64_t kMostCtas = 1 << 30;  // of a launch

struct RescaleArguments {
  RescaleCall call;
  double scale;               // where it lies on the host
  int64_t first_cta, splits;  // CTAs per sample
  bool aligned;
};

template <class C>
MQ_DEVICE inline C rescaled(C x, C s) {
  const C y = x / s;
  return y > C(1) ? C(1) : y < C(-1) ? C(-1) : y;  // NaN stays
}

template <DType D>
MQ_DEVICE inline uint32_t rescaled_word(uint32_t word, float s) {
  if constexpr (D == DType::f32) return __float_as_uint(rescaled(__uint_as_float(word), s));
  if constexpr (D == DType::bf16)
    return ptx::pack_bf16(rescaled(ptx::low_bf16(word), s), rescaled(ptx::high_bf16(word), s));
  return ptx::pack_f16(rescaled(ptx::low_f16(word), s), rescaled(ptx::high_f16(word), s));
}

template <DType D>
MQ_DEVICE inline uint4 rescaled_vector(uint4 v, double s) {
  if constexpr (D == DType::f64) {
    const auto each = [s](unsigned low, unsigned high) {
      const auto bits = static_cast<long long>(static_cast<unsigned long long>(high) << 32 | low);
      return static_cast<unsigned long long>(__double_as_longlong(rescaled(__longlong_as_double(bits), s)));
    };
    const unsigned long long a = each(v.x, v.y), b = each(v.z, v.w);
    return make_uint4(static_cast<unsigned>(a), static_cast<unsigned>(a >> 32), static_cast<unsigned>(b),
                      static_cast<unsigned>(b >> 32));
  } else {
    const auto f = static_cast<float>(s);
    return make_uint4(rescaled_word<D>(v.x, f), rescaled_word<D>(v.y, f), rescaled_word<D>(v.z, f),
                      rescaled_word<D>(v.w, f));
  }
}

// One number, of the bits U.
template <DType D, class U>
MQ_DEVICE inline U rescaled_number(U bits, double s) {
  if constexpr (D == DType::f64) {
    return static_cast<U>(__double_as_longlong(rescaled(__longlong_as_double(static_cast<long long>(bits)), s)));
  } else {
    return static_cast<U>(rescaled_word<D>(bits, static_cast<float>(s)));
  }
}

template <DType D>
using Bits =
    std::conditional_t<size_of(D) == 8, unsigned long long, std::conditional_t<size_of(D) == 4, uint32_t, uint16_t>>;

// promise: rescale threads=256 ctas>=4 wide=LDG.128,STG.128 narrow=0

// A CTA takes kRescaleVectors times as many vectors as it has threads; samples that are not aligned go number by number.
template <DType D>
MQ_KERNEL(kRescaleThreads, 4)
rescale(const __grid_constant__ RescaleArguments a) {
  using U = Bits<D>;
  constexpr int V = 16 / static_cast<int>(sizeof(U));
  const int64_t cta = a.first_cta + blockIdx.x, b = cta / a.splits, threads = blockDim.x;
  const int64_t first = cta % a.splits * threads * kRescaleVectors * V;
  const int64_t reach = first + threads * kRescaleVectors * V, end = reach < a.call.size ? reach : a.call.size;
  const double s = a.call.host_scale ? a.scale : a.call.scale[b * a.call.scale_stride];
  const U* x = static_cast<const U*>(a.call.data) + b * a.call.batch_stride;
  U* out = static_cast<U*>(a.call.out) + b * a.call.out_stride;
  const int64_t whole = a.aligned ? end - (end - first) % V : first;
  for (int64_t i = first + static_cast<int64_t>(threadIdx.x) * V; i < whole; i += threads * V)
    ptx::store_16(out + i, rescaled_vector<D>(ptx::load_16(x + i), s));
  for (int64_t i = whole + threadIdx.x; i < end; i += threads) out[i] = rescaled_number<D, U>(x[i], s);
}

int select_threads(const SelectCall& call) {
  return call.size < 4096 ? 128 : kSelectThreads;
}

int64_t rescale_splits(const RescaleCall& call) {
  const int64_t per_cta = kRescaleThreads * kRescaleVectors * (16 / size_of(call.dtype));
  return (call.size + per_cta - 1) / per_cta;
}

template <DType D>
void launch_rescale(const RescaleCall& call, void* stream) {
  RescaleArguments a{};
  a.call = call;
  a.splits = rescale_splits(call);
  a.aligned = (reinterpret_cast<uintptr_t>(call.data) | reinterpret_cast<uintptr_t>(call.out)) % 16 == 0 &&
              (call.batch == 1 || (call.batch_stride * size_of(D) % 16 == 0 && call.out_stride * size_of(D) % 16 == 0));
  if (call.host_scale) a.scale = *call.scale;
  const int64_t ctas = call.batch * a.splits;
  for (; a.first_cta < ctas; a.first_cta += kMostCtas) {
    Launch at;
    at.grid = static_cast<unsigned>(std::min(kMostCtas, ctas - a.first_cta));
    at.block = kRescaleThreads;
    launch("rescale", &rescale<D>, at, stream, a);
  }
}

}  // namespace

void select_cuda(const SelectCall& call, void* stream) {
  if (call.size > int64_t{0xffffffff}) {
    throw std::runtime_error("ValueError: dynamic_threshold: x0 must have less than 2**32 elements a sample on a GPU");
  }
  SelectArguments a{};
  a.call = call;
  a.infinity = infinity_key(call.dtype);
  if (call.host_parameters) std::copy_n(call.parameters, 2, a.parameters);
  for (; a.first_sample < call.batch; a.first_sample += kMostCtas) {
    Launch at;
    at.grid = static_cast<unsigned>(std::min(kMostCtas, call.batch - a.first_sample));
    at.block = select_threads(call);
    at.shared = sizeof(SelectShared);
    switch (size_of(call.dtype)) {
      case 2: launch("select_scale", &select_scale<uint16_t>, at, stream, a); break;
      case 4: launch("select_scale", &select_scale<uint32_t>, at, stream, a); break;
      default: launch("select_scale", &select_scale<unsigned long long>, at, stream, a); break;
    }
  }
}

void rescale_cuda(const RescaleCall& given, void* stream) {
  const RescaleCall call = flattened(given);
  if (call.batch == 0 || call.size == 0) return;
  switch (call.dtype) {
    case DType::f32: return launch_rescale<DType::f32>(call, stream);
    case DType::f64: return launch_rescale<DType::f64>(call, stream);
    case DType::bf16: return launch_rescale<DType::bf16>(call, stream);
    case DType::f16: return launch_rescale<DType::f16>(call, stream);
  }
}

std::string select_plan(const SelectCall& call) {
  if (call.batch == 0) return "nothing to do";
  return "select: 1 CTA x " + std::to_string(select_threads(call)) + " threads a sample";
}

std::string rescale_plan(const RescaleCall& given) {
  const RescaleCall call = flattened(given);
  if (call.batch == 0 || call.size == 0) return "nothing to do";
  return "rescale: " + std::to_string(rescale_splits(call)) + " CTAs x " + std::to_string(kRescaleThreads) +
         " threads a sample";
}

}  // namespace marquardt
