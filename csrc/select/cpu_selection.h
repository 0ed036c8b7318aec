// Two neighbouring order statistics of many keys in little more than one pass, on the CPU.
//
// A sample of the keys tells between which two of them, the band, the wanted ones very probably lie. One pass counts the
// keys over the lower one and keeps the few inside, in which the search goes on; keys that are equal to a bound are counted
// in a pass of their own, where a wanted one may be among them. Where the band missed, a wider one is tried, then all keys
// are kept: the result is always exact, and does not depend on the sample, on threads or on where numbers lie.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "select/cpu_kernels.h"

namespace marquardt {

// Numbers behind one another: those of a sample, or keys kept of it.
struct Numbers {
  const void* data;
  DType dtype;
  int64_t n;

  Numbers part(int64_t begin, int64_t end) const {
    return {static_cast<const char*>(data) + begin * size_of(dtype), dtype, end - begin};
  }
};

// The key of one number.
template <class K>
K key_at(const Numbers& x, int64_t i) {
  if (size_of(x.dtype) == 2) return static_cast<const uint16_t*>(x.data)[i] & 0x7fff;
  K bits;
  std::memcpy(&bits, static_cast<const K*>(x.data) + i, sizeof(bits));
  return bits & std::numeric_limits<K>::max();
}

// Keys, in memory that grows and is not initialised.
template <class K>
class Keys {
 public:
  // Where `more` keys can be written behind the first `size`.
  K* room(int64_t more) {
    if (size + more > capacity_) {
      const int64_t capacity = std::max(size + more, 2 * capacity_);
      auto grown = std::make_unique_for_overwrite<K[]>(static_cast<size_t>(capacity));
      std::copy_n(data_.get(), size, grown.get());
      data_ = std::move(grown);
      capacity_ = capacity;
    }
    return data_.get() + size;
  }
  K* get() const { return data_.get(); }

  int64_t size = 0;

 private:
  std::unique_ptr<K[]> data_;
  int64_t capacity_ = 0;
};

template <class K>
struct Band {
  K low, high;
};

template <class K>
struct Found {
  K first, second;
  bool nan = false;
};

constexpr int64_t kFewKeys = 512;  // are sorted out at once
constexpr int64_t kLeastSampled = 128, kMostSampled = 4096, kPerSampled = 64;
constexpr int64_t kSiftBlock = 8192;  // numbers between two looks at the room for keys

// Passes over numbers by one thread.
template <class K>
struct Passes {
  const TypedSelectKernels<K>& kernels;

  // The keys inside are appended to `kept`.
  void sift(const Numbers& x, Band<K> band, Keys<K>& kept, Sifted<K>& found) const {
    for (int64_t begin = 0; begin < x.n; begin += kSiftBlock) {
      const Numbers block = x.part(begin, std::min(begin + kSiftBlock, x.n));
      const int64_t before = found.kept;
      kernels.sift(x.dtype, block.data, block.n, band.low, band.high, kept.room(block.n + kKeyPad), found);
      kept.size += found.kept - before;
    }
  }
  int64_t count_below(const Numbers& x, K key) const { return kernels.count_below(x.dtype, x.data, x.n, key); }
  K largest(const Numbers& x) const { return kernels.largest(x.dtype, x.data, x.n); }
};

// The search, for one sample after another; its memory stays.
template <class K>
class Selection {
 public:
  explicit Selection(const TypedSelectKernels<K>& kernels) : alone_{kernels} {}

  // Numbers k and `next` (k or k + 1) of x in ascending order; `nan` where a key is above `infinity`. P passes over x.
  template <class P>
  Found<K> find(const P& passes, const Numbers& x, int64_t k, int64_t next, K infinity, int level = 0) {
    for (int attempt = 0;; ++attempt) {
      const bool all = attempt == kAttempts || x.n <= kFewKeys;
      const Band<K> band = all ? everything() : band_around(x, k, next, attempt == 0 ? 4.0 : 16.0);
      Keys<K>& kept = kept_[level];
      kept.size = 0;
      Sifted<K> found;
      passes.sift(x, band, kept, found);
      if (found.largest > infinity) return {0, 0, true};
      const int64_t first = x.n - found.over, end = first + found.kept;  // the ranks of the keys inside
      const bool low = k < first, high = next >= end;
      if (low && k < passes.count_below(x, band.low)) continue;
      if (high && (band.high == kNoBound || next >= passes.count_below(x, band.high + 1))) continue;
      // Each of the two is the lower bound, inside, or the upper bound.
      Found<K> result{low ? band.low : band.high, high ? band.high : band.low};
      const bool k_inside = !low && k < end, next_inside = !high && next >= first;
      if (k_inside || next_inside) {
        const int64_t i = (k_inside ? k : next) - first, j = (next_inside ? next : k) - first;
        const Found<K> inside = among(level, i, j, all || kept.size > x.n / 2);
        if (k_inside) result.first = inside.first;
        if (next_inside) result.second = inside.second;
      }
      return result;
    }
  }

 private:
  static constexpr int kAttempts = 2, kLevels = 4;
  static constexpr K kNoBound = std::numeric_limits<K>::max();

  static Band<K> everything() { return {-1, kNoBound}; }

  // Between which keys numbers k and `next` lie, `deviations` of the sample's ranks to either side.
  Band<K> band_around(const Numbers& x, int64_t k, int64_t next, double deviations) {
    const int64_t count = std::clamp(x.n / kPerSampled, kLeastSampled, kMostSampled), length = x.n / count;
    sampled_.size = 0;
    K* sampled = sampled_.room(count);
    for (int64_t i = 0; i < count; ++i) sampled[i] = key_at<K>(x, i * length + drawn(i, length));
    const double n = static_cast<double>(x.n), m = static_cast<double>(count);
    const double p = (static_cast<double>(k) + 0.5) / n, q = (static_cast<double>(next) + 0.5) / n;
    const double margin = deviations * std::sqrt(m * p * (1.0 - p)) + 2.0;
    const auto low = static_cast<int64_t>(std::floor(m * p - margin));
    const auto high = static_cast<int64_t>(std::ceil(m * q + margin));
    Band<K> band = everything();
    if (low >= 0) {
      std::nth_element(sampled, sampled + low, sampled + count);
      band.low = sampled[low];
    }
    if (high < count) {
      std::nth_element(sampled + std::max<int64_t>(low, 0), sampled + high, sampled + count);
      band.high = sampled[high];
    }
    return band;
  }

  // A number below `length`, another for each i: patterns of x (channels, rows of pixels) do not meet their like.
  static int64_t drawn(int64_t i, int64_t length) {
    uint64_t h = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u;
    h = (h ^ h >> 32) * 0xd6e8feb86659fd93u;
    return static_cast<int64_t>((h >> 40) * static_cast<uint64_t>(length) >> 24);
  }

  // Numbers i ≤ j ≤ i + 1 of the keys kept at this level: by another sift, of them, or `at_once`.
  Found<K> among(int level, int64_t i, int64_t j, bool at_once) {
    const Keys<K>& kept = kept_[level];
    if (at_once || kept.size <= kFewKeys || level + 1 == kLevels) return nth(kept.get(), kept.size, i, j);
    const Numbers keys{kept.get(), sizeof(K) == 4 ? DType::f32 : DType::f64, kept.size};
    return find(alone_, keys, i, j, kNoBound, level + 1);
  }

  static Found<K> nth(K* keys, int64_t n, int64_t i, int64_t j) {
    std::nth_element(keys, keys + i, keys + n);
    return {keys[i], j == i ? keys[i] : *std::min_element(keys + j, keys + n)};
  }

  Passes<K> alone_;
  Keys<K> kept_[kLevels], sampled_;
};

}  // namespace marquardt
