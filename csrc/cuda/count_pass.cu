// The count pass on CUDA: logits and target in, one partial sum of tp, fp, fn a block out.
#include "kernels.h"
#include "tile.cuh"

namespace tversky_kernels {
namespace cuda {
namespace {

// Sums kValues values of every thread over the block, in a fixed order, and stores them; NaN where a thread is bad.
template <typename A, int kValues>
__device__ void store_block_sums(A (&values)[kValues], bool bad, A* out) {
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
    out[i] = total;
  }
}

// All classes of kVoxels voxels in the registers of one thread: each class one aligned load.
template <typename T, int kClasses, int kVoxels>
__global__ void __launch_bounds__(Plan::kThreads, 2)
    count_pass_kernel(const Volume v, Compute<T>* __restrict__ partial, int programs) {
  using A = Compute<T>;
  const Share share = share_of_block(programs);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  A counts[3 * kClasses] = {};
  bool bad = false;
  const int64_t step = static_cast<int64_t>(programs) * Plan::kThreads * kVoxels;
  for (int64_t at = (share.first * Plan::kThreads + threadIdx.x) * kVoxels; at < v.voxels; at += step) {
    Packed<T, kVoxels> z[kClasses];
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      z[c] = load_packed<T, kVoxels>(rows + c * v.logits.class_stride + at);
    }
    int labels[kVoxels];
    load_labels(v, share.sample, at, labels, bad);
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      const A weight = weigh<A>(v, share.sample, at + k, labels[k], bad);
      const int label = labels[k];
      if constexpr (kClasses == 2) {
        const A d = two_class_logit(static_cast<A>(z[0].values[k]), static_cast<A>(z[1].values[k]));
        const A e = exponential(d < A(0) ? d : -d);
        const Probability<A> p = logistic(d < A(0), e, A(1) / (A(1) + e));
        const A p0 = p.complement * weight, p1 = p.p * weight;
        counts[0] += label == 0 ? p0 : A(0);
        counts[1] += label == 1 ? p1 : A(0);
        counts[2] += label == 1 ? p0 : A(0);
        counts[3] += label == 0 ? p1 : A(0);
      } else {
        A top = static_cast<A>(z[0].values[k]);
#pragma unroll
        for (int c = 1; c < kClasses; ++c) {
          const A x = static_cast<A>(z[c].values[k]);
          top = x > top ? x : top;
        }
        SoftmaxSums<A> sums;
        A others[kClasses];
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          const A e = exponential(static_cast<A>(z[c].values[k]) - top);
          others[c] = sums.add(label == c, label != c && label != kUncounted, e);
        }
        const A inverse = label == kUncounted ? A(0) : weight / (sums.target + sums.others);
        const A right = sums.target * inverse, missed = sums.others * inverse;
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          counts[c] += label == c ? right : A(0);
          counts[kClasses + c] += others[c] * inverse;
          counts[2 * kClasses + c] += label == c ? missed : A(0);
        }
      }
    }
  }
  if constexpr (kClasses == 2) {  // the other class's false positives
    counts[4] = counts[3];
    counts[5] = counts[2];
  }
  store_block_sums(counts, bad, partial + (share.sample * programs + share.first) * 3 * kClasses);
}

// Any number of classes: a tile of voxels of all classes in shared memory, read once.
template <typename T, Activation kActivation>
__global__ void __launch_bounds__(Plan::kThreads, 2)
    tiled_count_pass_kernel(const Volume v, Compute<T>* __restrict__ partial, int programs, int tile_voxels) {
  using A = Compute<T>;
  const int classes = static_cast<int>(v.classes);
  const TileLayout layout(classes, tile_voxels, Plan::kThreads);
  TK_SHARED(memory);
  A* tile = reinterpret_cast<A*>(memory);                  // [C][tile_stride]
  A* sums = tile + classes * layout.tile_stride;           // [halves][3][C]
  A* reduction = sums + 3 * classes * layout.halves;       // [2][groups][tile_voxels]
  A* scale = reduction + 2 * layout.groups * tile_voxels;  // [tile_voxels], and so on
  A* right = scale + tile_voxels;
  A* missed = right + tile_voxels;
  int* labels = reinterpret_cast<int*>(missed + tile_voxels);  // [tile_voxels]
  int* any_bad = labels + tile_voxels;

  const int thread = threadIdx.x;
  const int group = thread / tile_voxels, voxel = thread % tile_voxels;
  const bool works = group < layout.groups;
  const Share share = share_of_block(programs);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  for (int i = thread; i < 3 * classes * layout.halves; i += Plan::kThreads) sums[i] = A(0);
  if (thread == 0) *any_bad = 0;
  __syncthreads();

  for (int64_t begin = share.first * tile_voxels; begin < v.voxels;
       begin += static_cast<int64_t>(programs) * tile_voxels) {
    const int64_t left = v.voxels - begin;
    const int count = left < tile_voxels ? static_cast<int>(left) : tile_voxels;
    load_tile<T>(v, rows, begin, count, tile, layout.tile_stride, tile_voxels);
    if (load_tile_labels(v, share.sample, begin, count, tile_voxels, labels, scale)) *any_bad = 1;
    __syncthreads();
    if (kActivation == Activation::kSoftmax) {
      const SoftmaxSums<A> total =
          softmax_of_tile(tile, layout, labels, reduction, classes, tile_voxels, group, voxel, works);
      if (group == 0) {
        const A inverse = labels[voxel] == kUncounted ? A(0) : scale[voxel] / (total.target + total.others);
        scale[voxel] = inverse;
        right[voxel] = total.target * inverse;
        missed[voxel] = total.others * inverse;
      }
      __syncthreads();
    }
    // A class a thread; where there are threads enough, several share a class's voxels.
    for (int i = thread; i < classes * layout.halves; i += Plan::kThreads) {
      const int c = i % classes, half = i / classes;
      A tp = 0, fp = 0, fn = 0;
      for (int k = half; k < count; k += layout.halves) {
        const int label = labels[k];
        const A x = tile[c * layout.tile_stride + k];
        if (kActivation == Activation::kSoftmax) {
          fp += x * scale[k];
          tp += label == c ? right[k] : A(0);
          fn += label == c ? missed[k] : A(0);
        } else if (label != kUncounted) {
          Probability<A> p{x, A(1) - x};
          if (kActivation == Activation::kSigmoid) {
            const A e = exponential(x < A(0) ? x : -x);
            p = logistic(x < A(0), e, A(1) / (A(1) + e));
          }
          const bool is_target = label == c + v.first_label;
          tp += is_target ? p.p * scale[k] : A(0);
          fp += is_target ? A(0) : p.p * scale[k];
          fn += is_target ? p.complement * scale[k] : A(0);
        }
      }
      A* mine = sums + half * 3 * classes + c;
      mine[0] += tp;
      mine[classes] += fp;
      mine[2 * classes] += fn;
    }
    __syncthreads();
  }
  A* out = partial + (share.sample * programs + share.first) * 3 * classes;
  for (int i = thread; i < 3 * classes; i += Plan::kThreads) {
    A total = 0;
    for (int half = 0; half < layout.halves; ++half) total += sums[half * 3 * classes + i];
    out[i] = *any_bad ? static_cast<A>(NAN) : total;
  }
}

}  // namespace

void launch_count_pass(const Volume& v, const Plan& plan, void* partial, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(v.samples * plan.programs)), block(Plan::kThreads);
  with_logits_type(v.logits.type, [&](auto element) {
    using T = decltype(element);
    Compute<T>* out = static_cast<Compute<T>*>(partial);
    if (plan.in_registers) {
      with_few_classes<T>(v.classes, [&](auto classes) {
        constexpr int kClasses = decltype(classes)::value;
        TK_LAUNCH((count_pass_kernel<T, kClasses, kVoxelsOf<T, kClasses>>), grid, block, plan.shared_bytes, stream, v,
                  out, plan.programs);
      });
      return;
    }
    switch (v.activation) {
      case Activation::kSoftmax:
        TK_LAUNCH((tiled_count_pass_kernel<T, Activation::kSoftmax>), grid, block, plan.shared_bytes, stream, v, out,
                  plan.programs, plan.voxels);
        break;
      case Activation::kSigmoid:
        TK_LAUNCH((tiled_count_pass_kernel<T, Activation::kSigmoid>), grid, block, plan.shared_bytes, stream, v, out,
                  plan.programs, plan.voxels);
        break;
      case Activation::kNone:
        TK_LAUNCH((tiled_count_pass_kernel<T, Activation::kNone>), grid, block, plan.shared_bytes, stream, v, out,
                  plan.programs, plan.voxels);
        break;
    }
  });
}

}  // namespace cuda
}  // namespace tversky_kernels
