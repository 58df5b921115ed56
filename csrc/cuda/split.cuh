// The classes of a voxel split over lanes, each with up to kClasses of them in its registers.
//
// Lane l of a warp works on the voxels of slot l % slots, a pack of them at once: neighbouring lanes take neighbouring
// packs, so that a warp reads `slots` packs of a class at once. These are whole lines of memory: where more lanes are
// needed, neighbouring warps share the voxels, and combine their maxima and sums through shared memory
// between them. Lane q of all that share a voxel works on classes q + j * lanes, j = 0, 1, ...
#pragma once

#include "launch.h"
#include "own_targets.cuh"
#include "voxels.cuh"

namespace tversky_kernels {
namespace cuda {

// Limits of kernels that split a voxel's classes over lanes. Blocks of a multiprocessor (they bound the registers) and
// voxels that a lane works on at a time; then the most lanes and the most classes of a lane, where a label is the
// target and where every class has a target of its own.
constexpr int kSplitBlocks = 2, kSplitVoxels = 4;
// Whether the next voxels are copied to shared memory while the warp works on these. The gradient pass of float32 waits
// for memory anyway; it was slower with the copies.
template <typename T, bool kGradient>
constexpr bool kAhead = !kGradient || sizeof(T) == 2;
// Lanes of a warp that share a voxel; more are in several warps. So a warp reads a class's voxels in pieces of 128
// bytes (64 in half precision): in smaller ones memory comes at half its speed.
constexpr int kMostLanesOfWarp = 4;
// Warps that share voxels exchange values in the first floats of the shared memory. Each exchange has its own place,
// [warps of the block][values of each voxel], so that the next exchange may begin while a warp still reads the values
// of this one.
struct ExchangePlace {
  int start, of_warp;
};
constexpr int kExchangedVoxels = kSplitVoxels * kWarp / kMostLanesOfWarp;  // of a warp
constexpr ExchangePlace place_after(const ExchangePlace& before, int values) {
  return {before.start + Plan::kThreads / kWarp * before.of_warp, values * kExchangedVoxels};
}
constexpr ExchangePlace kDiffers = place_after({0, 0}, 1), kTops = place_after(kDiffers, 1);
constexpr ExchangePlace kTopSums = place_after(kTops, 2), kSums = place_after(kTopSums, 3);
constexpr int kExchange = place_after(kSums, 0).start;

// Lanes that share a voxel: as few as possible. 0: there are too many classes.
inline int split_lanes(int64_t classes, int most_lanes, int most_of_lane) {
  int lanes = 1;
  while (lanes <= most_lanes && classes > lanes * most_of_lane) lanes *= 2;
  return lanes <= most_lanes ? lanes : 0;
}

// The lanes that share a voxel and the warps that these are in, as logarithms.
struct SplitShape {
  int log_lanes;
  int log_warps;

  static int log2(int power) { return power > 1 ? 1 + log2(power / 2) : 0; }
  explicit SplitShape(const Plan& plan) : log_lanes(log2(plan.lanes)), log_warps(log2(plan.warps)) {}
};

// Sets a plan's warps from its lanes, and adds the exchange's values to `values`, those of its shared memory.
inline void share_over_warps(Plan& plan, int64_t& values) {
  plan.warps = plan.lanes > kMostLanesOfWarp ? plan.lanes / kMostLanesOfWarp : 1;
  if (plan.warps > 1) values += kExchange;
}

// One of the lanes that share a voxel.
struct LaneOfVoxel {
  const SplitShape& shape;
  int slots;  // packs of voxels that a warp takes at once
  int slot;   // of this lane
  int place;  // which of the lanes that share its voxels this is

  __device__ __forceinline__ explicit LaneOfVoxel(const SplitShape& shape_) : shape(shape_) {
    const int thread = static_cast<int>(threadIdx.x), log_of_warp = shape.log_lanes - shape.log_warps;
    slots = kWarp >> log_of_warp;
    slot = thread & (slots - 1);
    place = ((thread / kWarp & (warps() - 1)) << log_of_warp) + (thread % kWarp >> (5 - log_of_warp));
  }

  __device__ __forceinline__ int lanes() const { return 1 << shape.log_lanes; }
  __device__ __forceinline__ int warps() const { return 1 << shape.log_warps; }
  // Which of the block's groups of warps that share voxels, and how many there are.
  __device__ __forceinline__ int group() const { return static_cast<int>(threadIdx.x) / kWarp >> shape.log_warps; }
  __device__ __forceinline__ int groups() const { return Plan::kThreads / kWarp >> shape.log_warps; }
  // The shared memory that is not for over_warps.
  template <typename X>
  __device__ __forceinline__ X* beyond_exchange(unsigned char* memory) const {
    return reinterpret_cast<X*>(reinterpret_cast<float*>(memory) + (shape.log_warps > 0 ? kExchange : 0));
  }
};

// Class j of a lane, and the place of the lane.
struct ClassOfLane {
  int place, j;
};

// Where the voxels of a class lie side by side; where the classes of a voxel do, it is TileLane (interleaved.cuh).
struct SplitLane : LaneOfVoxel {
  static constexpr bool kKnowsOwner = true;  // there is owner()

  int first_class;  // of this lane; the next ones are `lanes` apart
  int own;          // how many they are

  __device__ __forceinline__ SplitLane(const SplitShape& shape_, int classes)
      : LaneOfVoxel(shape_), first_class(place), own((classes - place + lanes() - 1) >> shape_.log_lanes) {}

  __device__ __forceinline__ int class_of(int j) const { return first_class + (j << shape.log_lanes); }
  __device__ __forceinline__ ClassOfLane find(int c, int) const { return {c & (lanes() - 1), c >> shape.log_lanes}; }
  // Whether class_of(j) exists, of at most kClasses. with_split_classes takes kClasses so that only the last two may
  // not; and where it is two, there are two.
  template <int kClasses>
  __device__ __forceinline__ bool has(int j) const {
    return kClasses == 2 || j < kClasses - 2 || j < own;
  }
  // Which of this lane's classes the label is, -1 where none.
  __device__ __forceinline__ int index_of(int label) const {
    return (label & (lanes() - 1)) == first_class ? label >> shape.log_lanes : -1;
  }
  // The lane of this lane's voxels that has the label's class, if one of this warp has.
  __device__ __forceinline__ int owner(int label) const {
    const int lanes_of_warp = 1 << (shape.log_lanes - shape.log_warps);  // kWarp / slots without a division
    return (label & (lanes_of_warp - 1)) * slots + slot;
  }
};

// Combines a warp's values with those of the other warps that share its voxels. The values are the same in all lanes of
// a slot before, and in all warps after. kPlace: the place of this exchange, not that of the exchange before.
template <const ExchangePlace& kPlace, int kValues, typename F>
__device__ __forceinline__ void over_warps(float (&values)[kValues], const LaneOfVoxel& lane, F&& combine) {
  constexpr int kWord = kValues % 4 == 0   ? 4
                        : kValues % 2 == 0 ? 2
                                           : 1,
                kWords = kValues / kWord, kSlots = kWarp / kMostLanesOfWarp;
  static_assert(kValues % kWord == 0 && kValues * kSlots <= kPlace.of_warp, "they fit");
  const int log_warps = lane.shape.log_warps;
  if (log_warps == 0) return;
  TK_SHARED(memory);
  // Computed again at every call, to save registers.
  const int thread = recomputed(static_cast<int>(threadIdx.x)), warp = thread / kWarp, q = thread % kWarp / kSlots;
  float* const of_slot = reinterpret_cast<float*>(memory) + kPlace.start + thread % kSlots * kWord;
  if (q == 0) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      Packed<float, kWord> word;
#pragma unroll
      for (int k = 0; k < kWord; ++k) word.values[k] = values[i * kWord + k];
      store_shared(of_slot + warp * kPlace.of_warp + i * kSlots * kWord, word);
    }
  }
  synchronise_warps(1 + (warp >> log_warps), kWarp << log_warps);
  // Each lane of a slot reads the value of another warp; then the lanes combine them.
  const int warps = 1 << log_warps;
  const float* from = of_slot + ((warp & ~(warps - 1)) + (q & (warps - 1))) * kPlace.of_warp;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const auto word = load_packed<float, kWord>(from + i * kSlots * kWord);
#pragma unroll
    for (int k = 0; k < kWord; ++k) values[i * kWord + k] = word.values[k];
  }
  if (warps > kMostLanesOfWarp) {
    static_assert(Plan::kThreads / kWarp == 2 * kMostLanesOfWarp, "all warps of a block, at the most");
    from += kMostLanesOfWarp * kPlace.of_warp;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const auto word = load_packed<float, kWord>(from + i * kSlots * kWord);
#pragma unroll
      for (int k = 0; k < kWord; ++k) values[i * kWord + k] = combine(values[i * kWord + k], word.values[k]);
    }
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = combine(values[i], __shfl_xor_sync(kFullWarp, values[i], kSlots));
  if (warps > 2) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = combine(values[i], __shfl_xor_sync(kFullWarp, values[i], 2 * kSlots));
  }
}

// How the lanes of a warp that share a voxel combine their values: in one or two steps, or in a loop, which needs fewer
// registers.
enum class Combine { kSteps, kLoop };

// Combines the first kCombined values over the lanes of a warp that share a voxel. All these lanes get the result.
template <Combine kWay, int kCombined, int kValues, typename F>
__device__ __forceinline__ void over_lanes_of_warp(float (&values)[kValues], const LaneOfVoxel& lane, F&& combine) {
  const auto with_lane = [&](int distance) {
#pragma unroll
    for (int i = 0; i < kCombined; ++i) {
      values[i] = combine(values[i], __shfl_xor_sync(kFullWarp, values[i], distance));
    }
  };
  static_assert(kMostLanesOfWarp == 4, "two steps");
  const int log_of_warp = lane.shape.log_lanes - lane.shape.log_warps;
  if constexpr (kWay == Combine::kLoop) {
#pragma unroll 1
    for (int distance = kWarp / 2; distance >= lane.slots; distance /= 2) with_lane(distance);
  } else if (log_of_warp > 0) {
    with_lane(kWarp / 2);
    if (log_of_warp > 1) with_lane(kWarp / 4);
  }
}

// The maximum over the lanes that share a voxel. All these lanes get it. kPlace: see over_warps.
template <const ExchangePlace& kPlace, Combine kWay, int kValues>
__device__ __forceinline__ void max_over_lanes(float (&values)[kValues], const LaneOfVoxel& lane) {
  const auto combine = [](float a, float b) { return larger(a, b); };
  over_lanes_of_warp<kWay, kValues>(values, lane, combine);
  over_warps<kPlace>(values, lane, combine);
}

// The sums over the lanes that share a voxel, always in the same order. All these lanes get them. The last kOfWarp
// values are the same in all lanes of a warp: of these only the warps' values are added.
template <const ExchangePlace& kPlace, Combine kWay, int kOfWarp = 0, int kValues>
__device__ __forceinline__ void sum_over_lanes(float (&values)[kValues], const LaneOfVoxel& lane) {
  const auto combine = [](float a, float b) { return a + b; };
  over_lanes_of_warp<kWay, kValues - kOfWarp>(values, lane, combine);
  over_warps<kPlace>(values, lane, combine);
}

// Calls f(j, row) for the classes of a lane. row: the logits of its voxels from `at` on.
template <int kClasses, typename T, typename F>
__device__ __forceinline__ void for_each_row(const Volume& v, const T* rows, const SplitLane& lane, int64_t at, F&& f) {
  const T* row = rows + lane.first_class * v.logits.class_stride + at;
  const int64_t step = v.logits.class_stride << lane.shape.log_lanes;
#pragma unroll
  for (int j = 0; j < kClasses; ++j, row += step) {
    if (lane.has<kClasses>(j)) f(j, row);
  }
}

// The logits of a class that a lane does not have.
template <typename T, int kVoxels>
__device__ __forceinline__ void fill_without_class(Logits<T, kVoxels>& z) {
  T values[kVoxels];
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) values[k] = static_cast<T>(-INFINITY);
  z = logits_of(values);
}

// A lane's logits of its voxels from `at` on; -inf where there is no such class. Lanes beyond the last voxel read other
// voxels.
template <typename T, int kClasses, int kVoxels>
__device__ __forceinline__ void load_split(const Volume& v, const T* rows, const SplitLane& lane, int64_t at,
                                           Logits<T, kVoxels> (&z)[kClasses]) {
#pragma unroll
  for (int j = 0; j < kClasses; ++j) {
    if (!lane.has<kClasses>(j)) fill_without_class(z[j]);
  }
  for_each_row<kClasses>(v, rows, lane, at < v.voxels ? at : 0,
                         [&](int j, const T* row) { z[j] = load_logits<T, kVoxels>(row); });
}

// The gradient of a lane's logits, to the places where load_split has read them.
template <typename T, int kClasses, int kVoxels>
__device__ __forceinline__ void store_split(const Volume& v, const GradientView& out, int64_t sample,
                                            const SplitLane& lane, int64_t at,
                                            const Packed<T, kVoxels> (&dz)[kClasses]) {
  if (at >= v.voxels) return;
  T* row = static_cast<T*>(out.data) + sample * out.sample_stride + lane.first_class * out.class_stride + at;
  const int64_t step = out.class_stride << lane.shape.log_lanes;
#pragma unroll
  for (int j = 0; j < kClasses; ++j, row += step) {
    if (lane.has<kClasses>(j)) store_packed(row, dz[j]);
  }
}

// Calls f(at) for the packs of each lane in the block's share, kSplitVoxels voxels from `at` on. The lanes of all warps
// that share voxels go together, also where some are beyond the last voxel.
template <Order kOrder, typename F>
__device__ __forceinline__ void for_each_pack(const Share& share, const LaneOfVoxel& lane, F&& f) {
  const int of_group = lane.slots * kSplitVoxels;
  for_each_piece<kOrder>(share, lane.group() * of_group, [&](int64_t first) { f(first + lane.slot * kSplitVoxels); });
}

// The same with f(at, next). next: where the lane's next pack begins; -1: there is none. Calls expect(at) once before,
// with the first pack.
template <Order kOrder, typename E, typename F>
__device__ __forceinline__ void for_each_pack_ahead(const Share& share, const LaneOfVoxel& lane, E&& expect, F&& f) {
  const int of_group = lane.slots * kSplitVoxels;
  for_each_piece_ahead<kOrder>(share, lane.group() * of_group, lane.slot * kSplitVoxels, expect, f);
}

// The labels of a lane's voxels, kUncounted beyond the last one. True: all are classes.
template <Reads kReads, int kVoxels>
__device__ __forceinline__ bool load_split_labels(const Volume& v, const LabelRow<kReads, kVoxels>& row, int64_t at,
                                                  int (&labels)[kVoxels], bool& bad) {
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) labels[k] = kUncounted;
  return at < v.voxels && row.load(at, labels, bad);
}
// The same from the slots to which the labels were copied ahead, if they were.
template <int kVoxels>
__device__ __forceinline__ bool take_split_labels(const Volume& v, const LabelRow<Reads::kSameSize, kVoxels>& row,
                                                  unsigned char* slots, int64_t at, int (&labels)[kVoxels], bool& bad) {
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) labels[k] = kUncounted;
  if (at >= v.voxels) return false;
  return row.whole() ? row.take(slots, labels, bad) : row.load(at, labels, bad);
}

// How a pack's load treats the labels' logits: it does not return them (kUntold); it returns them, and they stay
// (kStay); or it takes them out and leaves -inf, so that no class is compared with the label (kTaken).
enum class Targets { kUntold, kStay, kTaken };

// The logits of the labels' classes that this lane has; -inf for the others. place(label, k) is the address of voxel
// k's. For a class of another lane it is an address of this thread that holds -inf: a branch would cost more.
template <Targets kTargets, typename A, int kVoxels, typename F>
__device__ __forceinline__ void take_targets(const int (&labels)[kVoxels], A (&of_target)[kVoxels], F&& place) {
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
    auto* const z = place(labels[k], k);
    of_target[k] = static_cast<A>(*z);
    if (kTargets == Targets::kTaken) *z = static_cast<std::remove_reference_t<decltype(*z)>>(-INFINITY);
  }
  asm volatile("" : : : "memory");  // they are read next in words of another type
}

// A lane's pack of logits, which it reads, and of gradients, which it writes voxel by voxel. kAhead: the next pack and
// its labels are copied to the thread's own place in shared memory while the thread works on this one.
template <typename T, int kClasses, bool kAhead, bool kKeepsTargets>
struct PackInRegisters {
  using A = Compute<T>;
  using Labels = LabelRow<Reads::kSameSize, kSplitVoxels>;
  static constexpr Targets kTargets = !kAhead ? Targets::kUntold : kKeepsTargets ? Targets::kStay : Targets::kTaken;
  static constexpr bool kPutsTargets = false;  // put writes them in the place of the others

  T* slots;  // [classes + 1][threads] packs, the first for no class; then the labels' slots
  Logits<T, kSplitVoxels> z[kClasses];
  Packed<T, kSplitVoxels> dz[kClasses];

  __device__ __forceinline__ PackInRegisters(unsigned char* memory, const Volume&, const SplitLane& lane)
      : slots(reinterpret_cast<T*>(memory)) {
    if constexpr (kAhead) {
      Logits<T, kSplitVoxels> none;
      fill_without_class(none);
#pragma unroll
      for (int j = -1; j < kClasses; ++j) {  // for a class that does not exist, once for the whole pass
        if (j < 0 || !lane.has<kClasses>(j)) memcpy(slot(j), none.elements, sizeof none.elements);
      }
    }
  }
  // Called before load, with the voxels that it will load. Lanes beyond the last voxel read other voxels.
  __device__ __forceinline__ void expect(const Volume& v, const T* rows, const Labels& labels, const SplitLane& lane,
                                         int64_t at) const {
    if constexpr (kAhead) {
      const int64_t inside = at < v.voxels ? at : 0;
      for_each_row<kClasses>(v, rows, lane, inside, [&](int j, const T* row) {
        begin_copy<static_cast<int>(sizeof(T)) * kSplitVoxels, false>(slot(j), row);
      });
      if (labels.whole()) labels.expect(inside, label_slots());
    }
  }
  // next: the pack to copy ahead; -1: none. True: all labels are classes.
  __device__ __forceinline__ bool load(const Volume& v, const T* rows, const Labels& row, const SplitLane& lane,
                                       int64_t at, int64_t next, int (&labels)[kSplitVoxels],
                                       A (&of_target)[kSplitVoxels], bool& bad) {
    if constexpr (!kAhead) {
      load_split(v, rows, lane, at, z);
      return load_split_labels(v, row, at, labels, bad);
    } else {
      wait_for_copies();
      const bool all_known = take_split_labels(v, row, label_slots(), at, labels, bad);
      take_targets<kTargets>(labels, of_target, [&](int label, int k) { return slot(lane.index_of(label)) + k; });
#pragma unroll
      for (int j = 0; j < kClasses; ++j) z[j] = load_logits<T, kSplitVoxels>(slot(j));
      if (next >= 0) expect(v, rows, row, lane, next);
      return all_known;
    }
  }
  __device__ __forceinline__ void release(const SplitLane&) {}
  __device__ __forceinline__ void take(const SplitLane&, Logits<T, kSplitVoxels> (&logits)[kClasses]) const {
#pragma unroll
    for (int j = 0; j < kClasses; ++j) logits[j] = z[j];
  }
  __device__ __forceinline__ void put(const Packed<T, kSplitVoxels> (&gradient)[kClasses], int k, const SplitLane&) {
#pragma unroll
    for (int j = 0; j < kClasses; ++j) dz[j].values[k] = gradient[j].values[k];
  }
  __device__ __forceinline__ void put_targets(const T (&)[kSplitVoxels], const int (&)[kSplitVoxels],
                                              const SplitLane&) const {}
  __device__ __forceinline__ void store(const Volume& v, const GradientView& out, int64_t sample, const SplitLane& lane,
                                        int64_t at) const {
    store_split(v, out, sample, lane, at, dz);
  }

 private:
  __device__ __forceinline__ T* slot(int j) const {
    return slots + ((j + 1) * Plan::kThreads + static_cast<int>(threadIdx.x)) * kSplitVoxels;
  }
  __device__ __forceinline__ unsigned char* label_slots() const {
    return reinterpret_cast<unsigned char*>(slots + (kClasses + 1) * Plan::kThreads * kSplitVoxels);
  }
};

// As weigh, also for voxels beyond the last one.
template <Reads kReads, typename A, int kVoxels>
__device__ __forceinline__ bool weigh_split(const Volume& v, int64_t sample, int64_t at, int (&labels)[kVoxels],
                                            A (&weights)[kVoxels], bool all_count, bool& bad) {
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) weights[k] = A(0);
  return at < v.voxels && weigh<kReads>(v, sample, at, labels, weights, all_count, bad);
}

// The logits of a pack that starts at `at` (0 where a voxel does not count) and its weights. Changes the labels and
// of_target (see take_targets) of voxels that do not count. all_known: as load returned it.
template <Reads kReads, typename A, typename T, int kClasses, int kVoxels, typename Pack, typename Lane>
__device__ __forceinline__ void weighed_pack(const Volume& v, const Lane& lane, int64_t sample, int64_t at,
                                             const Pack& pack, int (&labels)[kVoxels], bool all_known,
                                             Logits<T, kVoxels> (&z)[kClasses], A (&of_target)[kVoxels],
                                             A (&weights)[kVoxels], bool& bad) {
  pack.take(lane, z);
  if (weigh_split<kReads>(v, sample, at, labels, weights, all_known, bad)) return;
  clear_uncounted(z, labels);
  if constexpr (Pack::kTargets != Targets::kUntold) {
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) of_target[k] = labels[k] == kUncounted ? -INFINITY : of_target[k];
  }
}

// Softmax of a lane's classes of its voxels. others: exponentials over the voxel's largest one, 0 at the target. sums:
// `others` only over this lane's classes, the target's in all lanes of the warp that has it, or (a lane that does not
// know the owner) in the owner alone.
// of_target: as load makes it. kExact: the largest exponential is 1, not only nearly; see(j, k, z_top - z) is called
// for each class; and of_target becomes z_top - z_target in the lane that has the target.
template <bool kExact, Targets kTargets, typename A, typename T, int kClasses, int kVoxels, typename Lane, typename F>
__device__ __forceinline__ void softmax_of_split(Logits<T, kVoxels> (&z)[kClasses], const int (&labels)[kVoxels],
                                                 A (&of_target)[kVoxels], const Lane& lane,
                                                 A (&others)[kClasses][kVoxels], SoftmaxSums<A> (&sums)[kVoxels],
                                                 F&& see) {
  constexpr bool kTold = kTargets != Targets::kUntold;
  static_assert(kTold || !kExact, "of_target is known");
  A top[kVoxels];
  largest_of_thread(z, top);
  if constexpr (kTargets == Targets::kTaken) {
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) top[k] = larger(top[k], of_target[k]);
  }
  max_over_lanes<kTops, Combine::kSteps>(top, lane);
  if (!kExact && any_huge<T>(top)) {
    if constexpr (kTold) {
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) of_target[k] -= top[k];
    }
    take_off(z, top);
  }
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
    const A scaled_top = scale_top(top[k]);
    const auto exponential_of = [&](A x) {
      return kExact ? exponential(x - top[k]) : exponential_below(x, scaled_top);
    };
    const int target = lane.index_of(labels[k]);
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      const A x = z[j].at(k), e = exponential_of(x);
      if (kExact) see(j, k, top[k] - x);
      if constexpr (kTold) {
        others[j][k] = kTargets == Targets::kStay && target == j ? A(0) : e;
        sums[k].others = j == 0 ? others[j][k] : sums[k].others + others[j][k];
      } else {
        others[j][k] = sums[k].add(target == j, target != j, e);
      }
    }
    if constexpr (kTold) {
      sums[k].target = exponential_of(of_target[k]);
      if (kExact) of_target[k] = top[k] - of_target[k];
    }
    if constexpr (Lane::kKnowsOwner) {
      sums[k].target = __shfl_sync(kFullWarp, sums[k].target, lane.owner(labels[k]));
    }
  }
}

// ---- A target of its own for every class (Volume::is_general)

// The targets of a lane's classes in a dense target, 0 where there is no such class.
template <typename X, typename A, int kClasses, int kVoxels>
__device__ __forceinline__ void load_dense_of(const Volume& v, const SplitLane& lane, int64_t sample, int64_t at,
                                              A (&g)[kClasses][kVoxels]) {
  const int64_t step = v.target.class_stride << lane.shape.log_lanes, stride = v.target.voxel_stride;
  const X* row =
      static_cast<const X*>(v.target.data) + sample * v.target.sample_stride + lane.first_class * v.target.class_stride;
  const bool resampled = v.target.resampling.active;
  int64_t offsets[kVoxels] = {};
  if (resampled) source_offsets<Reads::kResampled>(v.target.resampling, at, offsets);
#pragma unroll
  for (int j = 0; j < kClasses; ++j, row += step) {
    const auto set = [&](int k, X value) { g[j][k] = to_compute<A>(value); };
    if (!lane.has<kClasses>(j)) {
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) g[j][k] = A(0);
    } else if (resampled) {
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) set(k, row[offsets[k]]);
    } else {
      load_row<X, kVoxels>(row, at, stride, set);
    }
  }
}

// A voxel whose target holds the ignored value in every class does not count. All lanes of the warp must call.
template <typename A, int kClasses, int kVoxels>
__device__ __forceinline__ void leave_out_ignored(const Volume& v, const SplitLane& lane,
                                                  const A (&g)[kClasses][kVoxels], int (&labels)[kVoxels]) {
  A differs[kVoxels];
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
    differs[k] = A(0);
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      if (lane.has<kClasses>(j) && g[j][k] != static_cast<A>(v.ignore_index)) differs[k] = A(1);
    }
  }
  max_over_lanes<kDiffers, Combine::kLoop>(differs, lane);
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) labels[k] = differs[k] == A(0) ? kUncounted : labels[k];
}

// The targets of a lane's classes, labels (only kUncounted means something) and weights of its voxels. All lanes of the
// warp must call.
template <typename A, int kClasses, int kVoxels>
__device__ __forceinline__ void load_split_targets(const Volume& v, const SplitLane& lane, int64_t sample, int64_t at,
                                                   A (&g)[kClasses][kVoxels], int (&labels)[kVoxels],
                                                   A (&weights)[kVoxels], bool& bad) {
  if (!v.dense) {
    const LabelRow<Reads::kResampled, kVoxels> row(v, sample * v.target.sample_stride);
    const bool all_known = load_split_labels(v, row, at, labels, bad);
    weigh_split<Reads::kResampled>(v, sample, at, labels, weights, all_known, bad);
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      const int target = lane.index_of(labels[k]);
#pragma unroll
      for (int j = 0; j < kClasses; ++j) g[j][k] = target == j ? A(1) : A(0);
    }
    return;
  }
  const bool inside = at < v.voxels;
  with_element_type(v.target.type,
                    [&](auto element) { load_dense_of<decltype(element)>(v, lane, sample, inside ? at : 0, g); });
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) labels[k] = inside ? 0 : kUncounted;
  if (v.has_ignore_index) leave_out_ignored(v, lane, g, labels);
  weigh_split<Reads::kResampled>(v, sample, at, labels, weights, false, bad);
}

// Softmax of a lane's classes. Calls keep(j, k, z_top - z, exponential), with inf and 0 where there is no such class.
// Returns the voxel's sums over all lanes.
template <Combine kWay, typename A, typename T, int kClasses, int kVoxels, typename F>
__device__ __forceinline__ void top_of_split(const Logits<T, kVoxels> (&z)[kClasses], const SplitLane& lane,
                                             A (&beyond_one)[kVoxels], F&& keep) {
  A top[kVoxels], sums[2 * kVoxels];
  largest_of_thread(z, top);
  max_over_lanes<kTops, kWay>(top, lane);
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
    TopSums<A> of_lane;
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      const A below_top = top[k] - z[j].at(k), e = exponential(-below_top);
      keep(j, k, below_top, e);
      of_lane.add(e == A(1), e);
    }
    sums[k] = of_lane.rest;
    sums[kVoxels + k] = of_lane.tops;
  }
  sum_over_lanes<kTopSums, kWay>(sums, lane);
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) beyond_one[k] = TopSums<A>{sums[k], sums[kVoxels + k]}.beyond_one();
}

// The values of a sample's dense target as a lane reads them. The target has the logits' size: see Plan::by_products.
template <int kVoxels>
struct DenseRows {
  const Volume& v;
  const SplitLane& lane;
  int64_t start;  // of the sample
  int whole;      // bytes of a value where whole loads read them; else 0

  __device__ __forceinline__ DenseRows(const Volume& volume, const SplitLane& lane_, int64_t sample)
      : v(volume), lane(lane_), start(sample * volume.target.sample_stride), whole(0) {
    if (v.target.voxel_stride != 1 || (start | v.target.class_stride) % kVoxels != 0) return;
    with_element_type(v.target.type, [&](auto element) {
      constexpr int kBytes = sizeof(element) * kVoxels < 16 ? sizeof(element) * kVoxels : 16;
      if (reinterpret_cast<uintptr_t>(v.target.data) % kBytes == 0) whole = static_cast<int>(sizeof(element));
    });
  }
  // From a multiple of kVoxels on; 0 where there is no such class.
  template <typename A, int kClasses>
  __device__ __forceinline__ void load(int64_t at, A (&g)[kClasses][kVoxels]) const {
    with_element_type(v.target.type, [&](auto element) {
      using X = decltype(element);
      Packed<X, kVoxels> values[kClasses] = {};
      if (whole > 0) {
        for_each_row<X, kClasses>(at, 1, [&](int j, const X* row) { values[j] = load_packed<X, kVoxels>(row); });
      } else {
        for_each_row<X, kClasses>(at, v.target.voxel_stride, [&](int j, const X* row) {
#pragma unroll
          for (int k = 0; k < kVoxels; ++k) values[j].values[k] = row[k * v.target.voxel_stride];
        });
      }
#pragma unroll
      for (int j = 0; j < kClasses; ++j) convert(values[j], g[j]);
    });
  }

  // The same through shared memory, where come_ahead(): expect begins the copies, and after wait_for_copies take reads
  // them. slots: for each thread a pack of each of the lane's classes; clear clears the packs of missing classes.
  __device__ __forceinline__ bool come_ahead() const { return whole - 1u < 4u; }
  template <int kClasses>
  __device__ __forceinline__ void clear(unsigned char* slots) const {
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      if (lane.has<kClasses>(j)) continue;
      with_words([&](auto word) {
        const decltype(word) none[kVoxels] = {};
        memcpy(slot<decltype(word)>(slots, j), none, sizeof none);
      });
    }
  }
  template <int kClasses>
  __device__ __forceinline__ void expect(int64_t at, unsigned char* slots) const {
    with_words([&](auto word) {
      using X = decltype(word);
      for_each_row<X, kClasses>(at, 1, [&](int j, const X* row) {
        begin_copy<static_cast<int>(sizeof(X)) * kVoxels, false>(slot<X>(slots, j), row);
      });
    });
  }
  template <typename A, int kClasses>
  __device__ __forceinline__ void take(unsigned char* slots, A (&g)[kClasses][kVoxels]) const {
    with_element_type(v.target.type, [&](auto element) {
      using X = decltype(element);
      if constexpr (sizeof(X) <= 4) {
#pragma unroll
        for (int j = 0; j < kClasses; ++j) {
          convert(load_packed<X, kVoxels>(reinterpret_cast<const X*>(slot<X>(slots, j))), g[j]);
        }
      }
    });
  }

 private:
  template <typename X, typename A>
  static __device__ __forceinline__ void convert(const Packed<X, kVoxels>& values, A (&g)[kVoxels]) {
    if constexpr (std::is_same_v<X, uint8_t>) {  // out of one word
      static_assert(kVoxels == 4, "bytes of a word");
      uint32_t word;
      memcpy(&word, &values, sizeof word);
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) g[k] = static_cast<A>(byte_of(word, k));
    } else {
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) g[k] = to_compute<A>(values.values[k]);
    }
  }
  // Calls f with a number as large as a value that is copied ahead.
  template <typename F>
  __device__ __forceinline__ void with_words(F&& f) const {
    if (whole == 1) {
      f(uint8_t{});
    } else if (whole == 2) {
      f(int16_t{});
    } else {
      f(int32_t{});
    }
  }
  template <typename X>
  static __device__ __forceinline__ unsigned char* slot(unsigned char* slots, int j) {
    return slots + (j * Plan::kThreads + static_cast<int>(threadIdx.x)) * static_cast<int>(sizeof(X)) * kVoxels;
  }
  template <typename X, int kClasses, typename F>
  __device__ __forceinline__ void for_each_row(int64_t at, int64_t voxel_stride, F&& f) const {
    const int64_t step = v.target.class_stride << lane.shape.log_lanes;
    const X* row =
        static_cast<const X*>(v.target.data) + start + lane.first_class * v.target.class_stride + at * voxel_stride;
#pragma unroll
    for (int j = 0; j < kClasses; ++j, row += step) {
      if (lane.has<kClasses>(j)) f(j, row);
    }
  }
};

// A lane's pack of logits and of a dense target's values. kAhead: the next packs are copied to the thread's own place
// in shared memory while the thread works on these; the targets only where their copies are possible.
template <typename T, int kClasses, bool kAhead>
struct DensePack {
  static constexpr int kVoxels = kSplitVoxels;

  T* slots;  // [classes][threads] packs, and the targets' from there on

  __device__ __forceinline__ DensePack(unsigned char* memory, const DenseRows<kVoxels>& targets, const SplitLane& lane)
      : slots(reinterpret_cast<T*>(memory)) {
    if constexpr (kAhead) {
      Logits<T, kVoxels> none;
      fill_without_class(none);
#pragma unroll
      for (int j = 0; j < kClasses; ++j) {
        if (!lane.has<kClasses>(j)) memcpy(slot(j), none.elements, sizeof none.elements);
      }
      if (targets.come_ahead()) targets.template clear<kClasses>(target_slots());
    }
  }
  // Called before load, with the voxels that it will load. Lanes beyond the last voxel read other voxels.
  __device__ __forceinline__ void expect(const Volume& v, const T* rows, const DenseRows<kVoxels>& targets,
                                         const SplitLane& lane, int64_t at) const {
    if constexpr (kAhead) {
      const int64_t inside = at < v.voxels ? at : 0;
      for_each_row<kClasses>(v, rows, lane, inside, [&](int j, const T* row) {
        begin_copy<static_cast<int>(sizeof(T)) * kVoxels, false>(slot(j), row);
      });
      if (targets.come_ahead()) targets.template expect<kClasses>(inside, target_slots());
    }
  }
  // Logits, targets and weights; all are 0 where a voxel does not count. next: the pack to copy ahead, -1 for none. All
  // lanes of the warp must call.
  template <typename A>
  __device__ __forceinline__ void load(const Volume& v, const T* rows, const DenseRows<kVoxels>& targets,
                                       const SplitLane& lane, int64_t sample, int64_t at, int64_t next,
                                       Logits<T, kVoxels> (&z)[kClasses], A (&g)[kClasses][kVoxels],
                                       A (&weights)[kVoxels], bool& bad) const {
    const bool inside = at < v.voxels;
    if constexpr (kAhead) {
      wait_for_copies();
#pragma unroll
      for (int j = 0; j < kClasses; ++j) z[j] = load_logits<T, kVoxels>(slot(j));
    } else {
      load_split(v, rows, lane, at, z);
    }
    if (kAhead && targets.come_ahead()) {
      targets.take(target_slots(), g);
    } else {
      targets.load(inside ? at : 0, g);
    }
    if (kAhead && next >= 0) expect(v, rows, targets, lane, next);
    int labels[kVoxels];
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) labels[k] = inside ? 0 : kUncounted;
    if (v.has_ignore_index) leave_out_ignored(v, lane, g, labels);
    if (weigh_split<Reads::kSameSize>(v, sample, at, labels, weights, !v.has_ignore_index, bad)) return;
    clear_uncounted(z, labels);
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
#pragma unroll
      for (int j = 0; j < kClasses; ++j) g[j][k] = labels[k] == kUncounted ? A(0) : g[j][k];
    }
  }

 private:
  __device__ __forceinline__ T* slot(int j) const {
    return slots + (j * Plan::kThreads + static_cast<int>(threadIdx.x)) * kVoxels;
  }
  __device__ __forceinline__ unsigned char* target_slots() const {
    return reinterpret_cast<unsigned char*>(slots + kClasses * Plan::kThreads * kVoxels);
  }
};

// The sums of split kernels, [groups of warps][lanes][kValues] in shared memory.
template <typename A, int kValues>
struct SplitBlockSums {
  A* memory;
  const LaneOfVoxel& lane;

  // From the values of each thread: summed over the slots of a warp, in a fixed order; NaN where a thread is bad. All
  // threads must call it, and synchronise before they read.
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

}  // namespace cuda
}  // namespace tversky_kernels
