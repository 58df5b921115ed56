// The family "split_labels": the classes of a voxel split over lanes (split.cuh) or, where they lie side by side,
// through a tile (interleaved.cuh). Softmax and labels: 5 to 144 classes, with squared errors 3 to 128. float32 and
// half precision.
#include <algorithm>

#include "coefficients.cuh"
#include "counting.cuh"
#include "dispatch.h"
#include "families.h"
#include "interleaved.cuh"
#include "split.cuh"

namespace tversky_kernels {
namespace cuda {
namespace {

// The most lanes that share a voxel, and the most classes of a lane. A lane may have a ninth class, because 8, 16 or 32
// organs and a background are common; that costs less than twice the lanes. With squared errors it may not.
constexpr int kMostLanes = 16, kMostOfLane = 9, kMostOfLaneSquared = 8;

// Calls f with the most classes of a lane as a constant. Every lane has all of them but the last two at least.
// kSquared: one lane also for three and four classes, which have kernels of their own without squares; and no nine
// classes. Squares and kSmoothed have no five and no seven: they are rarer, and every kernel takes time to compile.
template <bool kSquared, bool kSmoothed, typename F>
void with_split_classes(int64_t classes, int lanes, F&& f) {
  constexpr bool kRare = kSquared || kSmoothed;
  if constexpr (kSquared) {
    if (classes <= 4) return f(std::integral_constant<int, 4>{});
  }
  if constexpr (!kRare) {
    if (classes <= lanes * 5) return f(std::integral_constant<int, 5>{});
  }
  if (classes <= lanes * 6) return f(std::integral_constant<int, 6>{});
  if constexpr (!kRare) {
    if (classes <= lanes * 7) return f(std::integral_constant<int, 7>{});
  }
  if (classes <= lanes * 8) return f(std::integral_constant<int, 8>{});
  if constexpr (!kSquared) return f(std::integral_constant<int, kMostOfLane>{});
}
// The same where the classes of a voxel lie side by side: f(classes, turns). So many lanes take units of classes in
// turn (TileLane), so that few lanes of a warp meet in a bank. Even numbers are for even numbers of classes: then two
// classes are a whole word at every voxel. With odd numbers a lane has all but the last three classes at least.
template <typename F>
void with_interleaved_classes(int64_t classes, int lanes, F&& f) {
  const bool even = classes % 2 == 0;
  if (even && classes <= lanes * 6) return f(std::integral_constant<int, 6>{}, std::integral_constant<int, 1>{});
  if (even && classes <= lanes * 8) {
    if (lanes == 1) return f(std::integral_constant<int, 8>{}, std::integral_constant<int, 1>{});
    return f(std::integral_constant<int, 8>{}, std::integral_constant<int, 2>{});
  }
  if (classes <= lanes * 7) return f(std::integral_constant<int, 7>{}, std::integral_constant<int, 1>{});
  if (lanes < 4) return f(std::integral_constant<int, kMostOfLane>{}, std::integral_constant<int, 1>{});
  f(std::integral_constant<int, kMostOfLane>{}, std::integral_constant<int, 4>{});
}

// Calls f(classes, ce, squared, turns), constants, for a plan that splits the classes of a voxel and whose target is a
// label. turns: 0 where the voxels of a class lie side by side; else see with_interleaved_classes.
template <typename F>
void with_split_labels(const Volume& v, const Plan& plan, F&& f) {
  with_label_sums(v, [&](auto ce, auto squared) {
    constexpr bool kSquared = decltype(squared)::value, kSmoothed = decltype(ce)::value == CrossEntropy::kSmoothed;
    if (!plan.interleaved) {
      with_split_classes<kSquared, kSmoothed>(
          v.classes, plan.lanes, [&](auto classes) { f(classes, ce, squared, std::integral_constant<int, 0>{}); });
    } else if constexpr (!kSquared && !kSmoothed) {  // there is no plan for it
      with_interleaved_classes(v.classes, plan.lanes,
                               [&](auto classes, auto turns) { f(classes, ce, squared, turns); });
    }
  });
}

// More classes than one thread's registers hold, split over the lanes of a warp: see split.cuh.
template <typename T, int kClasses, CrossEntropy kCeForm, bool kSquared, int kTurns>
__global__ void __launch_bounds__(Plan::kThreads, kSplitBlocks)
    split_count_pass_kernel(const Volume v, Compute<T>* __restrict__ partial, unsigned* finished, const Blocks blocks,
                            const SplitShape shape) {
  using A = Compute<T>;
  constexpr bool kCrossEntropy = kCeForm != CrossEntropy::kNone, kSmoothed = kCeForm == CrossEntropy::kSmoothed;
  constexpr int kVoxels = kSplitVoxels, kValues = count_values<kCeForm, kSquared>(kClasses);
  constexpr int kColumns = kCrossEntropy ? kAllCounts : kOverlapCounts;
  TK_SHARED(memory);
  using Lane = LaneFor<kClasses, kTurns>;
  const Lane lane(shape, static_cast<int>(v.classes));
  A* of_sums = lane.template beyond_exchange<A>(memory);
  const LabelSums<A, kCrossEntropy> of_label(of_sums, kClasses);
  begin_count(finished);
  const Share share = share_of_block<Order::kBackward>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  const LabelRow<Reads::kSameSize, kVoxels> target_row(v, share.sample * v.target.sample_stride);
  A fp[kClasses] = {}, smoothing[kClasses] = {}, weight_sum = A(0);
  bool bad = false;
  unsigned char* const tiles = reinterpret_cast<unsigned char*>(of_sums + label_sum_values<kCrossEntropy>(kClasses));
  using Pack = PackOf<T, kClasses, kTurns, kAhead<T, false>, kSmoothed>;
  Pack pack(tiles, v, lane);
  const auto expect = [&](int64_t at) { pack.expect(v, rows, target_row, lane, at); };
  for_each_pack_ahead<Order::kBackward>(share, lane, expect, [&](int64_t at, int64_t next) {
    int labels[kVoxels];
    A of_target[kVoxels], weights[kVoxels];
    const bool all_known = pack.load(v, rows, target_row, lane, at, next, labels, of_target, bad);
    Logits<T, kVoxels> z[kClasses];
    weighed_pack<Reads::kSameSize>(v, lane, share.sample, at, pack, labels, all_known, z, of_target, weights, bad);
    pack.release(lane);
    A others[kClasses][kVoxels], totals[2 * kVoxels];
    SoftmaxSums<A> sums[kVoxels];
    softmax_of_split<kCrossEntropy, Pack::kTargets>(
        z, labels, of_target, lane, others, sums,
        [&](int j, int k, A below_top) { smoothing[j] += kSmoothed ? below_top * weights[k] : A(0); });
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      totals[k] = sums[k].others;
      totals[kVoxels + k] = sums[k].target;
    }
    sum_over_lanes<kSums, Combine::kSteps, Lane::kKnowsOwner ? kVoxels : 0>(totals, lane);
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      sums[k] = {totals[kVoxels + k], totals[k]};
      const A weight = weights[k], inverse = reciprocal(sums[k].target + sums[k].others), weighted = weight * inverse;
#pragma unroll
      for (int j = 0; j < kClasses; ++j) {
        fp[j] += kSquared ? (others[j][k] * inverse) * (others[j][k] * weighted) : others[j][k] * weighted;
      }
      if (kCrossEntropy && !kSquared) weight_sum += weight;
      A missed = sums[k].others * weighted, ce = A(0), last = weight;
      if (kSquared) missed *= sums[k].others * inverse;
      if (kCrossEntropy) {
        const A log_sum = log_one_plus(exponentials_beyond_one(sums[k])), term = of_target[k] + log_sum;
        ce = (kSmoothed ? term : with_focal_factor(v, sums[k].others * inverse, term)) * weight;
        if (kSmoothed) last *= log_sum;
      }
      of_label.template add<kSquared || kSmoothed>(recomputed(lane.index_of(labels[k])), sums[k].target * weighted,
                                                   missed, ce, last);
    }
  });

  A values[kValues], log_sums = A(0);  // for smoothing, the same for every class; they were summed by label
  if constexpr (kSmoothed) {
#pragma unroll 1
    for (int j = -1; j < kClasses; ++j) log_sums += of_label.last(j);
  }
  constexpr int of_weights = kWeights<kCeForm> * kClasses;
#pragma unroll
  for (int j = 0; j < kClasses; ++j) {
    values[kTp * kClasses + j] = of_label.tp(j);
    values[kFp * kClasses + j] = fp[j];
    values[kFn * kClasses + j] = of_label.fn(j);
    if constexpr (kCrossEntropy) values[kCe * kClasses + j] = of_label.ce(j);
    if constexpr (kSmoothed) values[kSmoothing * kClasses + j] = smoothing[j] + log_sums;
    if constexpr (kCrossEntropy && kSquared) values[of_weights + j] = of_label.last(j);
  }
  if constexpr (kCrossEntropy && !kSquared) values[of_weights] = weight_sum;
  const SplitBlockSums<A, kValues> sums{of_sums, lane};
  sums.store(values, bad);
  __syncthreads();
  A* out = partial + (share.sample * blocks.programs + share.program) * kColumns * v.classes;
  for (int i = threadIdx.x; i < kColumns * static_cast<int>(v.classes); i += Plan::kThreads) {
    const int column = i / static_cast<int>(v.classes), c = i % static_cast<int>(v.classes);
    const int first = column == Count::kVoxels ? of_weights : column * kClasses;
    const ClassOfLane found = lane.find(c, static_cast<int>(v.classes));
    const int of_lane = first + (column == Count::kVoxels && !kSquared ? 0 : found.j);
    out[i] = column == kSmoothing && !kSmoothed ? A(0) : sums.total(found.place, of_lane);
  }
}

// More classes than one thread's registers hold, split over the lanes of a warp: see split.cuh.
template <typename T, int kClasses, CrossEntropy kCeForm, bool kSquared, int kTurns>
__global__ void __launch_bounds__(Plan::kThreads, kSplitBlocks)
    split_gradient_pass_kernel(const Volume v, const GradientArguments a, const Blocks blocks, const SplitShape shape) {
  using A = Compute<T>;
  constexpr bool kCrossEntropy = kCeForm != CrossEntropy::kNone, kSmoothed = kCeForm == CrossEntropy::kSmoothed;
  constexpr int kVoxels = kSplitVoxels;
  const int classes = static_cast<int>(v.classes);
  TK_SHARED(memory);
  using Lane = LaneFor<kClasses, kTurns>;
  const Lane lane(shape, classes);
  const Share share = share_of_block<Order::kForward>(v, blocks);
  Coefficients<A>* const coefficients = lane.template beyond_exchange<Coefficients<A>>(memory);
  const Coefficients<A>* of_class = fill_coefficients<kCrossEntropy>(v, a, share.sample, coefficients);
  unsigned char* const tiles = reinterpret_cast<unsigned char*>(coefficients + classes + 1);
  __syncthreads();

  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  A u_background[kClasses];
  const auto take_background = [&] {
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      u_background[j] = lane.template has<kClasses>(j) ? of_class[lane.class_of(j)].background : A(0);
    }
  };
  if (kTurns == 0) take_background();
  const A smoothing_of_all = kSmoothed ? sum_of_smoothing(of_class, classes) : A(0);
  bool bad = false;  // the count pass has reported it, and the coefficients are NaN then
  const LabelRow<Reads::kSameSize, kSplitVoxels> target_row(v, share.sample * v.target.sample_stride);
  using Pack = PackOf<T, kClasses, kTurns, kAhead<T, true>>;
  Pack pack(tiles, v, lane);
  const auto expect = [&](int64_t at) { pack.expect(v, rows, target_row, lane, at); };
  for_each_pack_ahead<Order::kForward>(share, lane, expect, [&](int64_t at, int64_t next) {
    int labels[kVoxels];
    A of_target[kVoxels], weights[kVoxels];
    const bool all_known = pack.load(v, rows, target_row, lane, at, next, labels, of_target, bad);
    Logits<T, kVoxels> z[kClasses];
    Packed<T, kVoxels> dz[kClasses];
    T at_target[kVoxels];
    weighed_pack<Reads::kSameSize>(v, lane, share.sample, at, pack, labels, all_known, z, of_target, weights, bad);
    if (kTurns > 0) take_background();  // from shared memory again, because registers are few
    A others[kClasses][kVoxels], totals[3 * kVoxels];
    SoftmaxSums<A> sums[kVoxels];
    softmax_of_split<false, Pack::kTargets>(z, labels, of_target, lane, others, sums, [](int, int, A) {});
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      totals[k] = sums[k].others;
      totals[kVoxels + k] = A(0);
#pragma unroll
      for (int j = 0; j < kClasses; ++j) {
        totals[kVoxels + k] += others[j][k] * slope_of_other<kSquared>(others[j][k], u_background[j]);
      }
      totals[2 * kVoxels + k] = sums[k].target;
    }
    sum_over_lanes<kSums, Combine::kSteps, Lane::kKnowsOwner ? kVoxels : 0>(totals, lane);
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      sums[k] = {totals[2 * kVoxels + k], totals[k]};
      const int label = labels[k], target = Pack::kPutsTargets ? -1 : recomputed(lane.index_of(label));
      const A inverse = reciprocal(sums[k].target + sums[k].others);
      const A weight = weights[k];  // 0 where the voxel does not count; the gradient is 0 then
      A weighted_others = totals[kVoxels + k], u_target = of_class[label].foreground;
      if constexpr (kSquared) {
        weighted_others *= inverse;  // the slopes were made of exponentials
        u_target = squared_slope_of_target(sums[k].others * inverse, of_class[label].background, u_target);
      }
      SoftmaxGradient<A> gradient = softmax_gradient(sums[k], weighted_others, u_target, inverse, weight);
      if (kSmoothed) {
        gradient.add_smoothed_cross_entropy(sums[k], of_class[label].ce, of_class[label].smoothing, smoothing_of_all);
      } else if (kCrossEntropy) {
        gradient.add_cross_entropy(sums[k], with_focal_slope(v, sums[k], inverse, of_class[label].ce));
      }
#pragma unroll
      for (int j = 0; j < kClasses; ++j) {
        const A slope = slope_of_other<kSquared>(others[j][k] * inverse, u_background[j]);
        A other = gradient.other(others[j][k], slope);
        if (kSmoothed) {
          other -= (lane.template has<kClasses>(j) ? of_class[lane.class_of(j)].smoothing : A(0)) * weight;
        }
        dz[j].values[k] = static_cast<T>(target == j ? gradient.at_target : other);
      }
      pack.put(dz, k, lane);
      at_target[k] = static_cast<T>(gradient.at_target);
    }
    pack.put_targets(at_target, labels, lane);
    pack.store(v, a.out, share.sample, lane, at);
  });
}

// Calls f(type, classes, ce, squared, turns).
template <typename F>
void with_split_labels_of_type(const Volume& v, const Plan& plan, F&& f) {
  with_logits_type(v.logits.type, [&](auto element) {
    if constexpr (sizeof(element) < 8) {
      with_split_labels(
          v, plan, [&](auto classes, auto ce, auto squared, auto turns) { f(element, classes, ce, squared, turns); });
    }
  });
}

template <typename T>
bool plan_of(const Volume& v, const GradientView* out, Plan& plan) {
  const bool cross_entropy = v.cross_entropy != CrossEntropy::kNone, squared = v.overlap == OverlapForm::kSquared;
  if (!takes_labels<T>(v) || v.classes < (squared ? 3 : 5)) return false;
  plan.lanes = split_lanes(v.classes, kMostLanes, squared ? kMostOfLaneSquared : kMostOfLane);
  plan.voxels = kSplitVoxels;
  plan.interleaved = !squared && v.cross_entropy != CrossEntropy::kSmoothed && lies_side_by_side(v, out, sizeof(T)) &&
                     v.voxels % (16 / static_cast<int>(sizeof(T))) == 0;
  if (plan.lanes == 0 || !(plan.interleaved || can_be_read(v, sizeof(T), plan.voxels))) return false;
  int64_t values = kAllCoefficients * (v.classes + 1);  // of Compute<T>, in shared memory
  int packs = 0;                                        // bytes there for tiles, or for packs that are copied ahead
  with_split_labels(v, plan, [&](auto of_lane, auto, auto, auto turns) {
    constexpr int kClasses = decltype(of_lane)::value;
    if (out == nullptr) values = cross_entropy ? label_sum_values<true>(kClasses) : label_sum_values<false>(kClasses);
    // Tiles, or a pack of each class; and a place for no class.
    const int labels = bytes_of(v.target.type) * kSplitVoxels * Plan::kThreads;
    if (decltype(turns)::value > 0) {
      const RowOfTile row(static_cast<int>(v.classes), sizeof(T));
      const int tile = Plan::kThreads / plan.lanes / row.packs * row.stride * 16;
      packs = Plan::kThreads * static_cast<int>(sizeof(T)) + (kTileAhead<T> ? 2 * tile + labels : tile);
    } else if (out == nullptr ? kAhead<T, false> : kAhead<T, true>) {
      packs = (kClasses + 1) * static_cast<int>(sizeof(T)) * kSplitVoxels * Plan::kThreads + labels;
    }
  });
  share_over_warps(plan, values);
  plan.shared_bytes = static_cast<int>(values * sizeof(Compute<T>)) + packs;
  return true;
}

bool plan_split_labels(const Volume& v, const GradientView* out, Plan& plan) {
  bool takes = false;
  with_logits_type(v.logits.type, [&](auto element) {
    if constexpr (sizeof(element) < 8) takes = plan_of<decltype(element)>(v, out, plan);
  });
  return takes;
}

int blocks_split_labels(const Volume& v, const Plan& plan, bool gradient, int64_t pieces) {
  if (!gradient) return is_half(v) ? 2 : 4;
  // About ten pieces for each block, more where a block has more anyway.
  const int64_t of_block = plan.warps > 1 ? 16 : 10;
  return static_cast<int>(std::clamp<int64_t>(pieces / of_block / 2 * 2, gradient_blocks(v), 48));
}

void count_split_labels(const CountLaunch& launch) {
  with_split_labels_of_type(launch.v, launch.plan, [&](auto element, auto classes, auto ce, auto squared, auto turns) {
    using T = decltype(element);
    launch.template run<T>(split_count_pass_kernel<T, decltype(classes)::value, decltype(ce)::value,
                                                   decltype(squared)::value, decltype(turns)::value>,
                           SplitShape(launch.plan));
  });
}

void gradient_split_labels(const GradientLaunch& launch) {
  with_split_labels_of_type(launch.v, launch.plan, [&](auto element, auto classes, auto ce, auto squared, auto turns) {
    launch.run(split_gradient_pass_kernel<decltype(element), decltype(classes)::value, decltype(ce)::value,
                                          decltype(squared)::value, decltype(turns)::value>,
               SplitShape(launch.plan));
  });
}

}  // namespace

const Family kSplitLabels{"split_labels",       false, plan_split_labels, blocks_split_labels, count_split_labels,
                          gradient_split_labels};

}  // namespace cuda
}  // namespace tversky_kernels
