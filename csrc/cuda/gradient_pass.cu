// The gradient pass on CUDA: logits, target and coefficients in, dL/dlogits out.
#include "interleaved.cuh"
#include "split.cuh"
#include "tile.cuh"

namespace tversky_kernels {
namespace cuda {
namespace {

constexpr Order kOrder = Order::kForward;

__device__ __forceinline__ double upstream_gradient(const GradientArguments& a, int64_t at) {
  return a.grad_is_double ? static_cast<const double*>(a.grad_loss)[at] : static_cast<const float*>(a.grad_loss)[at];
}

// Times the upstream gradient, in double.
template <typename A, bool kCrossEntropy>
__device__ Coefficients<A> coefficients_of(const Volume& v, const GradientArguments& a, int64_t sample, int64_t c) {
  const int64_t classes = v.classes, row = sample * a.row_stride, dropped = classes - a.grad_classes;
  const double* u = a.coefficients + (row * classes + c) * (kCrossEntropy ? kAllCoefficients : kOverlapCoefficients);
  Coefficients<A> result{A(0), A(0), A(0), A(0)};
  if (a.grad_classes == 0 || c >= dropped) {
    const double upstream = upstream_gradient(a, a.grad_classes > 0 ? row * a.grad_classes + c - dropped : 0);
    result.background = static_cast<A>(u[kBackground] * upstream);
    result.foreground = static_cast<A>(foreground_coefficient(u, v.overlap) * upstream);
  }
  if (kCrossEntropy) {  // every value of the row contains the cross-entropy
    double of_row = a.grad_classes == 0 ? upstream_gradient(a, 0) : 0.0;
    for (int64_t i = 0; i < a.grad_classes; ++i) of_row += upstream_gradient(a, row * a.grad_classes + i);
    result.ce = static_cast<A>(u[kCeCoefficient] * of_row);
    result.smoothing = static_cast<A>(u[kSmoothingCoefficient] * of_row);
  }
  return result;
}

// The same of all classes in shared memory, memory[C + 1], once a block; the first are 0, those of a label that is
// kUncounted. Returns those of class 0. All threads must call, and synchronise before they read.
template <bool kCrossEntropy, typename A>
[[nodiscard]] __device__ __forceinline__ const Coefficients<A>* fill_coefficients(const Volume& v,
                                                                                  const GradientArguments& a,
                                                                                  int64_t sample,
                                                                                  Coefficients<A>* memory) {
  if (threadIdx.x == 0) memory[0] = {A(0), A(0), A(0), A(0)};
#pragma unroll 1
  for (int c = threadIdx.x; c < v.classes; c += Plan::kThreads) {
    memory[c + 1] = coefficients_of<A, kCrossEntropy>(v, a, sample, c);
  }
  return memory + 1;
}

// Of all classes' dL/dsmoothing, which fill_coefficients made.
template <typename A>
__device__ __forceinline__ A sum_of_smoothing(const Coefficients<A>* of_class, int classes) {
  A sum = A(0);
#pragma unroll 4
  for (int c = 0; c < classes; ++c) sum += of_class[c].smoothing;
  return sum;
}

template <typename T, int kClasses, CrossEntropy kCeForm, bool kSquared, bool kInterleaved>
__global__ void __launch_bounds__(Plan::kThreads, kFewBlocks<kClasses, kCeForm>)
    gradient_pass_kernel(const Volume v, const GradientArguments a, const Blocks blocks) {
  using A = Compute<T>;
  constexpr bool kCrossEntropy = kCeForm != CrossEntropy::kNone, kSmoothed = kCeForm == CrossEntropy::kSmoothed;
  constexpr int kVoxels = kVoxelsOf<T, kClasses, kCrossEntropy>;
  const Share share = share_of_block<kOrder>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + kept(share.sample * v.logits.sample_stride);
  T* out = static_cast<T*>(a.out.data) + kept(share.sample * a.out.sample_stride);
  TK_SHARED(memory);
  const Coefficients<A>* of_class =
      fill_coefficients<kCrossEntropy>(v, a, share.sample, reinterpret_cast<Coefficients<A>*>(memory));
  __syncthreads();
  Coefficients<A> u[kClasses];
#pragma unroll
  for (int c = 0; c < kClasses; ++c) u[c] = of_class[c];
  const A smoothing_of_all = kSmoothed ? sum_of_smoothing(of_class, kClasses) : A(0);
  bool bad = false;  // the count pass has told of it, and the coefficients are NaN then
  const LabelRow<Reads::kSameSize, kVoxels> target_row(v, kept(share.sample * v.target.sample_stride));
  for_each_own<kOrder, kVoxels>(share, [&](int64_t at) {
    Logits<T, kVoxels> z[kClasses];
    Packed<T, kVoxels> dz[kClasses];
    load_classes<kInterleaved>(rows, v.logits.class_stride, at, z);
    int labels[kVoxels];
    A weights[kVoxels];
    if (!load_voxels(v, target_row, share.sample, at, labels, weights, bad)) clear_uncounted(z, labels);
    A tops[kVoxels];
    if (kClasses > 2) {
      largest_of_thread(z, tops);
      if (any_huge<T>(tops)) take_off(z, tops);
    }
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      const A weight = weights[k];  // 0 where the voxel does not count, and so is the gradient
      const int label = labels[k];
      if constexpr (kClasses == 2) {
        const A z0 = z[0].at(k), z1 = z[1].at(k);
        const A d = two_class_logit(z0, z1, larger(z0, z1));
        const A e = exponential(-magnitude(d));
        A difference = label == 1 ? u[1].foreground - u[0].background : u[1].background - u[0].foreground;
        const A inverse = reciprocal(A(1) + e);
        const Probability<A> p = logistic(d < A(0), e, inverse);
        if constexpr (kSquared) {  // u_label - u_other = u_foreground - 2 p_other (both u_background)
          const A p_other = label == 1 ? p.complement : p.p;
          const A foreground = label == 1 ? u[1].foreground : u[0].foreground;
          const A of_label = squared_slope_of_target(p_other, u[0].background + u[1].background, foreground);
          difference = label == 1 ? of_label : -of_label;
        }
        A dz_1 = logistic_gradient(e, inverse, difference);
        if constexpr (kCrossEntropy) {
          A slope = label == 1 ? -u[1].ce * p.complement : u[0].ce * p.p;
          if constexpr (kSmoothed) {
            slope += u[0].smoothing * p.p - u[1].smoothing * p.complement;
          } else if (v.focal_gamma != 0) {
            const A minus_log_p = log_one_plus_small(e) + larger(label == 1 ? -d : d, A(0));
            const Probability<A> right = of_outcome(label == 1, p);
            slope *= focal_slope(right, minus_log_p, static_cast<A>(v.focal_gamma), FocalPower{});
          }
          dz_1 += slope;
        }
        dz_1 *= weight;
        dz[0].values[k] = static_cast<T>(-dz_1);
        dz[1].values[k] = static_cast<T>(dz_1);
      } else {
        SoftmaxSums<A> sums;
        A others[kClasses], weighted_others = 0;
        const A scaled_top = scale_top(tops[k]);
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          others[c] = sums.add(label == c, label != c, exponential_below(z[c].at(k), scaled_top));
          weighted_others += others[c] * u[c].background;
        }
        const A inverse = reciprocal(sums.target + sums.others);
        SoftmaxGradient<A> gradient =
            softmax_gradient(sums, weighted_others, of_class[label].foreground, inverse, weight);
        if (kSmoothed) {
          gradient.add_smoothed_cross_entropy(sums, of_class[label].ce, of_class[label].smoothing, smoothing_of_all);
        } else if (kCrossEntropy) {
          gradient.add_cross_entropy(sums, with_focal_slope(v, sums, inverse, of_class[label].ce));
        }
        const int target = recomputed(label);
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          A other = gradient.other(others[c], u[c].background);
          if (kSmoothed) other -= u[c].smoothing * weight;
          dz[c].values[k] = static_cast<T>(target == c ? gradient.at_target : other);
        }
      }
    }
    store_classes<kInterleaved>(out, a.out.class_stride, at, dz);
  });
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
  const Share share = share_of_block<kOrder>(v, blocks);
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
  bool bad = false;  // the count pass has told of it, and the coefficients are NaN then
  const LabelRow<Reads::kSameSize, kSplitVoxels> target_row(v, share.sample * v.target.sample_stride);
  using Pack = PackOf<T, kClasses, kTurns, kAhead<T, true>>;
  Pack pack(tiles, v, lane);
  const auto expect = [&](int64_t at) { pack.expect(v, rows, target_row, lane, at); };
  for_each_pack_ahead<kOrder>(share, lane, expect, [&](int64_t at, int64_t next) {
    int labels[kVoxels];
    A of_target[kVoxels], weights[kVoxels];
    const bool all_known = pack.load(v, rows, target_row, lane, at, next, labels, of_target, bad);
    Logits<T, kVoxels> z[kClasses];
    Packed<T, kVoxels> dz[kClasses];
    T at_target[kVoxels];
    weighed_pack<Reads::kSameSize>(v, lane, share.sample, at, pack, labels, all_known, z, of_target, weights, bad);
    if (kTurns > 0) take_background();  // from shared memory again, as registers are few
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
      const A weight = weights[k];  // 0 where the voxel does not count, and so is the gradient
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

// A target of its own for every class, and all options of a softmax's cross-entropy.
template <typename T, int kClasses, bool kCrossEntropy>
__global__ void __launch_bounds__(Plan::kThreads, kSplitBlocks)
    general_split_gradient_pass_kernel(const Volume v, const GradientArguments a, const Blocks blocks,
                                       const SplitShape shape) {
  using A = Compute<T>;
  constexpr int kVoxels = kSplitVoxels;
  const int classes = static_cast<int>(v.classes);
  TK_SHARED(memory);
  const SplitLane lane(shape, classes);
  const Share share = share_of_block<kOrder>(v, blocks);
  const Coefficients<A>* of_class =
      fill_coefficients<kCrossEntropy>(v, a, share.sample, lane.beyond_exchange<Coefficients<A>>(memory));
  __syncthreads();

  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  Coefficients<A> u[kClasses] = {};
#pragma unroll
  for (int j = 0; j < kClasses; ++j) {
    if (lane.has<kClasses>(j)) u[j] = of_class[lane.class_of(j)];
  }
  bool bad = false;  // the count pass has told of it, and the coefficients are NaN then
  const bool focal = kCrossEntropy && v.focal_gamma != 0;
  for_each_pack<kOrder>(share, lane, [&](int64_t at) {
    Logits<T, kVoxels> z[kClasses];
    Packed<T, kVoxels> dz[kClasses];
    load_split(v, rows, lane, at, z);
    A g[kClasses][kVoxels], weights[kVoxels], below_top[kClasses][kVoxels], beyond_one[kVoxels];
    int labels[kVoxels];
    load_split_targets(v, lane, share.sample, at, g, labels, weights, bad);
    top_of_split<Combine::kLoop>(z, lane, beyond_one, [&](int j, int k, A below, A) { below_top[j][k] = below; });
    A sums[3 * kVoxels];  // rest_u, top_u and the sum of b
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      const A inverse = reciprocal(A(1) + beyond_one[k]), log_sum = focal ? log_one_plus(beyond_one[k]) : A(0);
      A rest_u = A(0), top_u = A(0), b_all = A(0);
#pragma unroll
      for (int j = 0; j < kClasses; ++j) {
        if (!lane.has<kClasses>(j)) continue;
        const Probability<A> p = dense_probability(below_top[j][k], beyond_one[k], inverse);
        const A slope = overlap_slope(p, g[j][k], u[j].background, u[j].foreground, v.overlap);
        rest_u += below_top[j][k] == A(0) ? A(0) : p.p * slope;
        top_u += below_top[j][k] == A(0) ? slope : A(0);
        if (kCrossEntropy) b_all += cross_entropy_slope(v, u[j], p, g[j][k], below_top[j][k] + log_sum);
      }
      sums[k] = rest_u;
      sums[kVoxels + k] = top_u;
      sums[2 * kVoxels + k] = b_all;
    }
    sum_over_lanes<kSums, Combine::kLoop>(sums, lane);
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      const A inverse = reciprocal(A(1) + beyond_one[k]), log_sum = focal ? log_one_plus(beyond_one[k]) : A(0);
      const DenseSoftmaxGradient<A> gradient =
          dense_softmax_gradient(sums[k], sums[kVoxels + k], beyond_one[k], inverse);
#pragma unroll
      for (int j = 0; j < kClasses; ++j) {
        const A x = recomputed(below_top[j][k]);
        const Probability<A> p = dense_probability(x, beyond_one[k], inverse);
        A slope = gradient.overlap(p.p, overlap_slope(p, g[j][k], u[j].background, u[j].foreground, v.overlap));
        if (kCrossEntropy) {
          const A b = cross_entropy_slope(v, u[j], p, g[j][k], x + log_sum);
          slope += softmax_cross_entropy_gradient(p, b, sums[2 * kVoxels + k]);
        }
        dz[j].values[k] = static_cast<T>(labels[k] == kUncounted ? A(0) : slope * weights[k]);
      }
    }
    store_split(v, a.out, share.sample, lane, at, dz);
  });
}

// A target of its own for every class, by products: see Plan::dense.
template <typename T, int kClasses, bool kCrossEntropy>
__global__ void __launch_bounds__(Plan::kThreads, kDenseBlocks<kClasses, true>)
    dense_split_gradient_pass_kernel(const Volume v, const GradientArguments a, const Blocks blocks,
                                     const SplitShape shape) {
  using A = Compute<T>;
  constexpr int kVoxels = kSplitVoxels;
  const int classes = static_cast<int>(v.classes);
  TK_SHARED(memory);
  const SplitLane lane(shape, classes);
  const Share share = share_of_block<kOrder>(v, blocks);
  Coefficients<A>* const coefficients = lane.beyond_exchange<Coefficients<A>>(memory);
  const Coefficients<A>* of_class = fill_coefficients<kCrossEntropy>(v, a, share.sample, coefficients);
  __syncthreads();

  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  const DenseRows<kVoxels> targets(v, lane, share.sample);
  A u_background[kClasses], u_foreground[kClasses];
#pragma unroll
  for (int j = 0; j < kClasses; ++j) {
    u_background[j] = lane.has<kClasses>(j) ? of_class[lane.class_of(j)].background : A(0);
    u_foreground[j] = lane.has<kClasses>(j) ? of_class[lane.class_of(j)].foreground : A(0);
  }
  const auto ce_of = [&](int j) {  // from shared memory, as registers are few
    return lane.has<kClasses>(j) ? of_class[lane.class_of(j)].ce : A(0);
  };
  const auto slope_of = [&](int j, A target) {  // p does not decide it
    return overlap_slope(Probability<A>{}, target, u_background[j], u_foreground[j], OverlapForm::kProduct);
  };
  bool bad = false;  // the count pass has told of it, and the coefficients are NaN then
  DensePack<T, kClasses, kDenseAhead<T, kClasses, true>> pack(
      reinterpret_cast<unsigned char*>(coefficients + classes + 1), targets, lane);
  const auto expect = [&](int64_t at) { pack.expect(v, rows, targets, lane, at); };
  for_each_pack_ahead<kOrder>(share, lane, expect, [&](int64_t at, int64_t next) {
    Logits<T, kVoxels> z[kClasses];
    Packed<T, kVoxels> dz[kClasses];
    A g[kClasses][kVoxels], weights[kVoxels];
    pack.load(v, rows, targets, lane, share.sample, at, next, z, g, weights, bad);
    if constexpr (kClasses == 2) {
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) {
        const A z0 = z[0].at(k), z1 = z[1].at(k);
        const A d = two_class_logit(z0, z1, larger(z0, z1)), e = exponential(-magnitude(d));
        const A inverse = reciprocal(A(1) + e);
        A dz_1 = logistic_gradient(e, inverse, slope_of(1, g[1][k]) - slope_of(0, g[0][k]));
        if (kCrossEntropy) {
          const A b = g[1][k] * ce_of(1), b_all = g[0][k] * ce_of(0) + b;
          dz_1 += softmax_cross_entropy_gradient(logistic(d < A(0), e, inverse), b, b_all);
        }
        dz_1 *= weights[k];
        dz[0].values[k] = static_cast<T>(-dz_1);
        dz[1].values[k] = static_cast<T>(dz_1);
      }
    } else {
      // Five classes of a lane and a cross-entropy leave no registers for steps.
      constexpr Combine kWay = kCrossEntropy && kClasses == kMostOfLaneDense ? Combine::kLoop : Combine::kSteps;
      A e[kClasses][kVoxels], beyond_one[kVoxels];
      top_of_split<kWay>(z, lane, beyond_one, [&](int j, int k, A, A exponential_of) { e[j][k] = exponential_of; });
      constexpr int kAll = kCrossEntropy ? 3 : 2;
      A sums[kAll * kVoxels];  // rest_u S, top_u and, with a cross-entropy, the sum of b
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) {
        A rest_u = A(0), top_u = A(0), b_all = A(0);
#pragma unroll
        for (int j = 0; j < kClasses; ++j) {
          const A slope = slope_of(j, g[j][k]);
          if (e[j][k] == A(1)) {
            top_u += slope;
          } else {
            rest_u += e[j][k] * slope;
          }
          if (kCrossEntropy) b_all += g[j][k] * ce_of(j);
        }
        sums[k] = rest_u;
        sums[kVoxels + k] = top_u;
        if constexpr (kCrossEntropy) sums[2 * kVoxels + k] = b_all;
      }
      sum_over_lanes<kSums, kWay>(sums, lane);
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) {
        const A inverse = reciprocal(A(1) + beyond_one[k]), weighted = inverse * weights[k];
        const DenseSoftmaxGradient<A> gradient =
            dense_softmax_gradient(sums[k] * inverse, sums[kVoxels + k], beyond_one[k], inverse);
#pragma unroll
        for (int j = 0; j < kClasses; ++j) {
          const A target = recomputed(g[j][k]);
          const Probability<A> p{e[j][k] * weighted, unscaled_complement(e[j][k], beyond_one[k]) * weighted};
          A slope = gradient.overlap(p.p, slope_of(j, target));
          if constexpr (kCrossEntropy) {
            slope += softmax_cross_entropy_gradient(p, target * ce_of(j), sums[2 * kVoxels + k]);
          }
          dz[j].values[k] = static_cast<T>(slope);
        }
      }
    }
    store_split(v, a.out, share.sample, lane, at, dz);
  });
}

template <typename T, Activation kActivation, bool kCrossEntropy>
__global__ void __launch_bounds__(Plan::kThreads, 2)
    tiled_gradient_pass_kernel(const Volume v, const GradientArguments a, const Blocks blocks, int tile_voxels) {
  using A = Compute<T>;
  const int classes = static_cast<int>(v.classes);
  const TileLayout layout(classes, tile_voxels, Plan::kThreads);
  TK_SHARED(memory);
  A* tile = reinterpret_cast<A*>(memory);                  // [C][tile_stride]
  A* reduction = tile + classes * layout.tile_stride;      // [2][groups][tile_voxels]
  A* scale = reduction + 2 * layout.groups * tile_voxels;  // [tile_voxels], and so on
  A* offset = scale + tile_voxels;
  A* at_target = offset + tile_voxels;
  Coefficients<A>* coefficients = reinterpret_cast<Coefficients<A>*>(at_target + tile_voxels);  // [C + 1]
  int* labels = reinterpret_cast<int*>(coefficients + classes + 1);                             // [tile_voxels]

  const int thread = threadIdx.x;
  const TileThread t(layout, tile_voxels);
  const Share share = share_of_block<kOrder>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  T* out = static_cast<T*>(a.out.data) + share.sample * a.out.sample_stride;
  const Coefficients<A>* of_class = fill_coefficients<kCrossEntropy>(v, a, share.sample, coefficients);

  for_each_tile<kOrder>(share, tile_voxels, [&](int64_t begin, int count) {
    load_tile<T>(v, rows, begin, count, tile, layout.tile_stride, tile_voxels);
    load_tile_labels(v, share.sample, begin, count, tile_voxels, labels, scale);
    __syncthreads();
    if (kActivation == Activation::kSoftmax) {
      A top;
      const SoftmaxSums<A> total = softmax_of_tile(tile, layout, labels, reduction, classes, tile_voxels, t, top);
      A weighted_others[1] = {A(0)};
      if (t.works) {
        for (int c = t.group; c < classes; c += layout.groups) {
          weighted_others[0] += tile[c * layout.tile_stride + t.voxel] * of_class[c].background;
        }
      }
      sum_over_groups(weighted_others, layout, reduction, tile_voxels, t);
      if (t.group == 0) {
        const int label = labels[t.voxel];
        const A u_target = of_class[label].foreground;
        const A inverse = label == kUncounted ? A(0) : reciprocal(total.target + total.others);
        SoftmaxGradient<A> gradient = softmax_gradient(total, weighted_others[0], u_target, inverse, scale[t.voxel]);
        if (kCrossEntropy) {
          gradient.add_cross_entropy(total, with_focal_slope(v, total, inverse, of_class[label].ce));
        }
        scale[t.voxel] = gradient.scale;
        offset[t.voxel] = gradient.offset;
        at_target[t.voxel] = gradient.at_target;
      }
      __syncthreads();
    }
    const auto gradient_at = [&](int c, int k) {
      const int label = labels[k];
      const A x = tile[c * layout.tile_stride + k];
      if (kActivation == Activation::kSoftmax) {
        const SoftmaxGradient<A> gradient{scale[k], offset[k], at_target[k]};
        return label == c ? gradient.at_target : gradient.other(x, of_class[c].background);
      }
      A dz = label == c + v.first_label ? of_class[c].foreground : of_class[c].background;
      if (kActivation == Activation::kSigmoid) {
        const A e = exponential(x < A(0) ? x : -x);
        dz = logistic_gradient(e, reciprocal(A(1) + e), dz);
      }
      return label == kUncounted ? A(0) : dz * scale[k];
    };
    if (in_packs(out + begin, a.out.class_stride, a.out.voxel_stride, count, tile_voxels)) {
      const int log_packs = log2_of(tile_voxels / kPack<T>);
      for (int i = thread; i < classes << log_packs; i += Plan::kThreads) {
        const int c = i >> log_packs, k = (i - (c << log_packs)) * kPack<T>;
        Packed<T, kPack<T>> dz;
#pragma unroll
        for (int q = 0; q < kPack<T>; ++q) dz.values[q] = static_cast<T>(gradient_at(c, k + q));
        store_packed(out + c * a.out.class_stride + begin + k, dz);
      }
      return;
    }
    T* first = out + begin * a.out.voxel_stride;
    for_each_element<1>(classes, tile_voxels, a.out.voxel_stride != 1, [&](int c, int k) {
      if (k < count) first[c * a.out.class_stride + k * a.out.voxel_stride] = static_cast<T>(gradient_at(c, k));
    });
  });
}

// Every class of a voxel with a target of its own, and all options of the cross-entropy.
template <typename T, Activation kActivation, bool kCrossEntropy>
__global__ void __launch_bounds__(Plan::kThreads, 2)
    general_gradient_pass_kernel(const Volume v, const GradientArguments a, const Blocks blocks, int tile_voxels) {
  using A = Compute<T>;
  const int classes = static_cast<int>(v.classes);
  const bool focal = kCrossEntropy && v.focal_gamma != 0;
  const TileLayout layout(classes, tile_voxels, Plan::kThreads);
  TK_SHARED(memory);
  A* tile = reinterpret_cast<A*>(memory);                    // [C][tile_stride]
  A* targets = tile + classes * layout.tile_stride;          // [C][tile_stride]
  A* reduction = targets + classes * layout.tile_stride;     // [3][groups][tile_voxels]
  A* weights = reduction + 3 * layout.groups * tile_voxels;  // [tile_voxels], and so on
  A* beyond_one = weights + tile_voxels;
  A* log_sum = beyond_one + tile_voxels;
  A* shift = log_sum + tile_voxels;
  A* excess = shift + tile_voxels;
  A* b_all = excess + tile_voxels;
  Coefficients<A>* coefficients = reinterpret_cast<Coefficients<A>*>(b_all + tile_voxels);  // [C + 1]
  int* labels = reinterpret_cast<int*>(coefficients + classes + 1);                         // [tile_voxels]

  const TileThread t(layout, tile_voxels);
  const Share share = share_of_block<kOrder>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  T* out = static_cast<T*>(a.out.data) + share.sample * a.out.sample_stride;
  const Coefficients<A>* u = fill_coefficients<kCrossEntropy>(v, a, share.sample, coefficients);

  for_each_tile<kOrder>(share, tile_voxels, [&](int64_t begin, int count) {
    // Bad labels and weights: the count pass has told of them, and the coefficients are NaN then.
    load_general_tile<T>(v, rows, share.sample, begin, count, tile, targets, layout.tile_stride, tile_voxels, labels,
                         weights);
    if (kActivation == Activation::kSoftmax) {
      const TopSums<A> total = top_of_tile(tile, layout, reduction, classes, tile_voxels, t);
      if (t.group == 0) {
        beyond_one[t.voxel] = total.beyond_one();
        log_sum[t.voxel] = focal ? log_one_plus(total.beyond_one()) : A(0);
      }
      __syncthreads();
      A sums[3] = {A(0), A(0), A(0)};  // rest_u, top_u and the sum of b
      if (t.works) {
        const A inverse = reciprocal(A(1) + beyond_one[t.voxel]);
        for (int c = t.group; c < classes; c += layout.groups) {
          const A below_top = tile[c * layout.tile_stride + t.voxel], g = targets[c * layout.tile_stride + t.voxel];
          const Probability<A> p = dense_probability(below_top, beyond_one[t.voxel], inverse);
          const A slope = overlap_slope(p, g, u[c].background, u[c].foreground, v.overlap);
          sums[0] += below_top == A(0) ? A(0) : p.p * slope;
          sums[1] += below_top == A(0) ? slope : A(0);
          if (kCrossEntropy) sums[2] += cross_entropy_slope(v, u[c], p, g, below_top + log_sum[t.voxel]);
        }
      }
      sum_over_groups(sums, layout, reduction, tile_voxels, t);
      if (t.group == 0) {
        const DenseSoftmaxGradient<A> gradient =
            dense_softmax_gradient(sums[0], sums[1], beyond_one[t.voxel], reciprocal(A(1) + beyond_one[t.voxel]));
        shift[t.voxel] = gradient.shift;
        excess[t.voxel] = gradient.excess;
        b_all[t.voxel] = sums[2];
      }
      __syncthreads();
    }
    T* first = out + begin * a.out.voxel_stride;
    for_each_element<1>(classes, tile_voxels, a.out.voxel_stride != 1, [&](int c, int k) {
      if (k >= count) return;
      const A x = tile[c * layout.tile_stride + k], g = targets[c * layout.tile_stride + k];
      A dz;
      if constexpr (kActivation == Activation::kSoftmax) {
        const Probability<A> p = dense_probability(x, beyond_one[k], reciprocal(A(1) + beyond_one[k]));
        const DenseSoftmaxGradient<A> gradient{shift[k], excess[k]};
        dz = gradient.overlap(p.p, overlap_slope(p, g, u[c].background, u[c].foreground, v.overlap));
        if (kCrossEntropy) {
          dz += softmax_cross_entropy_gradient(p, cross_entropy_slope(v, u[c], p, g, x + log_sum[k]), b_all[k]);
        }
      } else {
        dz = channel_gradient<kActivation, kCrossEntropy>(v, u[c], x, g);
      }
      dz = labels[k] == kUncounted ? A(0) : dz * weights[k];
      first[c * a.out.class_stride + k * a.out.voxel_stride] = static_cast<T>(dz);
    });
  });
}

// Channels by themselves, with any target: a block takes one channel, its threads kVoxels voxels at once.
template <typename T, Activation kActivation, bool kCrossEntropy>
__global__ void __launch_bounds__(Plan::kThreads, kCrossEntropy ? 2 : kChannelBlocks<T>)
    channel_gradient_pass_kernel(const Volume v, const GradientArguments a, const Blocks blocks) {
  using A = Compute<T>;
  constexpr int kVoxels = kChannelVoxels<T>, kPacks = kVoxels / kPack<T>;
  const ChannelShare of_channel = channel_share_of_block<kOrder>(v, blocks);
  const Share share = of_channel.share;
  const int64_t channel = of_channel.channel;
  const T* row =
      static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride + channel * v.logits.class_stride;
  T* out = static_cast<T*>(a.out.data) + share.sample * a.out.sample_stride + channel * a.out.class_stride;
  const Coefficients<A> u = coefficients_of<A, kCrossEntropy>(v, a, share.sample, channel);
  bool bad = false;  // the count pass has told of it, and the coefficients are NaN then
  for_each_own<kOrder, kVoxels>(share, [&](int64_t at) {
    Logits<T, kPack<T>> packs[kPacks];
    Packed<T, kPack<T>> slopes[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs[i] = load_logits<T, kPack<T>>(row + at + i * kPack<T>);
    const auto z = [&](int k) { return packs[k / kPack<T>].at(k % kPack<T>); };
    const auto store = [&](int k, A dz) { slopes[k / kPack<T>].values[k % kPack<T>] = static_cast<T>(dz); };
    A g[kVoxels], weights[kVoxels];
    int labels[kVoxels];
    const bool all_count = load_channel(v, share.sample, channel, at, g, labels, weights, bad);
    bool done = false;
    if constexpr (kMayBePlain<kActivation, A>) {
      // Asked for here: a register that holds the answer from before the loop is one too many.
      done = all_count && has_plain_channels(v) && are_plain(z, g, kCrossEntropy && v.focal_gamma != 0);
      if (done) plain_channel_gradient<kCrossEntropy>(v, u, z, g, store);
    }
    if (!done) {
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) {
        const A slope = channel_gradient<kActivation, kCrossEntropy>(v, u, z(k), g[k]);
        store(k, labels[k] == kUncounted ? A(0) : slope * weights[k]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) store_packed(out + at + i * kPack<T>, slopes[i]);
  });
}

struct GradientPass {
  const Volume& v;
  const Plan& plan;
  const GradientArguments& a;
  cudaStream_t stream;

  template <typename T, int kClasses, CrossEntropy kCeForm, bool kSquared, bool kInterleaved>
  void few() const {
    launch(gradient_pass_kernel<T, kClasses, kCeForm, kSquared, kInterleaved>);
  }
  template <typename T, int kClasses, CrossEntropy kCeForm, bool kSquared, int kTurns>
  void split() const {
    launch(split_gradient_pass_kernel<T, kClasses, kCeForm, kSquared, kTurns>, plan.shape());
  }
  template <typename T, int kClasses, bool kCrossEntropy>
  void general_split() const {
    launch(general_split_gradient_pass_kernel<T, kClasses, kCrossEntropy>, plan.shape());
  }
  template <typename T, int kClasses, bool kCrossEntropy>
  void dense_split() const {
    launch(dense_split_gradient_pass_kernel<T, kClasses, kCrossEntropy>, plan.shape());
  }
  template <typename T, Activation kActivation, bool kCrossEntropy>
  void channel() const {
    launch(channel_gradient_pass_kernel<T, kActivation, kCrossEntropy>);
  }
  template <typename T, Activation kActivation, bool kCrossEntropy>
  void general() const {
    launch(general_gradient_pass_kernel<T, kActivation, kCrossEntropy>, plan.voxels);
  }
  template <typename T, Activation kActivation, bool kCrossEntropy>
  void tiled() const {
    launch(tiled_gradient_pass_kernel<T, kActivation, kCrossEntropy>, plan.voxels);
  }

 private:
  template <typename Kernel, typename... More>
  void launch(Kernel kernel, More... more) const {
    allow_shared_bytes(kernel, plan.shared_bytes);
    TK_LAUNCH((kernel), grid_of(v, plan), dim3(Plan::kThreads), plan.shared_bytes, stream, v, a, plan.blocks, more...);
  }
};

}  // namespace

void launch_gradient_pass(const Volume& v, const Plan& plan, const GradientArguments& a, cudaStream_t stream) {
  with_kernel(v, plan, GradientPass{v, plan, a, stream});
}

}  // namespace cuda
}  // namespace tversky_kernels
