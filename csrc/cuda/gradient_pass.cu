// The gradient pass on CUDA: logits, target and coefficients in, dL/dlogits out.
#include "tile.cuh"

namespace tversky_kernels {
namespace cuda {
namespace {

// dL/dp of a class where g = 0 and where g = 1.
template <typename A>
struct Coefficients {
  A background, foreground;
};

// Times the upstream gradient, in double.
template <typename A>
__device__ Coefficients<A> coefficients_of(const GradientArguments& a, int64_t sample, int64_t c, int64_t classes) {
  const int64_t row = sample * a.row_stride, dropped = classes - a.grad_classes;
  if (a.grad_classes > 0 && c < dropped) return {A(0), A(0)};
  const int64_t at = a.grad_classes > 0 ? row * a.grad_classes + c - dropped : 0;
  const double upstream =
      a.grad_is_double ? static_cast<const double*>(a.grad_loss)[at] : static_cast<const float*>(a.grad_loss)[at];
  const double* u = a.coefficients + (row * classes + c) * 2;
  return {static_cast<A>(u[0] * upstream), static_cast<A>(u[1] * upstream)};
}

template <typename T, int kClasses, int kVoxels>
__global__ void __launch_bounds__(Plan::kThreads, 2)
    gradient_pass_kernel(const Volume v, const GradientArguments a, int programs) {
  using A = Compute<T>;
  const Share share = share_of_block(programs);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  T* out = static_cast<T*>(a.out.data) + share.sample * a.out.sample_stride;
  Coefficients<A> u[kClasses];
#pragma unroll
  for (int c = 0; c < kClasses; ++c) u[c] = coefficients_of<A>(a, share.sample, c, kClasses);
  bool bad = false;  // the count pass has told of it, and the coefficients are NaN then
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
      const bool counts = label != kUncounted;
      if constexpr (kClasses == 2) {
        const A d = two_class_logit(static_cast<A>(z[0].values[k]), static_cast<A>(z[1].values[k]));
        const A e = exponential(d < A(0) ? d : -d);
        const A difference = label == 1 ? u[1].foreground - u[0].background : u[1].background - u[0].foreground;
        A dz = logistic_gradient(e, A(1) / (A(1) + e), difference) * weight;
        dz = counts ? dz : A(0);
        z[0].values[k] = static_cast<T>(-dz);
        z[1].values[k] = static_cast<T>(dz);
      } else {
        A top = static_cast<A>(z[0].values[k]);
#pragma unroll
        for (int c = 1; c < kClasses; ++c) {
          const A x = static_cast<A>(z[c].values[k]);
          top = x > top ? x : top;
        }
        SoftmaxSums<A> sums;
        A others[kClasses], weighted_others = 0, u_target = 0;
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          const A e = exponential(static_cast<A>(z[c].values[k]) - top);
          others[c] = sums.add(label == c, label != c && counts, e);
          weighted_others += others[c] * u[c].background;
          u_target = label == c ? u[c].foreground : u_target;
        }
        const A inverse = counts ? A(1) / (sums.target + sums.others) : A(0);
        const SoftmaxGradient<A> gradient = softmax_gradient(sums, weighted_others, u_target, inverse, weight);
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          z[c].values[k] = static_cast<T>(label == c ? gradient.at_target : gradient.other(others[c], u[c].background));
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      store_packed(out + c * a.out.class_stride + at, z[c]);
    }
  }
}

template <typename T, Activation kActivation>
__global__ void __launch_bounds__(Plan::kThreads, 2)
    tiled_gradient_pass_kernel(const Volume v, const GradientArguments a, int programs, int tile_voxels) {
  using A = Compute<T>;
  const int classes = static_cast<int>(v.classes);
  const TileLayout layout(classes, tile_voxels, Plan::kThreads);
  TK_SHARED(memory);
  A* tile = reinterpret_cast<A*>(memory);                  // [C][tile_stride]
  A* reduction = tile + classes * layout.tile_stride;      // [2][groups][tile_voxels]
  A* scale = reduction + 2 * layout.groups * tile_voxels;  // [tile_voxels], and so on
  A* offset = scale + tile_voxels;
  A* at_target = offset + tile_voxels;
  A* background = at_target + tile_voxels;                     // [C]
  A* foreground = background + classes;                        // [C]
  int* labels = reinterpret_cast<int*>(foreground + classes);  // [tile_voxels]

  const int thread = threadIdx.x;
  const int group = thread / tile_voxels, voxel = thread % tile_voxels;
  const bool works = group < layout.groups;
  const Share share = share_of_block(programs);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  T* out = static_cast<T*>(a.out.data) + share.sample * a.out.sample_stride;
  for (int c = thread; c < classes; c += Plan::kThreads) {
    const Coefficients<A> u = coefficients_of<A>(a, share.sample, c, classes);
    background[c] = u.background;
    foreground[c] = u.foreground;
  }

  for (int64_t begin = share.first * tile_voxels; begin < v.voxels;
       begin += static_cast<int64_t>(programs) * tile_voxels) {
    const int64_t left = v.voxels - begin;
    const int count = left < tile_voxels ? static_cast<int>(left) : tile_voxels;
    load_tile<T>(v, rows, begin, count, tile, layout.tile_stride, tile_voxels);
    load_tile_labels(v, share.sample, begin, count, tile_voxels, labels, scale);
    __syncthreads();
    if (kActivation == Activation::kSoftmax) {
      const SoftmaxSums<A> total =
          softmax_of_tile(tile, layout, labels, reduction, classes, tile_voxels, group, voxel, works);
      __syncthreads();  // the reduction is used again
      if (works) {
        A mine = A(0);
        for (int c = group; c < classes; c += layout.groups)
          mine += tile[c * layout.tile_stride + voxel] * background[c];
        reduction[group * tile_voxels + voxel] = mine;
      }
      __syncthreads();
      if (group == 0) {
        A weighted_others = A(0);
        for (int g = 0; g < layout.groups; ++g) weighted_others += reduction[g * tile_voxels + voxel];
        const int label = labels[voxel];
        const A u_target = label == kUncounted ? A(0) : foreground[label];
        const A inverse = label == kUncounted ? A(0) : A(1) / (total.target + total.others);
        const SoftmaxGradient<A> gradient = softmax_gradient(total, weighted_others, u_target, inverse, scale[voxel]);
        scale[voxel] = gradient.scale;
        offset[voxel] = gradient.offset;
        at_target[voxel] = gradient.at_target;
      }
      __syncthreads();
    }
    const bool class_is_inner = a.out.voxel_stride != 1;
    for (int i = thread; i < classes * tile_voxels; i += Plan::kThreads) {
      const int c = class_is_inner ? i % classes : i / tile_voxels;
      const int k = class_is_inner ? i / classes : i % tile_voxels;
      if (k >= count) continue;
      const int label = labels[k];
      const A x = tile[c * layout.tile_stride + k];
      A dz;
      if (kActivation == Activation::kSoftmax) {
        const SoftmaxGradient<A> gradient{scale[k], offset[k], at_target[k]};
        dz = label == c ? gradient.at_target : gradient.other(x, background[c]);
      } else {
        dz = label == c + v.first_label ? foreground[c] : background[c];
        if (kActivation == Activation::kSigmoid) {
          const A e = exponential(x < A(0) ? x : -x);
          dz = logistic_gradient(e, A(1) / (A(1) + e), dz);
        }
        dz = label == kUncounted ? A(0) : dz * scale[k];
      }
      out[c * a.out.class_stride + (begin + k) * a.out.voxel_stride] = static_cast<T>(dz);
    }
    __syncthreads();
  }
}

}  // namespace

void launch_gradient_pass(const Volume& v, const Plan& plan, const GradientArguments& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(v.samples * plan.programs)), block(Plan::kThreads);
  with_logits_type(v.logits.type, [&](auto element) {
    using T = decltype(element);
    if (plan.in_registers) {
      with_few_classes<T>(v.classes, [&](auto classes) {
        constexpr int kClasses = decltype(classes)::value;
        TK_LAUNCH((gradient_pass_kernel<T, kClasses, kVoxelsOf<T, kClasses>>), grid, block, 0, stream, v, a,
                  plan.programs);
      });
      return;
    }
    switch (v.activation) {
      case Activation::kSoftmax:
        TK_LAUNCH((tiled_gradient_pass_kernel<T, Activation::kSoftmax>), grid, block, plan.shared_bytes, stream, v, a,
                  plan.programs, plan.voxels);
        break;
      case Activation::kSigmoid:
        TK_LAUNCH((tiled_gradient_pass_kernel<T, Activation::kSigmoid>), grid, block, plan.shared_bytes, stream, v, a,
                  plan.programs, plan.voxels);
        break;
      case Activation::kNone:
        TK_LAUNCH((tiled_gradient_pass_kernel<T, Activation::kNone>), grid, block, plan.shared_bytes, stream, v, a,
                  plan.programs, plan.voxels);
        break;
    }
  });
}

}  // namespace cuda
}  // namespace tversky_kernels
