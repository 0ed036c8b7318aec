// Where the parts of a CTA's shared memory lie. Plain C++, made on the host and read by the kernels.
//
//   map | matrix C | work of a low-rank map | Gram | own part of it | parts by warp | prologue | rows of one tile | stages of vectors
//
// A tile is threads · V elements of a sample; a thread owns one slot of V elements of every vector. Values of the
// compute type are kept in planes of 16 bytes per thread, so that no two threads of a warp meet in a bank.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "frame/cuda.h"
#include "frame/maps.h"

namespace marquardt {

constexpr int kBlockRows = 4;                               // a block of the Gram is 4 × 4 entries
constexpr int kBlockEntries = kBlockRows * kBlockRows;      // for one warp's accumulators
constexpr int kMaxThreads = 256;                            // of a CTA
constexpr int kSmallParameters = kMaxParameters;            // carried by a launch of the quick kernels
constexpr int kManyParameters = kMaxOutputs * kMaxVectors;  // and of the general ones: a matrix
constexpr int kRingStages = 4, kGeneralRingStages = 2;      // tiles in flight where the frame is not held

// Elements of a slot.
MQ_HOST_DEVICE constexpr int slot_elements(FrameAccess access) {
  return access == FrameAccess::f64 ? 2 : access == FrameAccess::half ? 8 : 4;
}

MQ_HOST_DEVICE constexpr int compute_bytes(FrameAccess access) {
  return access == FrameAccess::f64 ? 8 : 4;
}

// What the rows of a sampler step are made of, for one sample, in the compute type: in place of a prologue.
template <class C>
struct StepTable {
  struct Term {
    int offset;  // of its vector in a stage
    DType dtype;
    double d, y;  // its numbers in e, y and a; all 0 where the vector was not fetched
    C a;
  };
  int terms;
  Term term[kMaxSources + 1];  // the sources, then drawn noise
  double d_y, bound;
  C a_y;
  bool guided, clipped;  // guided: s_1 stands for s_1 − s_2
  bool residual;         // row 1 is p − e, else p
  int prev;              // where p lies in a stage; −1: this sample does not look at it
  DType prev_dtype;
};

struct FrameLayout {
  int vectors;              // streams, ones, noise
  int offset[kMaxVectors];  // of a vector in a stage
  int stage_bytes;
  bool staged;    // rows differ from the vectors and are made tile by tile
  int row_bytes;  // of a row of one tile
  int entries;    // of the Gram
  int blocks;     // 4 × 4 blocks that cover them; one warp takes one at a time
  int map_at, matrix_at, work_at, gram_at, own_at, parts_at, prologue_at, rows_at, stages_at;
};

inline int gram_entries(const FrameCall& call) {
  return entries_of(call.gram, call.rows);
}

inline int gram_blocks(const FrameCall& call) {
  if (call.gram == GramKind::none) return 0;
  if (call.gram != GramKind::full) return (call.rows - 1 + kBlockRows - 1) / kBlockRows;
  const int side = (call.rows + kBlockRows - 1) / kBlockRows;
  return side * (side + 1) / 2;
}

// The layout without its stages, whose number the plan decides: they begin at stages_at.
inline FrameLayout layout_of(const FrameCall& call, FrameAccess access, int threads) {
  FrameLayout l{};
  const int v = slot_elements(access), wide = compute_bytes(access);
  l.vectors = call.streams + (call.ones ? 1 : 0) + (call.seed != nullptr ? 1 : 0);
  for (int j = 0; j < l.vectors; ++j) {
    l.offset[j] = l.stage_bytes;
    l.stage_bytes += threads * v * (j < call.streams ? static_cast<int>(size_of(call.stream[j].dtype)) : wide);
  }
  l.staged = call.prologue != nullptr || call.clamp != nullptr || call.op == FrameOp::lm_step;
  l.row_bytes = threads * v * wide;
  l.entries = gram_entries(call);
  l.blocks = gram_blocks(call);

  int at = 0;
  const auto place = [&at](int64_t bytes) {
    const int here = at;
    at += static_cast<int>((bytes + 15) / 16 * 16);
    return here;
  };
  l.map_at = place(sizeof(FrameMap));
  l.matrix_at = place(static_cast<int64_t>(call.outputs) * call.rows * wide);
  l.work_at = place(is_lowrank(call.op) ? static_cast<int64_t>(sizeof(LowRankWork)) : 0);
  l.gram_at = place(8 * l.entries);
  l.own_at = place(8 * l.entries);
  l.parts_at = place(l.blocks == 0 ? 0 : 8 * kBlockEntries * (threads / 32));
  const int64_t prologue = call.prologue == nullptr ? 0 : static_cast<int64_t>(call.rows) * l.vectors * wide;
  l.prologue_at = place(call.op == FrameOp::lm_step ? static_cast<int64_t>(sizeof(StepTable<double>)) : prologue);
  at = (at + 127) / 128 * 128;
  l.rows_at = place(l.staged ? static_cast<int64_t>(call.rows) * l.row_bytes : 0);
  l.stages_at = at;
  return l;
}

// Whether every slot of every vector and output is 16 bytes, aligned and whole, the usual call: then nothing about them is
// asked slot by slot (cuda_plain.cuh). Of calls that quick kernels run.
inline bool is_plain(const FrameCall& call, FrameAccess access, int threads, int64_t tiles) {
  const int v = slot_elements(access);
  if (access == FrameAccess::mixed || call.seed != nullptr || call.rows != call.streams) return false;
  if (call.size % v != 0 || tiles * threads * 16 > 1 << 30) return false;  // offsets of 32 bits
  const auto fits = [&](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (call.batch == 1 || stride % v == 0);
  };
  bool plain = true;
  for (int j = 0; j < call.streams; ++j) plain = plain && fits(call.stream[j].data, call.stream[j].batch_stride);
  for (int i = 0; i < call.outputs; ++i) plain = plain && fits(call.output[i].data, call.output[i].batch_stride);
  return plain;
}

}  // namespace marquardt
