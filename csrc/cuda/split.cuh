// The classes of a voxel split over lanes of a warp, each with up to kClasses of them in its registers.
//
// Lane l works on classes l / slots + j * lanes, j = 0, 1, ..., of the kVoxels voxels of slot l % slots: neighbouring
// lanes take neighbouring voxels, so that a warp reads pieces of `slots * kVoxels` voxels of `lanes` classes at once.
#pragma once

#include "kernels.h"
#include "voxels.cuh"

namespace tversky_kernels {
namespace cuda {

struct SplitLane {
  int log_lanes;  // log2 of the lanes that share a voxel
  int slots;      // packs of voxels that a warp takes at once
  int slot;
  int first_class;  // of this lane; the next ones are `lanes` apart
  int own;          // how many they are

  __device__ __forceinline__ SplitLane(int log_lanes_, int classes)
      : log_lanes(log_lanes_),
        slots(kWarp >> log_lanes_),
        slot(static_cast<int>(threadIdx.x) & (slots - 1)),
        first_class((static_cast<int>(threadIdx.x) % kWarp) >> (5 - log_lanes_)),
        own((classes - first_class + (1 << log_lanes_) - 1) >> log_lanes_) {}

  __device__ __forceinline__ int class_of(int j) const { return first_class + (j << log_lanes); }
  // Whether class_of(j) exists, of at most kClasses. with_split_classes takes kClasses so that only the last two may
  // not.
  template <int kClasses>
  __device__ __forceinline__ bool has(int j) const {
    return j < kClasses - 2 || j < own;
  }
  // Which of this lane's classes the label is, -1 where none.
  __device__ __forceinline__ int index_of(int label) const {
    return (label & ((1 << log_lanes) - 1)) == first_class ? label >> log_lanes : -1;
  }
  // The lane of this lane's voxels that has the label's class.
  __device__ __forceinline__ int owner(int label) const { return (label & ((1 << log_lanes) - 1)) * slots + slot; }
};

// The largest over the lanes that share a voxel, in all of them.
template <typename A, int kValues>
__device__ __forceinline__ void max_over_lanes(A (&values)[kValues], const SplitLane& lane) {
#pragma unroll 1
  for (int distance = kWarp / 2; distance >= lane.slots; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      values[i] = larger(values[i], __shfl_xor_sync(kFullWarp, values[i], distance));
    }
  }
}

// The sums over the lanes that share a voxel, in all of them, always in the same order.
template <typename A, int kValues>
__device__ __forceinline__ void sum_over_lanes(A (&values)[kValues], const SplitLane& lane) {
#pragma unroll 1
  for (int distance = kWarp / 2; distance >= lane.slots; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] += __shfl_xor_sync(kFullWarp, values[i], distance);
  }
}

// A lane's logits of its voxels from `at` on; -inf where there is no such class. Lanes beyond the last voxel read
// others.
template <typename T, int kClasses, int kVoxels>
__device__ __forceinline__ void load_split(const Volume& v, const T* rows, const SplitLane& lane, int64_t at,
                                           Packed<T, kVoxels> (&z)[kClasses]) {
  const T* row = rows + lane.first_class * v.logits.class_stride + (at < v.voxels ? at : 0);
  const int64_t step = v.logits.class_stride << lane.log_lanes;
#pragma unroll
  for (int j = 0; j < kClasses; ++j, row += step) {
    if (lane.has<kClasses>(j)) {
      z[j] = load_packed<T, kVoxels>(row);
    } else {
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) z[j].values[k] = static_cast<T>(-INFINITY);
    }
  }
}

// The labels of a lane's voxels and their weights; nothing beyond the last voxel counts.
template <typename A, int kVoxels>
__device__ __forceinline__ void load_split_voxels(const Volume& v, int64_t sample, int64_t at, int (&labels)[kVoxels],
                                                  A (&weights)[kVoxels], bool& bad) {
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
    labels[k] = kUncounted;
    weights[k] = A(0);
  }
  if (at < v.voxels) load_voxels<false>(v, sample, at, labels, weights, bad);
}

// Softmax of a lane's classes of its voxels. others: exponentials over the voxel's largest one, 0 at the
// target and where the voxel does not count. sums: over all lanes, but `others` only over this one's classes.
template <typename A, typename T, int kClasses, int kVoxels>
__device__ __forceinline__ void softmax_of_split(const Packed<T, kVoxels> (&z)[kClasses], const int (&labels)[kVoxels],
                                                 const SplitLane& lane, A (&top)[kVoxels],
                                                 A (&others)[kClasses][kVoxels], SoftmaxSums<A> (&sums)[kVoxels]) {
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
    top[k] = static_cast<A>(z[0].values[k]);
#pragma unroll
    for (int j = 1; j < kClasses; ++j) {
      top[k] = larger(top[k], static_cast<A>(z[j].values[k]));
    }
  }
  max_over_lanes(top, lane);
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
    const int target = lane.index_of(labels[k]);
    const bool counts = labels[k] != kUncounted;
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      const A e = exponential(static_cast<A>(z[j].values[k]) - top[k]);
      others[j][k] = sums[k].add(target == j, target != j && counts, e);
    }
    sums[k].target = __shfl_sync(kFullWarp, sums[k].target, lane.owner(labels[k]));
  }
}

}  // namespace cuda
}  // namespace tversky_kernels
