// Which variant of the CUDA kernels runs a call, and how large its CTAs are.
#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "frame/cuda_layout.h"

namespace marquardt {
namespace {

constexpr int64_t kMaxGrid = 0x7fffffff;
constexpr int64_t kMaxCluster = 16;
constexpr int64_t kResident = 3;             // CTAs of a multiprocessor, as their registers allow
constexpr int64_t kMostTiles = 64;           // that one CTA walks
constexpr int64_t kCrowdedBytes = 16 << 10;  // of a frame in one CTA, beyond which idle multiprocessors should help

constexpr int64_t divided_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Shared memory that a CTA should take at most, so that kResident share a multiprocessor: one loads while another
// computes or stores. The system keeps a KiB of each.
int64_t comfortable_bytes(const DeviceLimits& limits) {
  return limits.shared_per_sm / kResident - 1024;
}

int64_t largest_cluster(const DeviceLimits& limits) {
  return limits.major >= 9 ? std::min<int64_t>(limits.max_cluster, kMaxCluster) : 1;
}

FrameAccess access_of(const FrameCall& call, bool general) {
  if (call.compute == DType::f64) return FrameAccess::f64;
  int floats = 0, vectors = 0;
  const auto count = [&](DType dtype) {
    ++vectors;
    if (dtype == DType::f32) ++floats;
  };
  for (int j = 0; j < call.streams; ++j) count(call.stream[j].dtype);
  for (int i = 0; i < call.outputs; ++i) count(call.output[i].dtype);
  if (general) return FrameAccess::mixed;
  return floats == vectors ? FrameAccess::f32 : floats == 0 ? FrameAccess::half : FrameAccess::mixed;
}

bool is_general(const FrameCall& call) {
  return call.ones || call.prologue != nullptr || call.clamp != nullptr || call.op == FrameOp::given ||
         is_lowrank(call.op) || call.op == FrameOp::lm_step || gram_blocks(call) > 1;
}

bool any_gram(const FrameCall& call) {
  if (call.gram == GramKind::none || call.rows == 0) return false;
  const bool may_skip = call.op == FrameOp::lm_direction || call.op == FrameOp::lm_step;
  if (!call.host_parameters || !may_skip) return true;
  return gram_rows(call, call.parameters) != 0u;
}

int64_t tile_elements(const FramePlan& plan) {
  return static_cast<int64_t>(plan.threads) * slot_elements(plan.access);
}

int ring_stages(const FramePlan& plan) {
  const int64_t stages = plan.general ? kGeneralRingStages : kRingStages;
  return static_cast<int>(std::min(stages, plan.tiles));
}

int64_t shared_bytes(const FrameCall& call, const FramePlan& plan) {
  const FrameLayout layout = layout_of(call, plan.access, plan.threads);
  return layout.stages_at + int64_t{plan.stages} * layout.stage_bytes;
}

// Tiles, stages, shared memory and group from the rest.
void complete(const FrameCall& call, FramePlan& plan) {
  if (plan.variant == FrameVariant::held) plan.splits = plan.cluster;
  plan.tiles = std::max<int64_t>(1, divided_up(divided_up(call.size, tile_elements(plan)), plan.splits));
  plan.stages =
      plan.variant == FrameVariant::held ? static_cast<int>(std::min<int64_t>(plan.tiles, 1 << 20)) : ring_stages(plan);
  plan.shared = shared_bytes(call, plan);
  plan.group = std::clamp<int64_t>(plan.group, 1, std::max<int64_t>(1, kMaxGrid / plan.splits));
}

int64_t frame_bytes(const FrameCall& call) {
  int64_t bytes = 0;
  for (int j = 0; j < call.streams; ++j) bytes += call.size * size_of(call.stream[j].dtype);
  return bytes;
}

// The smallest CTA that covers a sample, up to the usual size; more warps where the Gram has many blocks.
int threads_for(const FrameCall& call, const FramePlan& plan, int64_t elements) {
  int threads = 32;
  while (threads < kMaxThreads && int64_t{threads} * slot_elements(plan.access) < elements) threads *= 2;
  const int wanted = 32 * std::min(gram_blocks(call), 8);
  while (threads < wanted && threads < kMaxThreads) threads *= 2;
  return threads;
}

// The frame in shared memory, of the smallest cluster that leaves room for others; more CTAs for small batches.
bool plan_held(const FrameCall& call, const DeviceLimits& limits, FramePlan& plan) {
  plan.variant = FrameVariant::held;
  const int64_t most = largest_cluster(limits);
  int64_t cluster = 1;
  const auto fits = [&](int64_t ctas, int64_t bytes) {
    plan.cluster = static_cast<int>(ctas);
    plan.threads = threads_for(call, plan, divided_up(call.size, ctas));
    complete(call, plan);
    return plan.shared <= bytes;
  };
  while (cluster < most && !fits(cluster, comfortable_bytes(limits))) cluster *= 2;
  // Few samples leave multiprocessors idle: share each among more CTAs, as long as every thread keeps two slots. What a
  // small sample waits for is the cluster, not its elements.
  while (cluster < most && call.batch * cluster * 2 <= limits.sms &&
         call.size >= cluster * 2 * 2 * kMaxThreads * slot_elements(plan.access)) {
    cluster *= 2;
  }
  if (!fits(cluster, limits.shared_per_block)) return false;
  plan.group = call.batch;
  complete(call, plan);
  return true;
}

// Samples in the largest clusters that leave half of the multiprocessors idle and yet give each CTA much to do: the whole
// chip for two launches is faster (a sample of 512 KiB on an H100: 8.9 us in 16 CTAs, 7.7 in two sweeps, measured).
bool is_crowded(const FrameCall& call, const DeviceLimits& limits, const FramePlan& plan) {
  return plan.cluster == largest_cluster(limits) && call.batch * plan.cluster * 2 <= limits.sms &&
         frame_bytes(call) > plan.cluster * kCrowdedBytes;
}

// CTAs per sample so that the chip is filled once, each with some tiles to walk.
void spread(const FrameCall& call, const DeviceLimits& limits, FramePlan& plan) {
  plan.threads = threads_for(call, plan, call.size);
  plan.splits = 1;
  // The ring of stages must leave room for other CTAs.
  for (complete(call, plan); plan.shared > comfortable_bytes(limits) && plan.threads > 64; complete(call, plan))
    plan.threads /= 2;
  const int64_t tiles = divided_up(call.size, tile_elements(plan));
  const int64_t samples = std::max<int64_t>(1, std::min(call.batch, plan.group));
  // No more CTAs than are resident at once: a few too many are a second wave of their own, which takes as long as the
  // first (25 MB on an H100: 441 CTAs on 396 places 18 us, measured). So tiles per CTA are rounded up.
  const int64_t places = std::max<int64_t>(1, int64_t{limits.sms} * kResident / samples);
  plan.splits = std::clamp<int64_t>(divided_up(tiles, std::clamp<int64_t>(divided_up(tiles, places), 1, kMostTiles)), 1,
                                    kMaxGrid);
  complete(call, plan);
}

// Two launches per group of samples whose frames the L2 cache keeps from the first to the second.
void plan_two_sweeps(const FrameCall& call, const DeviceLimits& limits, FramePlan& plan) {
  plan.variant = FrameVariant::two_sweeps;
  plan.cluster = 1;
  plan.group = std::clamp<int64_t>(limits.l2_bytes / 2 / std::max<int64_t>(1, frame_bytes(call)), 1, call.batch);
  spread(call, limits, plan);
}

}  // namespace

FramePlan frame_plan(const FrameCall& given, const DeviceLimits& limits) {
  const FrameCall call = flattened(given);
  FramePlan plan;
  plan.general = is_general(call);
  plan.access = access_of(call, plan.general);
  plan.group = std::max<int64_t>(1, call.batch);
  if (!any_gram(call)) {
    plan.variant = FrameVariant::one_sweep;
    spread(call, limits, plan);
    return plan;
  }
  // Without clusters a lone large sample would keep one multiprocessor busy and the others idle.
  const bool lonely = limits.major < 9 && call.batch * 4 < limits.sms && frame_bytes(call) > (32 << 10);
  if (lonely || !plan_held(call, limits, plan) || is_crowded(call, limits, plan)) plan_two_sweeps(call, limits, plan);
  return plan;
}

FramePlan completed(const FrameCall& given, const DeviceLimits& limits, FramePlan plan) {
  const FrameCall call = flattened(given);
  if (is_general(call)) plan.general = true;
  plan.access = access_of(call, plan.general);
  const auto refuse = [&](const char* why) { throw std::invalid_argument(text_of(plan) + ": " + why); };
  if (plan.threads < 32 || plan.threads % 32 != 0 || plan.threads > kMaxThreads)
    refuse("threads must be whole warps, at most 256");
  if (plan.splits < 1 || plan.group < 1) refuse("splits and group must be at least 1");
  if (plan.cluster < 1 || plan.cluster > largest_cluster(limits))
    refuse("clusters have at least 1 CTA and at most 16, less on some chips, and exist from sm_90 on");
  if (plan.variant != FrameVariant::held && plan.cluster != 1) refuse("only a held frame uses a cluster");
  if (plan.variant == FrameVariant::one_sweep && any_gram(call)) refuse("one sweep takes no Gram");
  complete(call, plan);
  if (plan.shared > limits.shared_per_block) refuse("more shared memory than a CTA can have");
  return plan;
}

std::string text_of(const FramePlan& plan) {
  static const char* const kVariants[] = {"held", "two_sweeps", "one_sweep"};
  static const char* const kAccesses[] = {"f32", "half", "mixed", "f64"};
  char line[200];
  std::snprintf(line, sizeof(line), "%s: %lld CTAs x %d threads a sample%s, %d of %lld tiles in %.1f KiB shared, %s%s",
                kVariants[static_cast<int>(plan.variant)],
                static_cast<long long>(plan.variant == FrameVariant::held ? plan.cluster : plan.splits), plan.threads,
                plan.cluster > 1 ? " (a cluster)" : "", plan.stages, static_cast<long long>(plan.tiles),
                static_cast<double>(plan.shared) / 1024.0, kAccesses[static_cast<int>(plan.access)],
                plan.general ? ", general" : "");
  return line;
}

int64_t frame_workspace(const FrameCall& given, const FramePlan& plan) {
  if (plan.variant != FrameVariant::two_sweeps) return 0;
  return plan.group * plan.splits * gram_entries(flattened(given));
}

}  // namespace marquardt
