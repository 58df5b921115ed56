// Shared by the count passes: the sums of a block, and of each label.
#pragma once

#include "launch.h"
#include "voxels.cuh"

namespace tversky_kernels {
namespace cuda {

// The values of a thread that has its classes in registers: the columns of the counts. A cross-entropy has one or
// (smoothed) two columns more. From kWeights on comes the sum of the weights; for squares, the sum of each label (see
// Volume::sums_label_weights).
template <CrossEntropy kCeForm>
constexpr int kWeights = kCeForm == CrossEntropy::kSmoothed ? kVoxels : kSmoothing;
template <CrossEntropy kCeForm, bool kSquared>
constexpr int count_values(int classes) {
  return kCeForm == CrossEntropy::kNone ? kOverlapCounts * classes
                                        : kWeights<kCeForm> * classes + (kSquared ? classes : 1);
}

// The columns of LabelSums for each class, in whole words: tp and fn; with a cross-entropy also ce, and for squares the
// weights, for smoothing the logarithms. Then the values of a block whose threads have so many classes.
template <bool kCrossEntropy>
constexpr int kLabelColumns = kCrossEntropy ? 4 : 2;
template <bool kCrossEntropy>
constexpr int label_sum_values(int classes) {
  return (classes + 1) * kLabelColumns<kCrossEntropy> * Plan::kThreads;
}

// In an unnamed namespace, as the kernels: their shared memory and this function's are one symbol for the compiler
// then.
namespace {

// Every block begins with this call. finished: TableArguments::finished.
__device__ __forceinline__ void begin_count(unsigned* finished) {
  let_next_launch_begin();
  if (blockIdx.x == 0 && threadIdx.x == 0) *finished = 0;
}

// Sums kValues values of every thread over the block, in a fixed order. Calls store(i, sum), each in one thread. The
// sum is NaN where a thread is bad.
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

}  // namespace

// The sums that belong to the label of a voxel alone. Each thread has columns of its own in shared memory: one for each
// of its classes, and one for all other labels. To find the sum of a label in registers would take a comparison and a
// selection for every class.
template <typename A, bool kCrossEntropy>
struct LabelSums {
  static constexpr int kColumns = kLabelColumns<kCrossEntropy>, kOfThreads = kColumns * Plan::kThreads;

  A* mine;

  // memory: [classes + 1][threads][kColumns], used by no other thread.
  __device__ __forceinline__ LabelSums(A* memory, int classes) : mine(memory + threadIdx.x * kColumns) {
    for (int i = 0; i <= classes; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) mine[i * kOfThreads + j] = A(0);
    }
  }
  // c: the place of the label among the thread's classes; -1: it is none of them.
  template <bool kLast>
  __device__ __forceinline__ void add(int c, A tp, A fn, A ce, A last) const {
    constexpr int kWord = 16 / sizeof(A) < kColumns ? 16 / sizeof(A) : kColumns;
    const A more[] = {tp, fn, ce, last};
    constexpr int kMore = kLast ? 4 : 3;
    A* sums = mine + (c + 1) * kOfThreads;
#pragma unroll
    for (int first = 0; first < kColumns; first += kWord) {
      Packed<A, kWord> word = load_packed<A, kWord>(sums + first);
#pragma unroll
      for (int j = 0; j < kWord && first + j < kMore; ++j) word.values[j] += more[first + j];
      store_shared(sums + first, word);
    }
  }
  __device__ __forceinline__ A tp(int c) const { return mine[(c + 1) * kOfThreads]; }
  __device__ __forceinline__ A fn(int c) const { return mine[(c + 1) * kOfThreads + 1]; }
  __device__ __forceinline__ A ce(int c) const { return mine[(c + 1) * kOfThreads + 2]; }
  __device__ __forceinline__ A last(int c) const { return mine[(c + 1) * kOfThreads + 3]; }
};

}  // namespace cuda
}  // namespace tversky_kernels
