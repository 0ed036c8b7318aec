// The frame engine: per sample, k vectors of D numbers (a frame T), T -> C(T Tᵀ)·T.
//
//   vectors v = streams, then "ones", then noise        n ≤ 18
//   rows    r = clamp(L v)                              k ≤ 18   (or residual pairs: r[2j+1] = v[2j+1] − v[2j])
//   gram    G = r rᵀ                                    optional
//   C = map(op, G, parameters)                          the op: a small function of a few numbers (maps.h)
//   outputs   = C r                                     m ≤ 17
//
// The heavy stages (gram, apply) do not know the op. This header is plain C++: no torch, so the engine can be used
// from anywhere.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace marquardt {

constexpr int kMaxVectors = 18;
constexpr int kMaxOutputs = 17;
constexpr int kMaxParameters = 20;
constexpr int kMaxGram = kMaxVectors * (kMaxVectors + 1) / 2;

// Elements whose products are summed in the compute type before they are added up in double. Fixed, and merged in
// a fixed order: results are bitwise equal for any batch size, position in the batch and number of threads.
constexpr int64_t kChunk = 2048;

enum class FrameOp : int {
  given = 0,  // C is a parameter matrix
  lm_direction = 1,
  lm_direction_backward = 2,
  lm_direction_jvp = 3,
  affine = 4,
  affine_backward = 5,
  // The damped low-rank Hessian (lowrank_maps.h): all of them behind this one.
  lowrank = 6,
  lowrank_vjp = 7,
  lowrank_logdet = 8,
  lowrank_logdet_vjp = 9,
  lowrank_update = 10,
  // Steps of samplers (step.h): rows of their own.
  lm_step = 11,
};

enum class GramKind : uint8_t {
  none,
  full,   // every pair of rows, packed: (i, j ≤ i) at i(i+1)/2 + j
  first,  // row 0 with each of the others: (0, j) at j − 1
  two     // the same, then row 1 with each of those behind it: (1, j) at k − 1 + j − 2
};

constexpr int entries_of(GramKind kind, int rows) {
  switch (kind) {
    case GramKind::none: return 0;
    case GramKind::first: return rows - 1;
    case GramKind::two: return 2 * rows - 3;
    case GramKind::full: break;
  }
  return rows * (rows + 1) / 2;
}

// One vector per sample: D dense elements at data + b·batch_stride (in elements).
struct Stream {
  const void* data;
  DType dtype;
  int64_t batch_stride;
};

struct Output {
  void* data;
  DType dtype;
  int64_t batch_stride;
};

struct FrameCall {
  FrameOp op = FrameOp::given;
  int mode = 0;
  int64_t batch = 0, size = 0;  // B, D
  DType compute = DType::f32;   // f32 or f64

  int streams = 0;
  Stream stream[kMaxVectors];
  bool ones = false;              // a vector of ones behind the streams
  const int64_t* seed = nullptr;  // noise behind that: (key, counter high) per sample or for the call
  int64_t seed_stride = 0;        // 0: one seed, the index runs through the call; 2: one per sample

  int pairs = 0;                     // rows 2j+1 < 2·pairs are residuals against row 2j
  const double* prologue = nullptr;  // L [k, n] or [B, k, n]; excludes pairs
  int64_t prologue_stride = 0;       // 0 or k·n
  const double* clamp = nullptr;     // [k, 2] lower and upper bounds
  int rows = 0;                      // k
  // lm_step alone: its sources are the first streams, and its rows follow from them and the parameters (step.h).
  int sources = 0;
  bool guided = false;          // the first output of the model stands for its residual against the second
  bool clipped = false;         // there is a row y
  uint8_t step_outputs = 1;     // how many outputs are x' (one behind another); 1 or 2
  bool step_direction = false;  // then the direction is an output
  bool step_converted = false;  // and y

  GramKind gram = GramKind::none;
  bool exact = false;  // Gram products in double

  const double* parameters = nullptr;  // the op's scalars [p] or [B, p]; for `given` the matrix C [m, k]
  int64_t parameter_stride = 0;        // 0 or p
  int parameter_count = 0;             // p, where a GPU must copy them
  bool host_parameters = false;        // on a GPU: they lie on the host (stride 0), and travel with the launch

  int outputs = 0;  // m
  Output output[kMaxOutputs];
  double* scalars = nullptr;  // per-sample numbers the op returns, [B, s]
  int64_t scalar_stride = 0;  // s
};

// What the scalar stage decides for one sample.
struct FrameMap {
  double c[kMaxOutputs][kMaxVectors];  // rows of C
  uint32_t used;                       // bit j: row j is read by the apply
  uint32_t zero;                       // bit i: output i is zero, whatever the rows hold
  bool wide;                           // outputs are sums that cancel: added up in double
  bool apart;                          // an output looks only at rows whose number is not 0
  double work[24];                     // room for the map's own numbers
};

// Samples of one call whose map is the same and that lie behind one another are one long sample: fewer, longer
// sweeps. Noise keeps its index as long as it runs through the call.
inline bool flattens(const FrameCall& call) {
  if (call.batch < 2 || call.gram != GramKind::none || call.scalars != nullptr) return false;
  if (call.parameter_stride != 0 || call.prologue_stride != 0) return false;
  bool dense = call.seed == nullptr || call.seed_stride == 0;
  for (int j = 0; j < call.streams; ++j) dense = dense && call.stream[j].batch_stride == call.size;
  for (int i = 0; i < call.outputs; ++i) dense = dense && call.output[i].batch_stride == call.size;
  return dense;
}

// The call as one long sample if it flattens, else as it is.
inline FrameCall flattened(const FrameCall& call) {
  FrameCall flat = call;
  if (flattens(call)) {
    flat.size *= flat.batch;
    flat.batch = 1;
  }
  return flat;
}

// Runs the call on the CPU. `call` has been checked.
void frame_cpu(const FrameCall& call);

// "avx512", "avx2" or "baseline": the instruction set this processor was given.
const char* frame_cpu_isa();

}  // namespace marquardt
