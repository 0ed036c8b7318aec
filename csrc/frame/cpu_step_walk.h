// A sampler step on the CPU, stretch by stretch: which vectors count, and where its rows are made: in the registers of
// the kernels, or in scratch where there are more terms than they take.
#pragma once

#include <limits>

#include "frame/cpu_rows.h"
#include "frame/step.h"

namespace marquardt {

// The vectors of one sample that count, those of the direction first, with their numbers in rows 0 and 2.
struct StepPlan {
  static constexpr int kY = -1;  // the clipped row, made in scratch
  StepShape shape;
  bool reads, direction, y;
  bool pair = false, astray = false;  // the residual of guidance stands in front with its base, or elsewhere
  int count = 0, in_direction = 0;
  int vector[kMaxVectors];
  double a[kMaxVectors], d[kMaxVectors];

  StepPlan(const FrameCall& call, const double* p)
      : shape(step_shape(call)), reads(step_reads_prev(call, shape, p)), direction(step_needs_direction(call, reads)) {
    y = shape.clipped && call.step_converted;
    // Kernels want the terms of the direction in front; sums alone go in the order of the sources.
    if (!reads) {
      add_all(p, true, true);
    } else {
      add_all(p, true, false);
      add_all(p, false, true);
    }
  }

 private:
  // Those in the direction, those that are not, or both.
  void add_all(const double* p, bool inside, bool outside) {
    const auto add = [&](int j, double on_a, double on_d, bool in_e) {
      if (!(in_e ? inside : outside)) return;
      vector[count] = j;
      a[count] = on_a;
      d[count++] = on_d;
      if (inside) in_direction = count;
      y = y || j == kY;
    };
    const auto on_d = [&](int at) { return direction ? p[at] : 0.0; };
    const auto add_one = [&](int j, double base, double own) {
      if (base != 0.0 || own != 0.0) add(j, base, own, own != 0.0);
    };
    int first = 0;
    if (shape.guided) {  // s_2, and s_1 − s_2 if it counts
      const double base[2] = {step_base(shape, p, 1, reads), step_base(shape, p, 2, reads)};
      const double own[2] = {on_d(shape.d(1)), on_d(shape.d(2))};
      if (base[0] == 0.0 && own[0] == 0.0) {
        add_one(2, base[1], own[1]);
      } else {
        const int before = count;
        const bool in_e = own[0] != 0.0 || own[1] != 0.0;
        add(2, base[1], own[1], in_e);
        add(1, base[0], own[0], in_e);
        if (count > before) (before == 0 ? pair : astray) = true;
      }
      add_one(0, step_base(shape, p, 0, reads), on_d(shape.d(0)));
      first = 3;
    }
    for (int j = first; j < shape.sources; ++j) add_one(j, step_base(shape, p, j, reads), on_d(shape.d(j)));
    if (shape.noisy) add_one(shape.noise(), step_base(shape, p, shape.sources, reads), on_d(shape.d_noise()));
    if (shape.clipped) add_one(kY, step_base_y(shape, p, reads), on_d(shape.d_y()));
  }
};

template <class T>
class StepWalk {
 public:
  StepWalk(const FrameCall& call, const TypedFrameKernels<T>& kernels) : reader_{call, kernels} {
    in_place_ = !call.clipped && call.seed == nullptr;
    for (int j = 0; j < call.streams; ++j) in_place_ = in_place_ && reader_.in_place(j);
  }

  // Whether everything is read where it lies: then stretches may be longer than a chunk.
  bool in_place() const { return in_place_; }
  // Scratch buffers: vectors, y, rows e, r, a, and a residual that stands astray.
  int buffers() const { return reader_.call.streams + 6; }

  // Adds ⟨e,e⟩, ⟨e,r⟩, ⟨r,r⟩ over [begin, begin + n) of sample b; n ≤ kChunk unless all is in place.
  void gram(const StepPlan& plan, int64_t b, int64_t begin, int64_t n, bool exact, const double* p,
            const Scratch<T>& scratch, double (*acc)[kLanes]) const {
    const bool residual = reader_.call.mode != kSnr;
    if (exact && residual) return gram_in_double(plan, b, begin, n, p, scratch, acc);
    if (residual && !plan.astray && plan.in_direction >= 1 && plan.in_direction <= kDirectionTerms) {
      return reader_.kernels.step_gram(terms(plan, b, begin, n, plan.in_direction, p, scratch), n, acc);
    }
    for (int64_t at = begin; at < begin + n; at += kChunk) {
      const int64_t part = begin + n - at < kChunk ? begin + n - at : kChunk;
      const Terms t = terms(plan, b, at, part, plan.in_direction, p, scratch);
      const T* rows[2];
      rows[0] = direction_row(t, part, scratch);
      rows[1] = second_row(t, rows[0], part, scratch);
      reader_.kernels.gram(rows, 2, 0, GramKind::full, exact, part, acc);
    }
  }

  // Writes the outputs over [begin, begin + n) of sample b to outs[i], in the order of the call.
  void apply(const StepPlan& plan, const FrameMap& map, int64_t b, int64_t begin, int64_t n, const double* p,
             const Scratch<T>& scratch, T* const* outs, bool streaming) const {
    const FrameCall& call = reader_.call;
    T* const copy = call.step_outputs == 2 ? outs[1] : nullptr;
    int next = call.step_outputs;
    T* const direction = call.step_direction ? outs[next++] : nullptr;
    const int64_t step = in_place_ && !plan.astray ? n : kChunk;
    for (int64_t at = 0; at < n; at += step) {
      const int64_t part = n - at < step ? n - at : step;
      const Terms t = terms(plan, b, begin + at, part, plan.count, p, scratch);
      const auto behind = [at](T* to) { return to == nullptr ? nullptr : to + at; };
      if (call.step_converted)
        __builtin_memcpy(outs[next] + at, y_buffer(scratch), static_cast<size_t>(part) * sizeof(T));
      if (!plan.reads) {
        sum(t, t.a, t.count, outs[0] + at, part, streaming);
        if (copy != nullptr) sum(t, t.a, t.count, copy + at, part, streaming);
        if (direction != nullptr) sum(t, t.d, t.in_direction, direction + at, part, streaming);
        continue;
      }
      // Not in double, which has no wider sums: there the residual r = p − e keeps what p and e by themselves would lose.
      if (map.wide && sizeof(T) == sizeof(float)) {
        apply_in_double(plan, t, map, part, outs[0] + at, behind(copy), behind(direction));
        continue;
      }
      const T c0 = static_cast<T>(map.c[0][0]), c1 = static_cast<T>(map.c[0][1]);
      if (call.mode != kSnr && t.in_direction >= 1 &&
          reader_.kernels.step_apply(t, c0, c1, outs[0] + at, behind(copy), behind(direction), part, streaming))
        continue;
      in_scratch(t, map, call.outputs - (call.step_converted ? 1 : 0), outs, at, part, scratch);
    }
  }

 private:
  // The terms, and those of y: where nothing bounds it y is one more sum.
  struct Terms : StepTerms<T> {
    StepTerms<T> y;
    double y_number[kMaxVectors];
    bool y_is_sum = false;
  };

  static constexpr int kPairRows = 4;  // that kernels of pairs take at most

  T* y_buffer(const Scratch<T>& scratch) const { return scratch.buffer(reader_.call.streams + 1); }
  T* row_buffer(int i, const Scratch<T>& scratch) const { return scratch.buffer(reader_.call.streams + 2 + i); }

  // The first `count` terms of the plan, and p, over [begin, begin + n) of sample b.
  Terms terms(const StepPlan& plan, int64_t b, int64_t begin, int64_t n, int count, const double* p,
              const Scratch<T>& scratch) const {
    Terms t;
    const T* vectors[kMaxVectors] = {};
    const auto vector = [&](int j) {
      if (vectors[j] == nullptr && j >= reader_.call.streams)
        vectors[j] = scratch.kept_noise(begin, [&](T* to) { reader_.read(j, b, begin, n, to); });
      if (vectors[j] == nullptr) vectors[j] = reader_.read(j, b, begin, n, in_place_ ? nullptr : scratch.buffer(j));
      return vectors[j];
    };
    t.count = count;
    t.in_direction = plan.in_direction;
    t.pair = plan.pair;
    bool made = false;
    for (int i = 0; i < count; ++i) {
      t.a[i] = static_cast<T>(plan.a[i]);
      t.d[i] = static_cast<T>(plan.d[i]);
      if (plan.vector[i] == 1 && plan.astray) {
        t.row[i] = difference(vector(1), vector(2), row_buffer(3, scratch), n);
      } else if (plan.vector[i] != StepPlan::kY) {
        t.row[i] = vector(plan.vector[i]);
      } else {
        made = true;
        t.row[i] = make_y(plan, n, p, vector, scratch, t);
      }
    }
    if (plan.y && !made && count == plan.count) make_y(plan, n, p, vector, scratch, t);  // an output of its own
    t.prev = plan.reads ? vector(plan.shape.prev()) : nullptr;
    return t;
  }

  template <class Vector>
  const T* make_y(const StepPlan& plan, int64_t n, const double* p, const Vector& vector, const Scratch<T>& scratch,
                  Terms& all) const {
    StepTerms<T>& t = all.y;
    t.count = 0;
    t.pair = plan.shape.guided && p[plan.shape.y(1)] != 0.0;
    const auto add = [&](int j) {
      all.y_number[t.count] = p[plan.shape.y(j)];
      t.row[t.count] = vector(j);
      t.a[t.count++] = static_cast<T>(p[plan.shape.y(j)]);
    };
    if (t.pair) add(2), add(1);
    for (int j = 0; j < plan.shape.sources; ++j)
      if (p[plan.shape.y(j)] != 0.0 && !(t.pair && (j == 1 || j == 2))) add(j);
    T* y = y_buffer(scratch);
    sum(t, t.a, t.count, y, n, false);
    const T bound = static_cast<T>(p[plan.shape.bound()]);
    all.y_is_sum = bound > std::numeric_limits<T>::max();
    reader_.kernels.clamp(y, -bound, bound, n);
    return y;
  }

  const T* difference(const T* of, const T* base, T* to, int64_t n) const {
    const T* rows[2] = {of, base};
    const T numbers[2] = {T(1), T(-1)};
    reader_.kernels.apply(rows, 2, 0, numbers, 1, &to, n, false);
    return to;
  }

  // out = Σ c_j·s_j over the first `last` terms whose number is not 0.
  void sum(const StepTerms<T>& t, const T* c, int last, T* out, int64_t n, bool streaming) const {
    const T* rows[kMaxVectors];
    T numbers[kMaxVectors];
    const bool pair = t.pair && last > 1 && c[1] != T(0);
    int count = 0;
    for (int j = 0; j < last; ++j) {
      if (c[j] == T(0) && !(pair && j == 0)) continue;
      rows[count] = t.row[j];
      numbers[count++] = c[j];
    }
    const auto apply = [&](int rows_taken, bool past_caches) {
      reader_.kernels.apply(rows, rows_taken, pair ? 1 : 0, numbers, 1, &out, n, past_caches);
    };
    if (count == 0) {
      __builtin_memset(out, 0, static_cast<size_t>(n) * sizeof(T));
    } else if (!pair || count <= kPairRows) {
      apply(count, streaming);
    } else {  // what the kernels of pairs take, and the others on top
      apply(kPairRows, false);
      rows[kPairRows - 1] = out;
      numbers[kPairRows - 1] = T(1);
      reader_.kernels.apply(rows + kPairRows - 1, count - kPairRows + 1, 0, numbers + kPairRows - 1, 1, &out, n, false);
    }
  }

  // What a step is made of for sums in double: rows with their numbers in a and in e. A residual s_1 − s_0 in front, of
  // the step or of y, is dissolved in its two rows, a y that nothing bounds in its terms.
  struct DoubleTerms {
    const T* row[kMaxVectors];
    double a[kMaxVectors], d[kMaxVectors];
    int count = 0;

    void add(const T* of, double on_a, double on_d) {
      if (on_a == 0.0 && on_d == 0.0) return;
      row[count] = of;
      a[count] = on_a;
      d[count++] = on_d;
    }
  };

  static DoubleTerms in_double(const StepPlan& plan, const Terms& t) {
    const auto number = [](const double* c, bool pair, int j) { return j == 0 && pair ? c[0] - c[1] : c[j]; };
    DoubleTerms all;
    for (int j = 0; j < t.count; ++j) {
      const double on_a = number(plan.a, t.pair, j), on_d = number(plan.d, t.pair, j);
      if (plan.vector[j] == StepPlan::kY && t.y_is_sum) {
        for (int i = 0; i < t.y.count; ++i) {
          const double on_y = number(t.y_number, t.y.pair, i);
          all.add(t.y.row[i], on_a * on_y, on_d * on_y);
        }
      } else {
        all.add(t.row[j], on_a, on_d);
      }
    }
    return all;
  }

  void gram_in_double(const StepPlan& plan, int64_t b, int64_t begin, int64_t n, const double* p,
                      const Scratch<T>& scratch, double (*acc)[kLanes]) const {
    alignas(64) double e[kChunk], r[kChunk];
    for (int64_t at = begin; at < begin + n; at += kChunk) {
      const int64_t part = begin + n - at < kChunk ? begin + n - at : kChunk;
      const Terms t = terms(plan, b, at, part, plan.in_direction, p, scratch);
      DoubleTerms all = in_double(plan, t);
      reader_.kernels.sum_in_double(all.row, all.count, all.d, e, part);
      for (int j = 0; j < all.count; ++j) all.d[j] = -all.d[j];
      all.add(t.prev, 0.0, 1.0);
      reader_.kernels.sum_in_double(all.row, all.count, all.d, r, part);
      const double* rows[2] = {e, r};
      frame_kernels().f64.gram(rows, 2, 0, GramKind::full, true, part, acc);
    }
  }

  // x' = Σ (a_j + (c0 − c1) d_j) s_j + c1 p: nothing is rounded before its end, e and r least of all.
  void apply_in_double(const StepPlan& plan, const Terms& t, const FrameMap& map, int64_t n, T* out, T* copy,
                       T* direction) const {
    DoubleTerms all = in_double(plan, t);
    const auto write = [&](const double* numbers, T* to) {
      if (all.count == 0) {
        __builtin_memset(to, 0, static_cast<size_t>(n) * sizeof(T));
      } else {
        reader_.kernels.apply_wide(all.row, all.count, numbers, 1, &to, n, false);
      }
    };
    if (direction != nullptr) write(all.d, direction);
    const double c0 = map.c[0][0], c1 = map.c[0][1];
    for (int j = 0; j < all.count; ++j) all.a[j] += (c0 - c1) * all.d[j];
    all.add(t.prev, c1, 0.0);
    write(all.a, out);
    if (copy != nullptr) __builtin_memcpy(copy, out, static_cast<size_t>(n) * sizeof(T));
  }

  const T* direction_row(const StepTerms<T>& t, int64_t n, const Scratch<T>& scratch) const {
    if (t.in_direction == 1 && t.d[0] == T(1)) return t.row[0];
    T* e = row_buffer(0, scratch);
    sum(t, t.d, t.in_direction, e, n, false);
    return e;
  }

  const T* second_row(const StepTerms<T>& t, const T* e, int64_t n, const Scratch<T>& scratch) const {
    if (reader_.call.mode == kSnr) return t.prev;
    return difference(t.prev, e, row_buffer(1, scratch), n);
  }

  void in_scratch(const Terms& whole, const FrameMap& map, int outputs, T* const* outs, int64_t from, int64_t n,
                  const Scratch<T>& scratch) const {
    T c[kMaxOutputs * 3];
    for (int i = 0; i < outputs; ++i)
      for (int j = 0; j < 3; ++j) c[3 * i + j] = static_cast<T>(map.c[i][j]);
    for (int64_t at = 0; at < n; at += kChunk) {
      const int64_t part = n - at < kChunk ? n - at : kChunk;
      Terms t = whole;
      for (int j = 0; j < t.count; ++j) t.row[j] += at;
      t.prev += at;
      T *a = row_buffer(2, scratch), *to[kMaxOutputs];
      sum(t, t.a, t.count, a, part, false);
      const T* e = direction_row(t, part, scratch);
      const T* rows[3] = {e, second_row(t, e, part, scratch), a};
      for (int i = 0; i < outputs; ++i) to[i] = outs[i] + from + at;
      reader_.kernels.apply(rows, 3, 0, c, outputs, to, part, false);
    }
  }

  VectorReader<T> reader_;
  bool in_place_;
};

}  // namespace marquardt
