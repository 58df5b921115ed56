// A voxel and class with a target g of its own (Volume::is_general), and all options of the cross-entropy.
#pragma once

#include "launch.h"
#include "voxels.cuh"

namespace tversky_kernels {
namespace cuda {

template <typename A>
__device__ __forceinline__ Probability<A> sigmoid(A z) {
  const A e = exponential(z < A(0) ? z : -z);
  return logistic(z < A(0), e, reciprocal(A(1) + e));
}

// -log sigmoid(z) and -log(1 - sigmoid(z)): each is a common part and one of these.
template <typename A>
__device__ __forceinline__ A sigmoid_log_common(A z) {
  return log_one_plus_small(exponential(-magnitude(z)));
}
template <typename A>
__device__ __forceinline__ A positive_part(A z) {
  return z > A(0) ? z : A(0);
}

// A term of the cross-entropy times its focal factor.
template <typename A>
__device__ __forceinline__ A with_focal_factor(const Volume& v, A complement, A term) {
  return v.focal_gamma != 0 ? term * focal_factor(complement, static_cast<A>(v.focal_gamma), FocalPower{}) : term;
}

// dL/dCE of a softmax's label, changed by the focal exponent: see focal_slope.
template <typename A>
__device__ __forceinline__ A with_focal_slope(const Volume& v, const SoftmaxSums<A>& sums, A inverse, A k_target) {
  if (v.focal_gamma == 0) return k_target;
  const Probability<A> p{sums.target * inverse, sums.others * inverse};
  const A minus_log_p = log_one_plus(sums.others * reciprocal(exponential_for_focal_slope(sums.target)));
  return k_target * focal_slope(p, minus_log_p, static_cast<A>(v.focal_gamma), FocalPower{});
}

// Whether a target is 0 or 1, so that a binary cross-entropy has one term.
template <typename A>
__device__ __forceinline__ bool is_hard(const Volume& v, A g) {
  return v.cross_entropy != CrossEntropy::kSmoothed && (!v.dense || g == A(0) || g == A(1));
}

// S (1 - p) of a class, from its exponential e and S - 1, where S is the sum of all. For the largest, whose e is 1,
// nothing cancels. Any other e is a part of S - 1.
template <typename A>
__device__ __forceinline__ A unscaled_complement(A e, A beyond_one) {
  return (A(1) - e) + beyond_one;
}

// p and 1 - p of a softmax, from z_top - z; beyond_one: the sum of the exponentials - 1, inverse: 1 / that sum.
template <typename A>
__device__ __forceinline__ Probability<A> dense_probability(A below_top, A beyond_one, A inverse) {
  const A e = exponential(-below_top);
  return {e * inverse, unscaled_complement(e, beyond_one) * inverse};
}

// p and 1 - p of a channel by itself.
template <Activation kActivation, typename A>
__device__ __forceinline__ Probability<A> channel_probability(A x) {
  static_assert(kActivation != Activation::kSoftmax, "its channels depend on each other");
  if (kActivation == Activation::kSigmoid) return sigmoid(x);
  return {x, A(1) - x};
}

// Whether a value of a dense target is outside [0, 1] (NaN is); and the same only where targets are checked.
template <typename A>
__device__ __forceinline__ bool is_outside(A g) {
  return !(g >= A(0) && g <= A(1));
}
template <typename A>
__device__ __forceinline__ bool is_bad_target(const Volume& v, A g) {
  return v.checks_targets && is_outside(g);
}

// The counts of one class.
template <typename A>
struct GeneralSums {
  A tp{}, fp{}, fn{}, ce{}, smoothing{}, voxels{};

  __device__ __forceinline__ void add_overlap(const Volume& v, const Probability<A>& p, A g, A weight) {
    const Overlap<A> overlap = overlap_of(p, g, v.overlap);
    tp += overlap.tp * weight;
    fp += overlap.fp * weight;
    fn += overlap.fn * weight;
  }
  // A class of a softmax. minus_log_p is not read without a cross-entropy.
  template <bool kCrossEntropy>
  __device__ __forceinline__ void add(const Volume& v, const Probability<A>& p, A minus_log_p, A g, A weight) {
    add_overlap(v, p, g, weight);
    if (!kCrossEntropy) return;
    const A term = with_focal_factor(v, p.complement, minus_log_p);
    if (g != A(0)) ce += g * term * weight;  // without g it may be infinite, and is not wanted
    if (v.cross_entropy == CrossEntropy::kSmoothed) smoothing += term * weight;
    voxels += v.sums_label_weights() ? g * weight : weight;
  }
  // The same from z_top - z. log_sum: read with a cross-entropy.
  __device__ __forceinline__ void add_below_top(const Volume& v, A below_top, A beyond_one, const A& log_sum, A g,
                                                A weight, bool cross_entropy) {
    const Probability<A> p = dense_probability(below_top, beyond_one, reciprocal(A(1) + beyond_one));
    if (cross_entropy) {
      add<true>(v, p, below_top + log_sum, g, weight);
    } else {
      add<false>(v, p, A(0), g, weight);
    }
  }
  // A channel by itself, from its logit.
  template <Activation kActivation>
  __device__ __forceinline__ void add_channel(const Volume& v, A x, A g, A weight) {
    const Probability<A> p = channel_probability<kActivation>(x);
    add_overlap(v, p, g, weight);
    if (kActivation != Activation::kSigmoid || v.cross_entropy == CrossEntropy::kNone) return;
    voxels += weight;
    const A common = sigmoid_log_common(x);
    if (is_hard(v, g)) {
      const bool is_one = g != A(0);
      const A term = common + positive_part(is_one ? -x : x);
      ce += with_focal_factor(v, of_outcome(is_one, p).complement, term) * weight;
      return;
    }
    const A of_one = with_focal_factor(v, p.complement, common + positive_part(-x));
    const A of_zero = with_focal_factor(v, p.p, common + positive_part(x));
    // Without g a term may be infinite, and is not wanted.
    if (g != A(0)) ce += g * of_one * weight;
    if (g != A(1)) ce += (A(1) - g) * of_zero * weight;
    if (v.cross_entropy == CrossEntropy::kSmoothed) smoothing += (of_one + of_zero) * weight;
  }
};

// dL/dp of a class where g = 0 and where g = 1, dL/dCE and dL/dsmoothing.
template <typename A>
struct Coefficients {
  A background, foreground, ce, smoothing;
};

// b of a class: the cross-entropy's part of its slope. minus_log_p: read where there is a focal exponent.
template <typename A>
__device__ __forceinline__ A cross_entropy_slope(const Volume& v, const Coefficients<A>& u, const Probability<A>& p,
                                                 A g, A minus_log_p) {
  A b = g * u.ce + u.smoothing;
  if (v.focal_gamma != 0) b *= focal_slope(p, minus_log_p, static_cast<A>(v.focal_gamma), FocalPower{});
  return b;
}

// A class's part of rest_u, top_u and the sum of b, which the gradient of a softmax needs of all classes. log_sum: read
// with a cross-entropy.
template <typename A>
__device__ __forceinline__ void add_slopes(const Volume& v, const Coefficients<A>& u, const Probability<A>& p,
                                           A below_top, const A& log_sum, A g, bool cross_entropy, A (&sums)[3]) {
  const A slope = overlap_slope(p, g, u.background, u.foreground, v.overlap);
  sums[0] += below_top == A(0) ? A(0) : p.p * slope;
  sums[1] += below_top == A(0) ? slope : A(0);
  if (cross_entropy) sums[2] += cross_entropy_slope(v, u, p, g, below_top + log_sum);
}

// dL/dz of a class of a softmax. log_sum and b_all: read with a cross-entropy.
template <typename A>
__device__ __forceinline__ A class_gradient(const Volume& v, const Coefficients<A>& u, const Probability<A>& p,
                                            A below_top, const A& log_sum, A g, const DenseSoftmaxGradient<A>& gradient,
                                            const A& b_all, bool cross_entropy) {
  A dz = gradient.overlap(p.p, overlap_slope(p, g, u.background, u.foreground, v.overlap));
  if (cross_entropy) {
    dz += softmax_cross_entropy_gradient(p, cross_entropy_slope(v, u, p, g, below_top + log_sum), b_all);
  }
  return dz;
}

// dL/dz of a channel by itself.
template <Activation kActivation, bool kCrossEntropy, typename A>
__device__ __forceinline__ A channel_gradient(const Volume& v, const Coefficients<A>& u, A x, A g) {
  const Probability<A> p = channel_probability<kActivation>(x);
  A dz = overlap_slope(p, g, u.background, u.foreground, v.overlap);
  if (kActivation == Activation::kSigmoid) dz *= p.p * p.complement;
  if (kCrossEntropy) {
    const A common = v.focal_gamma != 0 ? sigmoid_log_common(x) : A(0);  // else it is not read
    if (is_hard(v, g)) {
      const bool is_one = g != A(0);
      const Probability<A> right = of_outcome(is_one, p);
      const A slope =
          right.complement * cross_entropy_slope(v, u, right, A(1), common + positive_part(is_one ? -x : x));
      return dz + (is_one ? -slope : slope);
    }
    const Probability<A> not_p{p.complement, p.p};
    const A of_one = cross_entropy_slope(v, u, p, g, common + positive_part(-x));
    const A of_zero = cross_entropy_slope(v, u, not_p, A(1) - g, common + positive_part(x));
    dz += p.p * of_zero - p.complement * of_one;
  }
  return dz;
}

// ---- The channels of a sigmoid with the most common options: overlaps that are products, no weights, a cross-entropy
// without smoothing, and no focal exponent but 2. The options are looked at once for all voxels of a thread.

// Whether a kernel can have these options, and whether a launch has them.
template <Activation kActivation, typename A>
constexpr bool kMayBePlain = kActivation == Activation::kSigmoid && sizeof(A) == 4;
__device__ __forceinline__ bool has_plain_channels(const Volume& v) {
  return v.overlap == OverlapForm::kProduct && v.weight.data == nullptr && v.cross_entropy != CrossEntropy::kSmoothed &&
         (v.cross_entropy == CrossEntropy::kNone || v.focal_gamma == 0 || v.focal_gamma == 2);
}

// Whether these voxels allow it: no logit is so large that e^-z, or its product with 0, is no number; and with a focal
// exponent all targets are 0 or 1.
template <typename A, int kVoxels, typename Z>
__device__ __forceinline__ bool are_plain(const Z& z, const A (&g)[kVoxels], bool focal) {
  A largest = A(0), between = A(0);
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) largest = larger(largest, magnitude(z(k)));
  if (focal) {
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) between = larger(between, magnitude(g[k] - g[k] * g[k]));
  }
  return largest <= A(80) && between == A(0);
}

// p and 1 - p.
template <typename A>
struct PlainSigmoid : Probability<A> {
  __device__ __forceinline__ explicit PlainSigmoid(A x) {
    const A e = exponential(-x);
    this->p = reciprocal(A(1) + e);
    this->complement = e * this->p;
  }
};
// And -log of the probability of the target: -log(max(p, 1 - p)) + max(z, 0) - g z. One multiply-add, in which nothing
// cancels.
template <typename A>
struct PlainSigmoidWithLog : PlainSigmoid<A> {
  A minus_log;

  __device__ __forceinline__ PlainSigmoidWithLog(A x, A g) : PlainSigmoid<A>(x) {
    minus_log = minus_log_one_minus_small(smaller(this->p, this->complement)) + fma(-g, x, larger(x, A(0)));
  }
};

template <typename A, int kVoxels, typename Z>
__device__ __forceinline__ void add_plain_channel(const Volume& v, const Z& z, const A (&g)[kVoxels],
                                                  GeneralSums<A>& sums) {
  const auto add_overlap = [&](const PlainSigmoid<A>& of, A target) {
    const Overlap<A> overlap = overlap_of<A>(of, target, OverlapForm::kProduct);
    sums.tp += overlap.tp;
    sums.fp += overlap.fp;
    sums.fn += overlap.fn;
  };
  if (v.cross_entropy == CrossEntropy::kNone) {
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) add_overlap(PlainSigmoid<A>(z(k)), g[k]);
    return;
  }
  sums.voxels += A(kVoxels);
  if (v.focal_gamma == 0) {
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      const PlainSigmoidWithLog<A> of(z(k), g[k]);
      add_overlap(of, g[k]);
      sums.ce += of.minus_log;
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
    const PlainSigmoidWithLog<A> of(z(k), g[k]);
    add_overlap(of, g[k]);
    const A wrong = g[k] != A(0) ? of.complement : of.p;
    sums.ce += of.minus_log * (wrong * wrong);
  }
}

template <bool kCrossEntropy, typename A, int kVoxels, typename Z, typename F>
__device__ __forceinline__ void plain_channel_gradient(const Volume& v, const Coefficients<A>& u, const Z& z,
                                                       const A (&g)[kVoxels], const F& store) {
  const auto overlap = [&](const PlainSigmoid<A>& of, A target) {
    return overlap_slope<A>(of, target, u.background, u.foreground, OverlapForm::kProduct) * (of.complement * of.p);
  };
  if (kCrossEntropy && v.focal_gamma != 0) {
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      const PlainSigmoidWithLog<A> of(z(k), g[k]);
      const bool is_one = g[k] != A(0);
      const Probability<A> right = of_outcome<A>(is_one, of);
      const A slope = right.complement * (u.ce * focal_slope(right, of.minus_log, A(2), FocalPower{}));
      store(k, overlap(of, g[k]) + (is_one ? -slope : slope));
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
    const PlainSigmoid<A> of(z(k));
    A dz = overlap(of, g[k]);
    if (kCrossEntropy) dz += u.ce * (of.p * (A(1) - g[k]) - of.complement * g[k]);
    store(k, dz);
  }
}

// The targets of neighbouring voxels in one channel, their labels (only kUncounted has a meaning) and weights. True:
// all voxels count.
template <typename A, int kVoxels>
__device__ __forceinline__ bool load_channel(const Volume& v, int64_t sample, int64_t c, int64_t voxel, A (&g)[kVoxels],
                                             int (&labels)[kVoxels], A (&weights)[kVoxels], bool& bad) {
  if (v.dense) {
    const int64_t start = sample * v.target.sample_stride + c * v.target.class_stride;
    if (v.target.resampling.active) {
      int64_t at[kVoxels];
      source_offsets<Reads::kResampled>(v.target.resampling, voxel, at);
      load_values_at(v.target, start, at, g);
    } else {
      load_values<true>(v.target, start, voxel, v.target.voxel_stride, g);
    }
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) labels[k] = 0;
    return weigh<Reads::kResampled>(v, sample, voxel, labels, weights, true, bad);
  }
  const LabelRow<Reads::kResampled, kVoxels> row(v, sample * v.target.sample_stride);
  const bool all_count = load_voxels(v, row, sample, voxel, labels, weights, bad);
  const int own = static_cast<int>(c) + v.first_label;
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) g[k] = labels[k] == own ? A(1) : A(0);
  return all_count;
}

}  // namespace cuda
}  // namespace tversky_kernels
