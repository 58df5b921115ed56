// The count pass on CUDA: logits and target in, one partial sum of the counts a block out.
#include "interleaved.cuh"
#include "split.cuh"
#include "tile.cuh"

namespace tversky_kernels {
namespace cuda {
namespace {

constexpr Order kOrder = Order::kBackward;

// What every block does first. finished: TableArguments::finished.
__device__ __forceinline__ void begin_count(unsigned* finished) {
  let_next_launch_begin();
  if (blockIdx.x == 0 && threadIdx.x == 0) *finished = 0;
}

// Sums kValues values of every thread over the block, in a fixed order, and calls store(i, sum), each in one thread;
// NaN where a thread is bad.
template <typename A, int kValues, typename F>
__device__ void block_sums(A (&values)[kValues], bool bad, F&& store) {
  TK_SHARED(memory);
  A* sums = reinterpret_cast<A*>(memory);  // [warps][kValues]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const A sum = warp_sum(bad ? static_cast<A>(NAN) : values[i]);
    if (lane == 0) sums[warp * kValues + i] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kValues; i += blockDim.x) {
    A total = 0;
    for (int w = 0; w < warps; ++w) total += sums[w * kValues + i];
    store(i, total);
  }
}

// The counts of a block whose threads have those of all classes. With a cross-entropy there are 4 or (smoothed) 5
// columns and the sum of the weights, which belongs to every class.
template <typename A, int kClasses, CrossEntropy kCeForm, bool kSquared, int kValues>
__device__ void store_block_sums(A (&values)[kValues], bool bad, A* out) {
  block_sums(values, bad, [&](int i, A total) {
    if (i < kWeights<kCeForm> * kClasses) {
      out[i] = total;
    } else if (kSquared) {
      out[i + kClasses] = total;
    } else {
      for (int c = 0; c < kClasses; ++c) out[kVoxels * kClasses + c] = total;
    }
  });
  if (kCeForm == CrossEntropy::kPlain) {
    for (int c = threadIdx.x; c < kClasses; c += blockDim.x) out[kSmoothing * kClasses + c] = A(0);
  }
}

// 1 / (1 + e) and the rest, from e between 0 and e^kMostExponent.
constexpr int kMostExponent = 80;
template <typename A>
__device__ __forceinline__ Probability<A> ratio_to_one(A e) {
  const A p = reciprocal(A(1) + e);
  return {p, e * p};
}

// All classes of kVoxels voxels in the registers of one thread, in whole loads.
template <typename T, int kClasses, CrossEntropy kCeForm, bool kSquared, bool kInterleaved>
__global__ void __launch_bounds__(Plan::kThreads, kFewBlocks<kClasses, kCeForm>)
    count_pass_kernel(const Volume v, Compute<T>* __restrict__ partial, unsigned* finished, const Blocks blocks) {
  using A = Compute<T>;
  constexpr bool kCrossEntropy = kCeForm != CrossEntropy::kNone, kSmoothed = kCeForm == CrossEntropy::kSmoothed;
  constexpr int kVoxels = kVoxelsOf<T, kClasses, kCrossEntropy>;
  begin_count(finished);
  const Share share = share_of_block<kOrder>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + kept(share.sample * v.logits.sample_stride);
  constexpr int kColumns = kCrossEntropy ? kAllCounts : kOverlapCounts;
  A counts[count_values<kCeForm, kSquared>(kClasses)] = {};
  // From here on the sum of the weights, or of each label's.
  constexpr int of_weights = kWeights<kCeForm> * kClasses;
  TK_SHARED(memory);
  // Two classes have theirs in registers.
  const LabelSums<A, kCrossEntropy> of_label(reinterpret_cast<A*>(memory), kClasses > 2 ? kClasses : -1);
  A log_sums = A(0);  // of smoothing, the same for every class
  bool bad = false;
  const LabelRow<Reads::kSameSize, kVoxels> target_row(v, kept(share.sample * v.target.sample_stride));
  using Ahead = ClassesAhead<kInterleaved, T, kClasses, kVoxels>;
  const Ahead ahead{memory + few_sum_values<kCeForm, kSquared>(kClasses) * sizeof(A)};
  unsigned char* const label_slots = ahead.slots + Ahead::kBytes;
  const auto expect = [&](int64_t at) {
    if constexpr (few_come_ahead<T>(kClasses)) {
      ahead.expect(rows, v.logits.class_stride, at);
      if (target_row.whole()) target_row.expect(at, label_slots);
    }
  };
  const int offset = static_cast<int>(threadIdx.x) * kVoxels;
  for_each_piece_ahead<kOrder>(share, offset, 0, expect, [&](int64_t at, int64_t next) {
    Logits<T, kVoxels> z[kClasses];
    int labels[kVoxels];
    A weights[kVoxels];
    bool all_known;
    if constexpr (few_come_ahead<T>(kClasses)) {
      wait_for_copies();
      ahead.take(z);
      all_known = target_row.whole() ? target_row.take(label_slots, labels, bad) : target_row.load(at, labels, bad);
      if (next >= 0) expect(next);
    } else {
      load_classes<kInterleaved>(rows, v.logits.class_stride, at, z);
      all_known = target_row.load(at, labels, bad);
    }
    if (!weigh<Reads::kSameSize>(v, share.sample, at, labels, weights, all_known, bad)) clear_uncounted(z, labels);
    A tops[kVoxels];
    if (kClasses > 2) largest_of_thread(z, tops);
    if (kClasses > 2 && !kCrossEntropy && any_huge<T>(tops)) take_off(z, tops);
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      const A weight = weights[k];
      const int label = labels[k];
      if (kCrossEntropy && !kSquared) counts[of_weights] += weight;
      if constexpr (kClasses == 2) {
        const A z0 = z[0].at(k), z1 = z[1].at(k);
        const A d = two_class_logit(z0, z1, larger(z0, z1)), to_other = label == 1 ? -d : d;
        Probability<A> p;  // of the label
        A ce = A(0);
        if constexpr (kCrossEntropy) {
          const A e = exponential(-magnitude(d));
          p = logistic(to_other > A(0), e, reciprocal(A(1) + e));
          const A common = log_one_plus_small(e), term = common + larger(to_other, A(0));
          ce = (kSmoothed ? term : with_focal_factor(v, p.complement, term)) * weight;
          if constexpr (kSmoothed) {
            counts[kSmoothing * kClasses] += (common + larger(d, A(0))) * weight;
            counts[kSmoothing * kClasses + 1] += (common + larger(-d, A(0))) * weight;
          }
        } else {  // nothing to select, and both are as accurate
          p = ratio_to_one(exponential(smaller(to_other, A(kMostExponent))));
        }
        const A right = p.p * weight, missed = error_of<kSquared>(p.complement) * weight;
        if (label == 1) {
          counts[1] += right;
          counts[2] += missed;
          if constexpr (kCrossEntropy) counts[7] += ce;
          if constexpr (kCrossEntropy && kSquared) counts[of_weights + 1] += weight;
        } else {
          counts[0] += right;
          counts[3] += missed;
          if constexpr (kCrossEntropy) counts[6] += ce;
          if constexpr (kCrossEntropy && kSquared) counts[of_weights] += weight;
        }
      } else {
        const A top = tops[k];
        SoftmaxSums<A> sums;
        A others[kClasses], below_top = A(0);
        const A scaled_top = scale_top(top);
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          const A x = z[c].at(k);
          if (kCrossEntropy) below_top = label == c ? top - x : below_top;
          if constexpr (kSmoothed) counts[kSmoothing * kClasses + c] += (top - x) * weight;
          const A e = kCrossEntropy ? exponential(x - top) : exponential_below(x, scaled_top);
          others[c] = sums.add(label == c, label != c, e);
        }
        const A inverse = reciprocal(sums.target + sums.others), weighted = weight * inverse;
        A ce = A(0);
        if (kCrossEntropy) {
          const A log_sum = log_one_plus(exponentials_beyond_one(sums)), term = below_top + log_sum;
          ce = (kSmoothed ? term : with_focal_factor(v, sums.others * inverse, term)) * weight;
          if (kSmoothed) log_sums += log_sum * weight;
        }
        of_label.template add<false>(label, sums.target * weighted, sums.others * weighted, ce, weight);
#pragma unroll
        for (int c = 0; c < kClasses; ++c) counts[kClasses + c] += others[c] * weighted;
      }
    }
  });
  if constexpr (kClasses == 2) {  // the other class's false positives
    counts[4] = counts[3];
    counts[5] = counts[2];
  } else {
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      counts[c] = of_label.tp(c);
      counts[2 * kClasses + c] = of_label.fn(c);
      if constexpr (kCrossEntropy) counts[3 * kClasses + c] = of_label.ce(c);
      if constexpr (kSmoothed) counts[kSmoothing * kClasses + c] += log_sums;
    }
    __syncthreads();  // the memory has been read
  }
  A* out = partial + (share.sample * blocks.programs + share.program) * kColumns * kClasses;
  store_block_sums<A, kClasses, kCeForm, kSquared>(counts, bad, out);
}

// The sums of split kernels, [groups of warps][lanes][kValues] in shared memory.
template <typename A, int kValues>
struct SplitBlockSums {
  A* memory;
  const LaneOfVoxel& lane;

  // From the values of each thread: over the slots of a warp, in a fixed order; NaN where a thread is bad. All threads
  // must call, and synchronise before they read.
  __device__ __forceinline__ void store(A (&values)[kValues], bool bad) const {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = bad ? static_cast<A>(NAN) : values[i];
#pragma unroll 1
    for (int distance = lane.slots / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i] += __shfl_xor_sync(kFullWarp, values[i], distance);
    }
    __syncthreads();  // the memory has been read
    A* mine = memory + ((lane.group() << lane.shape.log_lanes) + lane.place) * kValues;
    if (lane.slot == 0) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) mine[i] = values[i];
    }
  }
  // Value i of the lane at this place, over the groups of warps.
  __device__ __forceinline__ A total(int place, int i) const {
    A sum = A(0);
    for (int group = 0; group < lane.groups(); ++group) {
      sum += memory[((group << lane.shape.log_lanes) + place) * kValues + i];
    }
    return sum;
  }
};

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
  const Share share = share_of_block<kOrder>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  const LabelRow<Reads::kSameSize, kVoxels> target_row(v, share.sample * v.target.sample_stride);
  A fp[kClasses] = {}, smoothing[kClasses] = {}, weight_sum = A(0);
  bool bad = false;
  unsigned char* const tiles = reinterpret_cast<unsigned char*>(of_sums + label_sum_values<kCrossEntropy>(kClasses));
  using Pack = PackOf<T, kClasses, kTurns, kAhead<T, false>, kSmoothed>;
  Pack pack(tiles, v, lane);
  const auto expect = [&](int64_t at) { pack.expect(v, rows, target_row, lane, at); };
  for_each_pack_ahead<kOrder>(share, lane, expect, [&](int64_t at, int64_t next) {
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

  A values[kValues], log_sums = A(0);  // of smoothing, the same for every class; they were summed by label
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

// The counts of a block whose threads have those of each of a lane's classes.
template <int kColumns, typename A, int kClasses>
__device__ __forceinline__ void store_split_sums(const GeneralSums<A> (&counts)[kClasses], bool bad,
                                                 const SplitLane& lane, int classes, A* memory, A* out) {
  A values[kColumns * kClasses];
#pragma unroll
  for (int j = 0; j < kClasses; ++j) {
    const A all[kAllCounts] = {counts[j].tp, counts[j].fp,        counts[j].fn,
                               counts[j].ce, counts[j].smoothing, counts[j].voxels};
#pragma unroll
    for (int i = 0; i < kColumns; ++i) values[i * kClasses + j] = all[i];
  }
  const SplitBlockSums<A, kColumns * kClasses> sums{memory, lane};
  sums.store(values, bad);
  __syncthreads();
  for (int i = threadIdx.x; i < kColumns * classes; i += Plan::kThreads) {
    const int column = i / classes, c = i % classes;
    const ClassOfLane found = lane.find(c, classes);
    out[i] = sums.total(found.place, column * kClasses + found.j);
  }
}

// A target of its own for every class, and all options of a softmax's cross-entropy.
template <typename T, int kClasses, bool kCrossEntropy>
__global__ void __launch_bounds__(Plan::kThreads, kSplitBlocks)
    general_split_count_pass_kernel(const Volume v, Compute<T>* __restrict__ partial, unsigned* finished,
                                    const Blocks blocks, const SplitShape shape) {
  using A = Compute<T>;
  constexpr int kVoxels = kSplitVoxels, kColumns = kCrossEntropy ? kAllCounts : kOverlapCounts;
  const int classes = static_cast<int>(v.classes);
  TK_SHARED(memory);
  const SplitLane lane(shape, classes);
  begin_count(finished);
  const Share share = share_of_block<kOrder>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  GeneralSums<A> counts[kClasses];
  bool bad = false;
  for_each_pack<kOrder>(share, lane, [&](int64_t at) {
    Logits<T, kVoxels> z[kClasses];
    load_split(v, rows, lane, at, z);
    A g[kClasses][kVoxels], weights[kVoxels], below_top[kClasses][kVoxels], beyond_one[kVoxels];
    int labels[kVoxels];
    load_split_targets(v, lane, share.sample, at, g, labels, weights, bad);
    top_of_split<Combine::kLoop>(z, lane, beyond_one, [&](int j, int k, A below, A) { below_top[j][k] = below; });
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      if (labels[k] == kUncounted) continue;
      const A inverse = reciprocal(A(1) + beyond_one[k]);
      const A log_sum = kCrossEntropy ? log_one_plus(beyond_one[k]) : A(0);
#pragma unroll
      for (int j = 0; j < kClasses; ++j) {
        if (!lane.has<kClasses>(j)) continue;
        bad |= is_bad_target(v, g[j][k]);
        const Probability<A> p = dense_probability(below_top[j][k], beyond_one[k], inverse);
        counts[j].template add<kCrossEntropy>(v, p, below_top[j][k] + log_sum, g[j][k], weights[k]);
      }
    }
  });
  A* out = partial + (share.sample * blocks.programs + share.program) * kColumns * classes;
  store_split_sums<kColumns>(counts, bad, lane, classes, lane.beyond_exchange<A>(memory), out);
}

// A target of its own for every class, by products: see Plan::dense.
template <typename T, int kClasses, bool kCrossEntropy>
__global__ void __launch_bounds__(Plan::kThreads, kDenseBlocks<kClasses, false>)
    dense_split_count_pass_kernel(const Volume v, Compute<T>* __restrict__ partial, unsigned* finished,
                                  const Blocks blocks, const SplitShape shape) {
  using A = Compute<T>;
  constexpr int kVoxels = kSplitVoxels, kColumns = kCrossEntropy ? kAllCounts : kOverlapCounts;
  const int classes = static_cast<int>(v.classes);
  TK_SHARED(memory);
  const SplitLane lane(shape, classes);
  begin_count(finished);
  const Share share = share_of_block<kOrder>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  const DenseRows<kVoxels> targets(v, lane, share.sample);
  GeneralSums<A> counts[kClasses];
  A weight_sum = A(0);
  bool bad = false;
  const auto add = [&](int j, A g, A p, A complement) {  // both times the weight
    const Overlap<A> overlap = overlap_of(Probability<A>{p, complement}, g, OverlapForm::kProduct);
    counts[j].tp += overlap.tp;
    counts[j].fp += overlap.fp;
    counts[j].fn += overlap.fn;
  };
  DensePack<T, kClasses, kDenseAhead<T, kClasses, false>> pack(
      reinterpret_cast<unsigned char*>(lane.beyond_exchange<A>(memory)), targets, lane);
  const auto expect = [&](int64_t at) { pack.expect(v, rows, targets, lane, at); };
  for_each_pack_ahead<kOrder>(share, lane, expect, [&](int64_t at, int64_t next) {
    Logits<T, kVoxels> z[kClasses];
    A g[kClasses][kVoxels], weights[kVoxels];
    pack.load(v, rows, targets, lane, share.sample, at, next, z, g, weights, bad);
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) bad |= is_bad_target(v, g[j][k]);  // those that do not count are 0
    }
    if constexpr (kClasses == 2) {
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) {
        const A z0 = z[0].at(k), z1 = z[1].at(k), weight = weights[k];
        const A d = two_class_logit(z0, z1, larger(z0, z1)), e = exponential(-magnitude(d));
        const Probability<A> p = logistic(d < A(0), e, reciprocal(A(1) + e));  // of the second
        const A second = p.p * weight, first = p.complement * weight;
        add(0, g[0][k], first, second);
        add(1, g[1][k], second, first);
        if (kCrossEntropy) {
          const A common = log_one_plus_small(e);
          weight_sum += weight;
          // Without g it may be infinite, and is not wanted.
          if (g[0][k] != A(0)) counts[0].ce += (g[0][k] * weight) * (common + larger(d, A(0)));
          if (g[1][k] != A(0)) counts[1].ce += (g[1][k] * weight) * (common + larger(-d, A(0)));
        }
      }
    } else {
      A e[kClasses][kVoxels], beyond_one[kVoxels];
      top_of_split<Combine::kSteps>(z, lane, beyond_one, [&](int j, int k, A below_top, A exponential_of) {
        e[j][k] = exponential_of;
        // -log p = below_top + log S; without g it may be infinite, and is not wanted.
        if (kCrossEntropy && g[j][k] != A(0)) counts[j].ce += (g[j][k] * weights[k]) * below_top;
      });
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) {
        const A weighted = reciprocal(A(1) + beyond_one[k]) * weights[k];
        const A log_sum = kCrossEntropy ? log_one_plus(beyond_one[k]) * weights[k] : A(0);
        if (kCrossEntropy) weight_sum += weights[k];
#pragma unroll
        for (int j = 0; j < kClasses; ++j) {
          add(j, g[j][k], e[j][k] * weighted, unscaled_complement(e[j][k], beyond_one[k]) * weighted);
          if (kCrossEntropy) counts[j].ce += log_sum * g[j][k];
        }
      }
    }
  });
#pragma unroll
  for (int j = 0; j < kClasses; ++j) counts[j].voxels = weight_sum;
  A* out = partial + (share.sample * blocks.programs + share.program) * kColumns * classes;
  store_split_sums<kColumns>(counts, bad, lane, classes, lane.beyond_exchange<A>(memory), out);
}

// The sums of [halves][values], NaN where something is bad.
template <typename A>
__device__ void store_tile_sums(const A* sums, int halves, int values, bool bad, A* out) {
  for (int i = threadIdx.x; i < values; i += Plan::kThreads) {
    A total = 0;
    for (int half = 0; half < halves; ++half) total += sums[half * values + i];
    out[i] = bad ? static_cast<A>(NAN) : total;
  }
}

// Any number of classes: a tile of voxels of all classes in shared memory, read once.
template <typename T, Activation kActivation, bool kCrossEntropy>
__global__ void __launch_bounds__(Plan::kThreads, 2)
    tiled_count_pass_kernel(const Volume v, Compute<T>* __restrict__ partial, unsigned* finished, const Blocks blocks,
                            int tile_voxels) {
  using A = Compute<T>;
  const int classes = static_cast<int>(v.classes);
  const TileLayout layout(classes, tile_voxels, Plan::kThreads);
  TK_SHARED(memory);
  A* tile = reinterpret_cast<A*>(memory);  // [C][tile_stride]
  constexpr int kColumns = kCrossEntropy ? kAllCounts : kOverlapCounts;
  A* sums = tile + classes * layout.tile_stride;             // [halves][kColumns][C]
  A* reduction = sums + kColumns * classes * layout.halves;  // [2][groups][tile_voxels]
  A* scale = reduction + 2 * layout.groups * tile_voxels;    // [tile_voxels], and so on
  A* right = scale + tile_voxels;
  A* missed = right + tile_voxels;
  A* weights = missed + tile_voxels;
  A* cross_entropy = weights + tile_voxels;
  int* labels = reinterpret_cast<int*>(cross_entropy + tile_voxels);  // [tile_voxels]
  int* any_bad = labels + tile_voxels;

  const int thread = threadIdx.x;
  const TileThread t(layout, tile_voxels);
  begin_count(finished);
  const Share share = share_of_block<kOrder>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  for (int i = thread; i < kColumns * classes * layout.halves; i += Plan::kThreads) sums[i] = A(0);
  if (thread == 0) *any_bad = 0;
  __syncthreads();

  for_each_tile<kOrder>(share, tile_voxels, [&](int64_t begin, int count) {
    load_tile<T>(v, rows, begin, count, tile, layout.tile_stride, tile_voxels);
    if (load_tile_labels(v, share.sample, begin, count, tile_voxels, labels, scale)) *any_bad = 1;
    __syncthreads();
    if (kActivation == Activation::kSoftmax) {
      // The label's logit, before the tile becomes exponentials; group 0 has one thread a voxel.
      A at_label = A(0), top = -INFINITY;
      if (kCrossEntropy && t.group == 0 && labels[t.voxel] != kUncounted) {
        at_label = tile[labels[t.voxel] * layout.tile_stride + t.voxel];
      }
      const SoftmaxSums<A> total = softmax_of_tile(tile, layout, labels, reduction, classes, tile_voxels, t, top);
      if (t.group == 0) {
        const bool counts = labels[t.voxel] != kUncounted;
        const A unweighted = reciprocal(total.target + total.others);
        const A inverse = counts ? scale[t.voxel] * unweighted : A(0);
        if (kCrossEntropy) {
          weights[t.voxel] = counts ? scale[t.voxel] : A(0);
          const A term = (top - at_label) + log_one_plus(exponentials_beyond_one(total));
          const A of_label = with_focal_factor(v, total.others * unweighted, term);
          cross_entropy[t.voxel] = counts ? of_label * scale[t.voxel] : A(0);
        }
        scale[t.voxel] = inverse;
        right[t.voxel] = total.target * inverse;
        missed[t.voxel] = total.others * inverse;
      }
      __syncthreads();
    }
    // A class a thread; where there are threads enough, several share a class's voxels.
    for (int i = thread; i < classes * layout.halves; i += Plan::kThreads) {
      const int c = i % classes, half = i / classes;
      A tp = 0, fp = 0, fn = 0, ce = 0, voxels = 0;
      for (int k = half; k < count; k += layout.halves) {
        const int label = labels[k];
        if (kCrossEntropy) ce += label == c ? cross_entropy[k] : A(0);
        if (kCrossEntropy) voxels += weights[k];
        const A x = tile[c * layout.tile_stride + k];
        if (kActivation == Activation::kSoftmax) {
          fp += x * scale[k];
          tp += label == c ? right[k] : A(0);
          fn += label == c ? missed[k] : A(0);
        } else if (label != kUncounted) {
          Probability<A> p{x, A(1) - x};
          if (kActivation == Activation::kSigmoid) {
            const A e = exponential(x < A(0) ? x : -x);
            p = logistic(x < A(0), e, reciprocal(A(1) + e));
          }
          const bool is_target = label == c + v.first_label;
          tp += is_target ? p.p * scale[k] : A(0);
          fp += is_target ? A(0) : p.p * scale[k];
          fn += is_target ? p.complement * scale[k] : A(0);
        }
      }
      A* mine = sums + half * kColumns * classes + c;
      mine[kTp * classes] += tp;
      mine[kFp * classes] += fp;
      mine[kFn * classes] += fn;
      if (kCrossEntropy) mine[kCe * classes] += ce;
      if (kCrossEntropy) mine[kVoxels * classes] += voxels;
    }
  });
  A* out = partial + (share.sample * blocks.programs + share.program) * kColumns * classes;
  store_tile_sums(sums, layout.halves, kColumns * classes, *any_bad, out);
}

// Every class of a voxel with a target of its own, and all options of the cross-entropy.
template <typename T, Activation kActivation>
__global__ void __launch_bounds__(Plan::kThreads, 2)
    general_count_pass_kernel(const Volume v, Compute<T>* __restrict__ partial, unsigned* finished, const Blocks blocks,
                              int tile_voxels) {
  using A = Compute<T>;
  const int classes = static_cast<int>(v.classes), columns = v.count_columns();
  const bool cross_entropy = v.cross_entropy != CrossEntropy::kNone;
  const TileLayout layout(classes, tile_voxels, Plan::kThreads);
  TK_SHARED(memory);
  A* tile = reinterpret_cast<A*>(memory);                    // [C][tile_stride]
  A* targets = tile + classes * layout.tile_stride;          // [C][tile_stride]
  A* sums = targets + classes * layout.tile_stride;          // [halves][columns][C]
  A* reduction = sums + columns * classes * layout.halves;   // [2][groups][tile_voxels]
  A* weights = reduction + 2 * layout.groups * tile_voxels;  // [tile_voxels], and so on
  A* beyond_one = weights + tile_voxels;
  A* log_sum = beyond_one + tile_voxels;
  int* labels = reinterpret_cast<int*>(log_sum + tile_voxels);  // [tile_voxels]
  int* any_bad = labels + tile_voxels;

  const int thread = threadIdx.x;
  const TileThread t(layout, tile_voxels);
  begin_count(finished);
  const Share share = share_of_block<kOrder>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  for (int i = thread; i < columns * classes * layout.halves; i += Plan::kThreads) sums[i] = A(0);
  if (thread == 0) *any_bad = 0;
  __syncthreads();

  for_each_tile<kOrder>(share, tile_voxels, [&](int64_t begin, int count) {
    if (load_general_tile<T>(v, rows, share.sample, begin, count, tile, targets, layout.tile_stride, tile_voxels,
                             labels, weights)) {
      *any_bad = 1;
    }
    if (kActivation == Activation::kSoftmax) {
      const TopSums<A> total = top_of_tile(tile, layout, reduction, classes, tile_voxels, t);
      if (t.group == 0) {
        beyond_one[t.voxel] = total.beyond_one();
        if (cross_entropy) log_sum[t.voxel] = log_one_plus(total.beyond_one());
      }
      __syncthreads();
    }
    bool bad = false;
    for (int i = thread; i < classes * layout.halves; i += Plan::kThreads) {
      const int c = i % classes, half = i / classes;
      GeneralSums<A> of_class;
      for (int k = half; k < count; k += layout.halves) {
        if (labels[k] == kUncounted) continue;
        const A x = tile[c * layout.tile_stride + k], g = targets[c * layout.tile_stride + k];
        bad |= is_bad_target(v, g);
        if constexpr (kActivation == Activation::kSoftmax) {
          const Probability<A> p = dense_probability(x, beyond_one[k], reciprocal(A(1) + beyond_one[k]));
          if (cross_entropy) {
            of_class.template add<true>(v, p, x + log_sum[k], g, weights[k]);
          } else {
            of_class.template add<false>(v, p, A(0), g, weights[k]);
          }
        } else {
          of_class.template add_channel<kActivation>(v, x, g, weights[k]);
        }
      }
      A* mine = sums + half * columns * classes + c;
      mine[kTp * classes] += of_class.tp;
      mine[kFp * classes] += of_class.fp;
      mine[kFn * classes] += of_class.fn;
      if (cross_entropy) mine[kCe * classes] += of_class.ce;
      if (cross_entropy) mine[kSmoothing * classes] += of_class.smoothing;
      if (cross_entropy) mine[kVoxels * classes] += of_class.voxels;
    }
    if (bad) *any_bad = 1;
  });
  A* out = partial + (share.sample * blocks.programs + share.program) * columns * classes;
  store_tile_sums(sums, layout.halves, columns * classes, *any_bad, out);
}

// Channels by themselves, with any target: a block takes one channel, its threads kVoxels voxels at once.
template <typename T, Activation kActivation>
__global__ void __launch_bounds__(Plan::kThreads, kChannelBlocks<T>)
    channel_count_pass_kernel(const Volume v, Compute<T>* __restrict__ partial, unsigned* finished,
                              const Blocks blocks) {
  using A = Compute<T>;
  constexpr int kVoxels = kChannelVoxels<T>, kPacks = kVoxels / kPack<T>;
  const int classes = static_cast<int>(v.classes), columns = v.count_columns();
  begin_count(finished);
  const ChannelShare of_channel = channel_share_of_block<kOrder>(v, blocks);
  const Share share = of_channel.share;
  const int64_t channel = of_channel.channel;
  const T* row =
      static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride + channel * v.logits.class_stride;
  GeneralSums<A> sums;
  bool bad = false, outside = false;  // outside: asked for once at the end, or ptxas spills a register
  const bool plain = has_plain_channels(v);
  for_each_own<kOrder, kVoxels>(share, [&](int64_t at) {
    Logits<T, kPack<T>> packs[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs[i] = load_logits<T, kPack<T>>(row + at + i * kPack<T>);
    const auto z = [&](int k) { return packs[k / kPack<T>].at(k % kPack<T>); };
    A g[kVoxels], weights[kVoxels];
    int labels[kVoxels];
    const bool all_count = load_channel(v, share.sample, channel, at, g, labels, weights, bad);
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) outside |= labels[k] != kUncounted && is_outside(g[k]);
    if constexpr (kMayBePlain<kActivation, A>) {
      if (plain && all_count && are_plain(z, g, v.focal_gamma != 0)) {
        add_plain_channel(v, z, g, sums);
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      if (labels[k] == kUncounted) continue;
      sums.template add_channel<kActivation>(v, z(k), g[k], weights[k]);
    }
  });
  bad |= outside && v.checks_targets;
  A values[kAllCounts] = {sums.tp, sums.fp, sums.fn, sums.ce, sums.smoothing, sums.voxels};
  A* out = partial + (share.sample * blocks.programs + share.program) * columns * classes + channel;
  block_sums(values, bad, [&](int i, A total) {
    if (i < columns) out[i * classes] = total;
  });
}

struct CountPass {
  const Volume& v;
  const Plan& plan;
  void* partial;
  unsigned* finished;
  cudaStream_t stream;

  template <typename T, int kClasses, CrossEntropy kCeForm, bool kSquared, bool kInterleaved>
  void few() const {
    launch<T>(count_pass_kernel<T, kClasses, kCeForm, kSquared, kInterleaved>);
  }
  template <typename T, int kClasses, CrossEntropy kCeForm, bool kSquared, int kTurns>
  void split() const {
    launch<T>(split_count_pass_kernel<T, kClasses, kCeForm, kSquared, kTurns>, plan.shape());
  }
  template <typename T, int kClasses, bool kCrossEntropy>
  void general_split() const {
    launch<T>(general_split_count_pass_kernel<T, kClasses, kCrossEntropy>, plan.shape());
  }
  template <typename T, int kClasses, bool kCrossEntropy>
  void dense_split() const {
    launch<T>(dense_split_count_pass_kernel<T, kClasses, kCrossEntropy>, plan.shape());
  }
  template <typename T, Activation kActivation, bool kCrossEntropy>
  void channel() const {
    launch<T>(channel_count_pass_kernel<T, kActivation>);
  }
  template <typename T, Activation kActivation, bool kCrossEntropy>
  void general() const {
    launch<T>(general_count_pass_kernel<T, kActivation>, plan.voxels);
  }
  template <typename T, Activation kActivation, bool kCrossEntropy>
  void tiled() const {
    launch<T>(tiled_count_pass_kernel<T, kActivation, kCrossEntropy>, plan.voxels);
  }

 private:
  template <typename T, typename Kernel, typename... More>
  void launch(Kernel kernel, More... more) const {
    allow_shared_bytes(kernel, plan.shared_bytes);
    TK_LAUNCH((kernel), grid_of(v, plan), dim3(Plan::kThreads), plan.shared_bytes, stream, v,
              static_cast<Compute<T>*>(partial), finished, plan.blocks, more...);
  }
};

}  // namespace

void launch_count_pass(const Volume& v, const Plan& plan, void* partial, unsigned* finished, cudaStream_t stream) {
  with_kernel(v, plan, CountPass{v, plan, partial, finished, stream});
}

}  // namespace cuda
}  // namespace tversky_kernels
