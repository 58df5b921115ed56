// A tile of voxels of all classes in shared memory: how it is filled, and its softmax.
#pragma once

#include "launch.h"
#include "own_targets.cuh"
#include "voxels.cuh"

namespace tversky_kernels {
namespace cuda {

// Dynamic shared memory of a tiled block, in elements of A.
struct TileLayout {
  int tile_stride;  // odd, so that a column of classes falls into different banks
  int groups;       // threads that share a voxel
  int halves;       // threads that share a class
  __host__ __device__ TileLayout(int classes, int voxels, int threads)
      : tile_stride(voxels + 1), groups(threads / voxels), halves(threads >= 2 * classes ? threads / classes : 1) {}
};

// The largest tile, of at most so many voxels, that fits into a block's shared memory. bytes(voxels): of a tile.
// Returns its voxels; 0: not even one voxel fits.
template <typename F>
int fitting_tile(int most, const F& bytes) {
  constexpr int kSharedBytes = 46 * 1024;      // a block gets so much without a request for more
  constexpr int kMostSharedBytes = 96 * 1024;  // and by asking, on every card
  int voxels = most;
  while (voxels > 1 && bytes(voxels) > kSharedBytes) voxels /= 2;
  return bytes(voxels) <= kMostSharedBytes ? voxels : 0;
}

// A thread's place in a tiled block: the voxel and the share of its classes that it works on. Group 0 has one thread a
// voxel; threads that are left over do not work.
struct TileThread {
  int group, voxel;
  bool works;
  __device__ __forceinline__ TileThread(const TileLayout& layout, int tile_voxels)
      : group(static_cast<int>(threadIdx.x) / tile_voxels),
        voxel(static_cast<int>(threadIdx.x) % tile_voxels),
        works(group < layout.groups) {}
};

// Calls f(begin, count) for every tile of the block's share, and synchronises after each. All threads call it.
template <Order kOrder, typename F>
__device__ __forceinline__ void for_each_tile(const Share& share, int tile_voxels, F&& f) {
  for_each_piece<kOrder>(share, 0, [&](int64_t begin) {
    const int64_t left = share.end - begin;
    f(begin, left < tile_voxels ? static_cast<int>(left) : tile_voxels);
    __syncthreads();
  });
}

// Calls f(c, voxel) for the elements of a tile that a thread takes, kUnroll at a time. Neighbouring threads take
// neighbours in memory: classes of a voxel, or voxels of a class. It divides only at its start.
template <int kUnroll, typename F>
__device__ __forceinline__ void for_each_element(int classes, int tile_voxels, bool class_is_inner, F&& f) {
  const int size = class_is_inner ? classes : tile_voxels, total = classes * tile_voxels;
  const int outer_step = Plan::kThreads / size, inner_step = Plan::kThreads - outer_step * size;
  int outer = static_cast<int>(threadIdx.x) / size, inner = static_cast<int>(threadIdx.x) - outer * size;
#pragma unroll kUnroll
  for (int i = threadIdx.x; i < total; i += Plan::kThreads) {
    f(class_is_inner ? inner : outer, class_is_inner ? outer : inner);
    outer += outer_step;
    inner += inner_step;
    if (inner >= size) {
      inner -= size;
      ++outer;
    }
  }
}

// log2 of a power of two. With it nothing is divided by the size of a tile.
__device__ __forceinline__ int log2_of(int size) {
  int log = 0;
  while ((1 << log) < size) ++log;
  return log;
}

// Whether a tile's `count` voxels from `at` on can be read or written in whole packs. The answer is the same for the
// whole block.
template <typename T>
__device__ __forceinline__ bool in_packs(const T* at, int64_t class_stride, int64_t voxel_stride, int count,
                                         int tile_voxels) {
  return voxel_stride == 1 && count == tile_voxels && tile_voxels >= kPack<T> &&
         reinterpret_cast<uintptr_t>(at) % 16 == 0 && class_stride % kPack<T> == 0;
}

// As load_tile, in packs. Each thread has several packs under way at once.
template <typename T>
__device__ void load_tile_in_packs(const T* at, int64_t class_stride, int classes, Compute<T>* tile, int tile_stride,
                                   int tile_voxels) {
  constexpr int kUnderWay = 4;
  const int log_packs = log2_of(tile_voxels / kPack<T>), total = classes << log_packs;
  for (int first = threadIdx.x; first < total; first += kUnderWay * Plan::kThreads) {
    Packed<T, kPack<T>> packs[kUnderWay];
#pragma unroll
    for (int j = 0; j < kUnderWay; ++j) {
      const int i = first + j * Plan::kThreads, c = i >> log_packs, k = (i - (c << log_packs)) * kPack<T>;
      if (i < total) packs[j] = load_packed<T, kPack<T>>(at + c * class_stride + k);
    }
#pragma unroll
    for (int j = 0; j < kUnderWay; ++j) {
      const int i = first + j * Plan::kThreads, c = i >> log_packs, k = (i - (c << log_packs)) * kPack<T>;
      if (i >= total) break;
#pragma unroll
      for (int q = 0; q < kPack<T>; ++q) tile[c * tile_stride + k + q] = static_cast<Compute<T>>(packs[j].values[q]);
    }
  }
}

// tile[c][voxel] from rows + c * class_stride + voxel * voxel_stride; 0 beyond `count`.
template <typename T>
__device__ void load_tile(const Volume& v, const T* rows, int64_t begin, int count, Compute<T>* tile, int tile_stride,
                          int tile_voxels) {
  using A = Compute<T>;
  const int classes = static_cast<int>(v.classes);
  if (in_packs(rows + begin, v.logits.class_stride, v.logits.voxel_stride, count, tile_voxels)) {
    return load_tile_in_packs<T>(rows + begin, v.logits.class_stride, classes, tile, tile_stride, tile_voxels);
  }
  const T* first = rows + begin * v.logits.voxel_stride;
  for_each_element<4>(classes, tile_voxels, v.logits.voxel_stride != 1, [&](int c, int k) {
    A x = A(0);
    if (k < count) x = static_cast<A>(first[c * v.logits.class_stride + k * v.logits.voxel_stride]);
    tile[c * tile_stride + k] = x;
  });
}

// The labels and weights of a tile, one voxel a thread; voxels beyond `count` do not count. True: this thread's
// label or weight is out of range.
template <typename A>
__device__ bool load_tile_labels(const Volume& v, int64_t sample, int64_t begin, int count, int tile_voxels,
                                 int* labels, A* weights) {
  const int thread = threadIdx.x;
  if (thread >= tile_voxels) return false;
  int label[1] = {kUncounted};
  A weight[1] = {A(0)};
  bool bad = false;
  if (thread < count) {
    const LabelRow<Reads::kAny, 1> row(v, sample * v.target.sample_stride);
    load_voxels(v, row, sample, begin + thread, label, weight, bad);
  }
  labels[thread] = label[0];
  weights[thread] = weight[0];
  return bad;
}

// The largest logit of the calling thread's voxel. reduction: [groups][tile_voxels], free to be used again afterwards.
// All threads must call.
template <typename A>
__device__ A largest_of_voxel(const A* tile, const TileLayout& layout, A* reduction, int classes, int tile_voxels,
                              const TileThread& t) {
  A top = -INFINITY;
  if (t.works) {
    for (int c = t.group; c < classes; c += layout.groups) {
      top = larger(top, tile[c * layout.tile_stride + t.voxel]);
    }
    reduction[t.group * tile_voxels + t.voxel] = top;
  }
  __syncthreads();
  if (t.works) {
    for (int g = 0; g < layout.groups; ++g) {
      top = larger(top, reduction[g * tile_voxels + t.voxel]);
    }
  }
  __syncthreads();
  return top;
}

// Replaces each of the kValues values of the threads of a voxel by its sum over the groups, in all of them. reduction:
// [kValues][groups][tile_voxels], free to be used again afterwards. All threads must call it.
template <typename A, int kValues>
__device__ void sum_over_groups(A (&values)[kValues], const TileLayout& layout, A* reduction, int tile_voxels,
                                const TileThread& t) {
  const int size = layout.groups * tile_voxels;
  if (t.works) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) reduction[i * size + t.group * tile_voxels + t.voxel] = values[i];
  }
  __syncthreads();
  if (t.works) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      values[i] = A(0);
      for (int g = 0; g < layout.groups; ++g) values[i] += reduction[i * size + g * tile_voxels + t.voxel];
    }
  }
  __syncthreads();
}

// Replaces the tile's logits by their exponentials over the largest of the voxel; by 0 at the target and where the
// voxel does not count. Returns the sums of the calling thread's voxel and its largest logit. reduction:
// [2][groups][tile_voxels]. All threads must call it.
template <typename A>
__device__ SoftmaxSums<A> softmax_of_tile(A* tile, const TileLayout& layout, const int* labels, A* reduction,
                                          int classes, int tile_voxels, const TileThread& t, A& top) {
  top = largest_of_voxel(tile, layout, reduction, classes, tile_voxels, t);
  SoftmaxSums<A> sums;
  if (t.works) {
    const int label = labels[t.voxel];
    for (int c = t.group; c < classes; c += layout.groups) {
      A& x = tile[c * layout.tile_stride + t.voxel];
      x = sums.add(label == c, label != c && label != kUncounted, exponential(x - top));
    }
  }
  A values[2] = {sums.others, sums.target};
  sum_over_groups(values, layout, reduction, tile_voxels, t);
  sums.others = values[0];
  sums.target = values[1];
  return sums;
}

// ---- A target of its own for every class (Volume::is_general)

// Logits and targets of a tile, targets[c][voxel] as tile[c][voxel]; labels are kUncounted where a voxel does not
// count. True: this thread's label or weight is out of range. All threads must call.
template <typename T>
__device__ bool load_general_tile(const Volume& v, const T* rows, int64_t sample, int64_t begin, int count,
                                  Compute<T>* tile, Compute<T>* targets, int tile_stride, int tile_voxels, int* labels,
                                  Compute<T>* weights) {
  using A = Compute<T>;
  const int classes = static_cast<int>(v.classes), thread = threadIdx.x;
  load_tile<T>(v, rows, begin, count, tile, tile_stride, tile_voxels);
  bool bad = false;
  if (v.dense) {
    for_each_element<1>(classes, tile_voxels, v.target.class_stride == 1, [&](int c, int k) {
      A g[1] = {A(0)};
      if (k < count) {
        const int64_t at[1] = {c * v.target.class_stride + v.target.offset(begin + k)};
        load_values_at(v.target, sample * v.target.sample_stride, at, g);
      }
      targets[c * tile_stride + k] = g[0];
    });
    __syncthreads();
    if (thread < tile_voxels) {
      int label[1] = {thread < count ? 0 : kUncounted};
      A weight[1] = {A(0)};
      if (v.has_ignore_index) {  // a voxel that holds it in every class does not count
        bool all = true;
        for (int c = 0; c < classes; ++c) all &= targets[c * tile_stride + thread] == static_cast<A>(v.ignore_index);
        if (all) label[0] = kUncounted;
      }
      if (thread < count) weigh<Reads::kAny>(v, sample, begin + thread, label, weight, label[0] != kUncounted, bad);
      labels[thread] = label[0];
      weights[thread] = weight[0];
    }
  } else {
    bad = load_tile_labels(v, sample, begin, count, tile_voxels, labels, weights);
    __syncthreads();
    for_each_element<1>(classes, tile_voxels, false, [&](int c, int k) {
      targets[c * tile_stride + k] = labels[k] == c + v.first_label ? A(1) : A(0);
    });
  }
  __syncthreads();
  return bad;
}

// Replaces the tile's logits by z_top - z and returns the sums of exponentials of the calling thread's voxel.
// reduction: [2][groups][tile_voxels]. All threads must call.
template <typename A>
__device__ TopSums<A> top_of_tile(A* tile, const TileLayout& layout, A* reduction, int classes, int tile_voxels,
                                  const TileThread& t) {
  const A top = largest_of_voxel(tile, layout, reduction, classes, tile_voxels, t);
  TopSums<A> sums;
  if (t.works) {
    for (int c = t.group; c < classes; c += layout.groups) {
      A& x = tile[c * layout.tile_stride + t.voxel];
      x = top - x;
      sums.add(x == A(0), exponential(-x));
    }
  }
  A values[2] = {sums.rest, sums.tops};
  sum_over_groups(values, layout, reduction, tile_voxels, t);
  sums.rest = values[0];
  sums.tops = values[1];
  return sums;
}

}  // namespace cuda
}  // namespace tversky_kernels
