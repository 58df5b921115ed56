// A tile of voxels of all classes in shared memory: how it is filled, and its softmax.
#pragma once

#include "kernels.h"
#include "voxels.cuh"

namespace tversky_kernels {
namespace cuda {

// tile[c][voxel] from rows + c * class_stride + voxel * voxel_stride. Neighbouring threads take neighbouring addresses
// in either layout. What is beyond `count` is 0.
template <typename T>
__device__ void load_tile(const Volume& v, const T* rows, int64_t begin, int count, Compute<T>* tile, int tile_stride,
                          int tile_voxels) {
  using A = Compute<T>;
  const int classes = static_cast<int>(v.classes), total = classes * tile_voxels;
  const bool class_is_inner = v.logits.voxel_stride != 1;
#pragma unroll 4
  for (int i = threadIdx.x; i < total; i += Plan::kThreads) {
    const int c = class_is_inner ? i % classes : i / tile_voxels;
    const int k = class_is_inner ? i / classes : i % tile_voxels;
    A x = A(0);
    if (k < count) x = static_cast<A>(rows[c * v.logits.class_stride + (begin + k) * v.logits.voxel_stride]);
    tile[c * tile_stride + k] = x;
  }
}

// The labels and weights of a tile, one voxel a thread; what is beyond `count` does not count. True: this thread's
// label or weight is out of range.
template <typename A>
__device__ bool load_tile_labels(const Volume& v, int64_t sample, int64_t begin, int count, int tile_voxels,
                                 int* labels, A* weights) {
  const int thread = threadIdx.x;
  if (thread >= tile_voxels) return false;
  int label[1] = {kUncounted};
  A weight = A(0);
  bool bad = false;
  if (thread < count) {
    load_labels(v, sample, begin + thread, label, bad);
    weight = weigh<A>(v, sample, begin + thread, label[0], bad);
  }
  labels[thread] = label[0];
  weights[thread] = weight;
  return bad;
}

// Replaces the tile's logits by their exponentials over the voxel's largest, 0 at the target and where the voxel does
// not count, and returns the sums of the calling thread's voxel and its largest logit. reduction:
// [2][groups][tile_voxels]. All threads must call.
template <typename A>
__device__ SoftmaxSums<A> softmax_of_tile(A* tile, const TileLayout& layout, const int* labels, A* reduction,
                                          int classes, int tile_voxels, int group, int voxel, bool works, A& top) {
  SoftmaxSums<A> total;
  top = -INFINITY;
  if (works) {
    for (int c = group; c < classes; c += layout.groups) {
      const A x = tile[c * layout.tile_stride + voxel];
      top = x > top ? x : top;
    }
    reduction[group * tile_voxels + voxel] = top;
  }
  __syncthreads();
  if (works) {
    for (int g = 0; g < layout.groups; ++g) {
      const A x = reduction[g * tile_voxels + voxel];
      top = x > top ? x : top;
    }
  }
  __syncthreads();
  A* targets = reduction + layout.groups * tile_voxels;
  if (works) {
    const int label = labels[voxel];
    SoftmaxSums<A> mine;
    for (int c = group; c < classes; c += layout.groups) {
      A& x = tile[c * layout.tile_stride + voxel];
      x = mine.add(label == c, label != c && label != kUncounted, exponential(x - top));
    }
    reduction[group * tile_voxels + voxel] = mine.others;
    targets[group * tile_voxels + voxel] = mine.target;
  }
  __syncthreads();
  if (works) {
    for (int g = 0; g < layout.groups; ++g) {
      total.others += reduction[g * tile_voxels + voxel];
      total.target += targets[g * tile_voxels + voxel];
    }
  }
  return total;
}

// ---- A target of its own for every class (Volume::is_general)

// Logits and targets of a tile, targets[c][voxel] as tile[c][voxel]; labels are kUncounted where a voxel does not
// count. True: this thread's label or weight is out of range. All threads must call.
template <typename T>
__device__ bool load_general_tile(const Volume& v, const T* rows, int64_t sample, int64_t begin, int count,
                                  Compute<T>* tile, Compute<T>* targets, int tile_stride, int tile_voxels, int* labels,
                                  Compute<T>* weights) {
  using A = Compute<T>;
  const int classes = static_cast<int>(v.classes), total = classes * tile_voxels, thread = threadIdx.x;
  load_tile<T>(v, rows, begin, count, tile, tile_stride, tile_voxels);
  bool bad = false;
  if (v.dense) {
    const bool class_is_inner = v.target.class_stride == 1;
    for (int i = thread; i < total; i += Plan::kThreads) {
      const int c = class_is_inner ? i % classes : i / tile_voxels;
      const int k = class_is_inner ? i / classes : i % tile_voxels;
      A g = A(0);
      if (k < count) {
        g = load_value<A>(v.target,
                          sample * v.target.sample_stride + c * v.target.class_stride + v.target.offset(begin + k));
      }
      targets[c * tile_stride + k] = g;
    }
    __syncthreads();
    if (thread < tile_voxels) {
      int label = thread < count ? 0 : kUncounted;
      if (v.has_ignore_index) {  // a voxel that holds it in every class does not count
        bool all = true;
        for (int c = 0; c < classes; ++c) all &= targets[c * tile_stride + thread] == static_cast<A>(v.ignore_index);
        if (all) label = kUncounted;
      }
      weights[thread] = thread < count ? weigh<A>(v, sample, begin + thread, label, bad) : A(0);
      labels[thread] = label;
    }
  } else {
    bad = load_tile_labels(v, sample, begin, count, tile_voxels, labels, weights);
    __syncthreads();
    for (int i = thread; i < total; i += Plan::kThreads) {
      const int c = i / tile_voxels, k = i % tile_voxels;
      targets[c * tile_stride + k] = labels[k] == c + v.first_label ? A(1) : A(0);
    }
  }
  __syncthreads();
  return bad;
}

// Replaces the tile's logits by z_top - z and returns the sums of exponentials of the calling thread's voxel.
// reduction: [2][groups][tile_voxels]. All threads must call.
template <typename A>
__device__ TopSums<A> top_of_tile(A* tile, const TileLayout& layout, A* reduction, int classes, int tile_voxels,
                                  int group, int voxel, bool works) {
  TopSums<A> total;
  A top = -INFINITY;
  if (works) {
    for (int c = group; c < classes; c += layout.groups) {
      const A x = tile[c * layout.tile_stride + voxel];
      top = x > top ? x : top;
    }
    reduction[group * tile_voxels + voxel] = top;
  }
  __syncthreads();
  if (works) {
    for (int g = 0; g < layout.groups; ++g) {
      const A x = reduction[g * tile_voxels + voxel];
      top = x > top ? x : top;
    }
  }
  __syncthreads();
  A* tops = reduction + layout.groups * tile_voxels;
  if (works) {
    TopSums<A> mine;
    for (int c = group; c < classes; c += layout.groups) {
      A& x = tile[c * layout.tile_stride + voxel];
      x = top - x;
      mine.add(x == A(0), exponential(-x));
    }
    reduction[group * tile_voxels + voxel] = mine.rest;
    tops[group * tile_voxels + voxel] = mine.tops;
  }
  __syncthreads();
  if (works) {
    for (int g = 0; g < layout.groups; ++g) {
      total.rest += reduction[g * tile_voxels + voxel];
      total.tops += tops[g * tile_voxels + voxel];
    }
  }
  return total;
}

// p and 1 - p from z_top - z.
template <typename A>
__device__ __forceinline__ Probability<A> dense_probability(A below_top, A beyond_one, A inverse) {
  const A p = exponential(-below_top) * inverse;
  return {p, below_top == A(0) ? beyond_one * inverse : A(1) - p};
}

template <typename A>
__device__ __forceinline__ Probability<A> sigmoid(A z) {
  const A e = exponential(z < A(0) ? z : -z);
  return logistic(z < A(0), e, A(1) / (A(1) + e));
}

// -log sigmoid(z)
template <typename A>
__device__ __forceinline__ A minus_log_sigmoid(A z) {
  return log_one_plus(exponential(z < A(0) ? z : -z)) + (z < A(0) ? -z : A(0));
}

}  // namespace cuda
}  // namespace tversky_kernels
