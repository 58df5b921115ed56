// The family "split_targets": a softmax where every class has a target of its own, split over lanes as in split.cuh.
// Dense targets of the logits' size whose overlaps are products have kernels of their own, up to 160 classes. The
// kernels for the rest look at every option for every logit, up to 128 classes. float32 and half precision.
#include <algorithm>

#include "coefficients.cuh"
#include "counting.cuh"
#include "dispatch.h"
#include "families.h"
#include "split.cuh"

namespace tversky_kernels {
namespace cuda {
namespace {

// The most lanes that share a voxel, and the most classes of one.
constexpr int kMostLanesGeneral = 32, kMostOfLaneGeneral = 4, kMostOfLaneDense = 5;
// kAhead for a dense target and its logits, and blocks of a multiprocessor. Two classes take few registers: so many
// blocks run that some work while others wait.
template <typename T, int kClasses, bool kGradient>
constexpr bool kDenseAhead = kClasses > 2 && kAhead<T, kGradient>;
template <int kClasses, bool kGradient>
constexpr int kDenseBlocks = kClasses > 2 ? kSplitBlocks
                             : kGradient  ? 3
                                          : 4;

// Calls f with the most classes of a lane as a constant.
template <typename F>
void with_general_split_classes(int64_t classes, F&& f) {
  if (classes <= 2) {
    f(std::integral_constant<int, 2>{});
  } else {
    f(std::integral_constant<int, kMostOfLaneGeneral>{});
  }
}
template <typename F>
void with_dense_split_classes(int64_t classes, int lanes, F&& f) {
  if (classes <= lanes * kMostOfLaneGeneral) return with_general_split_classes(classes, f);
  f(std::integral_constant<int, kMostOfLaneDense>{});
}

// The counts of a block whose threads have the counts of their lane's classes.
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
  const Share share = share_of_block<Order::kBackward>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  GeneralSums<A> counts[kClasses];
  bool bad = false;
  for_each_pack<Order::kBackward>(share, lane, [&](int64_t at) {
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

// A target of its own for every class, by products: see Plan::by_products.
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
  const Share share = share_of_block<Order::kBackward>(v, blocks);
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
  for_each_pack_ahead<Order::kBackward>(share, lane, expect, [&](int64_t at, int64_t next) {
    Logits<T, kVoxels> z[kClasses];
    A g[kClasses][kVoxels], weights[kVoxels];
    pack.load(v, rows, targets, lane, share.sample, at, next, z, g, weights, bad);
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) bad |= is_bad_target(v, g[j][k]);  // 0 where a voxel does not count
    }
    if constexpr (kClasses == 2) {
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) {
        const A z0 = z[0].at(k), z1 = z[1].at(k), weight = weights[k];
        const A d = two_class_logit(z0, z1, larger(z0, z1)), e = exponential(-magnitude(d));
        const Probability<A> p = logistic(d < A(0), e, reciprocal(A(1) + e));  // of the second class
        const A second = p.p * weight, first = p.complement * weight;
        add(0, g[0][k], first, second);
        add(1, g[1][k], second, first);
        if (kCrossEntropy) {
          const A common = log_one_plus_small(e);
          weight_sum += weight;
          // Without g it may be infinite, and must not be added.
          if (g[0][k] != A(0)) counts[0].ce += (g[0][k] * weight) * (common + larger(d, A(0)));
          if (g[1][k] != A(0)) counts[1].ce += (g[1][k] * weight) * (common + larger(-d, A(0)));
        }
      }
    } else {
      A e[kClasses][kVoxels], beyond_one[kVoxels];
      top_of_split<Combine::kSteps>(z, lane, beyond_one, [&](int j, int k, A below_top, A exponential_of) {
        e[j][k] = exponential_of;
        // -log p = below_top + log S. Without g it may be infinite, and must not be added.
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
  const Share share = share_of_block<Order::kForward>(v, blocks);
  const Coefficients<A>* of_class =
      fill_coefficients<kCrossEntropy>(v, a, share.sample, lane.beyond_exchange<Coefficients<A>>(memory));
  __syncthreads();

  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  Coefficients<A> u[kClasses] = {};
#pragma unroll
  for (int j = 0; j < kClasses; ++j) {
    if (lane.has<kClasses>(j)) u[j] = of_class[lane.class_of(j)];
  }
  bool bad = false;  // the count pass has reported it, and the coefficients are NaN then
  const bool focal = kCrossEntropy && v.focal_gamma != 0;
  for_each_pack<Order::kForward>(share, lane, [&](int64_t at) {
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

// A target of its own for every class, by products: see Plan::by_products.
template <typename T, int kClasses, bool kCrossEntropy>
__global__ void __launch_bounds__(Plan::kThreads, kDenseBlocks<kClasses, true>)
    dense_split_gradient_pass_kernel(const Volume v, const GradientArguments a, const Blocks blocks,
                                     const SplitShape shape) {
  using A = Compute<T>;
  constexpr int kVoxels = kSplitVoxels;
  const int classes = static_cast<int>(v.classes);
  TK_SHARED(memory);
  const SplitLane lane(shape, classes);
  const Share share = share_of_block<Order::kForward>(v, blocks);
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
  const auto ce_of = [&](int j) {  // from shared memory, because registers are few
    return lane.has<kClasses>(j) ? of_class[lane.class_of(j)].ce : A(0);
  };
  const auto slope_of = [&](int j, A target) {  // p does not decide it
    return overlap_slope(Probability<A>{}, target, u_background[j], u_foreground[j], OverlapForm::kProduct);
  };
  bool bad = false;  // the count pass has reported it, and the coefficients are NaN then
  DensePack<T, kClasses, kDenseAhead<T, kClasses, true>> pack(
      reinterpret_cast<unsigned char*>(coefficients + classes + 1), targets, lane);
  const auto expect = [&](int64_t at) { pack.expect(v, rows, targets, lane, at); };
  for_each_pack_ahead<Order::kForward>(share, lane, expect, [&](int64_t at, int64_t next) {
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
      // With five classes in a lane and a cross-entropy there are no registers left for steps.
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

// Calls f(type, classes, has_cross_entropy, by_products).
template <typename F>
void with_split_targets(const Volume& v, const Plan& plan, F&& f) {
  with_logits_type(v.logits.type, [&](auto element) {
    if constexpr (sizeof(element) < 8) {
      with_bool(v.cross_entropy != CrossEntropy::kNone, [&](auto has_cross_entropy) {
        if (plan.by_products) {
          with_dense_split_classes(v.classes, plan.lanes,
                                   [&](auto classes) { f(element, classes, has_cross_entropy, std::true_type{}); });
        } else {
          with_general_split_classes(v.classes,
                                     [&](auto classes) { f(element, classes, has_cross_entropy, std::false_type{}); });
        }
      });
    }
  });
}

bool is_dense_by_products(const Volume& v) {
  return v.dense && v.overlap == OverlapForm::kProduct && v.cross_entropy != CrossEntropy::kSmoothed &&
         (v.cross_entropy == CrossEntropy::kNone || v.focal_gamma == 0) && !is_resampled(v);
}

template <typename T>
bool plan_of(const Volume& v, const GradientView* out, Plan& plan) {
  plan.voxels = kSplitVoxels;
  plan.by_products = is_dense_by_products(v);
  const int most_of_lane = plan.by_products ? kMostOfLaneDense : kMostOfLaneGeneral;
  plan.lanes = split_lanes(v.classes, kMostLanesGeneral, most_of_lane);
  if (v.activation != Activation::kSoftmax || v.classes < 2 || plan.lanes == 0) return false;
  if (!can_be_read(v, sizeof(T), plan.voxels)) return false;
  int64_t values = Plan::kThreads / kWarp * plan.lanes * v.count_columns() * most_of_lane;
  int packs = 0;
  if (plan.by_products) {
    with_dense_split_classes(v.classes, plan.lanes, [&](auto of_lane) {
      constexpr int kClasses = decltype(of_lane)::value;
      if (!(out == nullptr ? kDenseAhead<T, kClasses, false> : kDenseAhead<T, kClasses, true>)) return;
      const int bytes = bytes_of(v.target.type) <= 4 ? bytes_of(v.target.type) : 0;  // the others are not copied ahead
      // The sums take the place of the packs.
      const int sums = out == nullptr ? static_cast<int>(values * sizeof(Compute<T>)) : 0;
      packs = std::max(0, kClasses * (static_cast<int>(sizeof(T)) + bytes) * kSplitVoxels * Plan::kThreads - sums);
    });
  }
  if (out != nullptr) values = kAllCoefficients * (v.classes + 1);
  share_over_warps(plan, values);
  plan.shared_bytes = static_cast<int>(values * sizeof(Compute<T>)) + packs;
  return true;
}

bool plan_split_targets(const Volume& v, const GradientView* out, Plan& plan) {
  bool takes = false;
  with_logits_type(v.logits.type, [&](auto element) {
    if constexpr (sizeof(element) < 8) takes = plan_of<decltype(element)>(v, out, plan);
  });
  return takes;
}

int blocks_split_targets(const Volume& v, const Plan& plan, bool gradient, int64_t) {
  if (gradient) return gradient_blocks(v);
  return v.classes == 2 && plan.by_products ? 4 : 6;
}

void count_split_targets(const CountLaunch& launch) {
  with_split_targets(launch.v, launch.plan, [&](auto element, auto classes, auto ce, auto by_products) {
    using T = decltype(element);
    constexpr int kClasses = decltype(classes)::value;
    constexpr bool kCrossEntropy = decltype(ce)::value;
    if constexpr (decltype(by_products)::value) {
      launch.template run<T>(dense_split_count_pass_kernel<T, kClasses, kCrossEntropy>, SplitShape(launch.plan));
    } else {
      launch.template run<T>(general_split_count_pass_kernel<T, kClasses, kCrossEntropy>, SplitShape(launch.plan));
    }
  });
}

void gradient_split_targets(const GradientLaunch& launch) {
  with_split_targets(launch.v, launch.plan, [&](auto element, auto classes, auto ce, auto by_products) {
    using T = decltype(element);
    constexpr int kClasses = decltype(classes)::value;
    constexpr bool kCrossEntropy = decltype(ce)::value;
    if constexpr (decltype(by_products)::value) {
      launch.run(dense_split_gradient_pass_kernel<T, kClasses, kCrossEntropy>, SplitShape(launch.plan));
    } else {
      launch.run(general_split_gradient_pass_kernel<T, kClasses, kCrossEntropy>, SplitShape(launch.plan));
    }
  });
}

}  // namespace

const Family kSplitTargets{"split_targets",       false, plan_split_targets, blocks_split_targets, count_split_targets,
                           gradient_split_targets};

}  // namespace cuda
}  // namespace tversky_kernels
