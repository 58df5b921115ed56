// The mathematics of softmax + Tversky loss, one definition for host and device.
//
// With p = softmax(z) or sigmoid(z), g the one-hot target and u_c = dL/dp_c (see docs/mathematics.md):
//
//   counts     TP_c = sum p_c g_c,  FP_c = sum p_c (1 - g_c),  FN_c = sum (1 - p_c) g_c   (OverlapForm has others)
//   index      1 - TI = (alpha FP + beta FN + s_dr - s_nr) / (TP + alpha FP + beta FN + s_dr)
//   gradient   softmax  dz_c = p_c (u_c - sum_k p_k u_k)        sigmoid  dz_c = p_c (1 - p_c) u_c
//
// and, with k_c = dL/dCE_c, for the cross-entropy of a softmax with label t: dz_c = k_t (p_c - [c = t]).
//
// V is a scalar (CUDA: one voxel a thread) or a compiler vector (CPU: one voxel a lane), M the type of its comparisons.
// `mask ? a : b` works on both. Exponentials and loads are the caller's: they differ by machine.
#pragma once

#if defined(__CUDACC__)
#define TK_MATH __host__ __device__ __forceinline__
#else
#define TK_MATH inline __attribute__((always_inline))
#endif

namespace tversky_kernels {

enum class Activation : int { kSoftmax = 0, kSigmoid = 1, kNone = 2 };
enum class Absent : int { kKeep = 0, kZero = 1, kSkip = 2 };
enum class Reduction : int { kNone = 0, kSum = 1, kMean = 2 };
enum class CrossEntropy : int { kNone = 0, kPlain = 1, kSmoothed = 2 };
// What happens to labels and weights out of range, and to values of a dense target outside [0, 1]. kIgnore: labels and
// weights make the counts NaN; a dense target may hold anything. kPoison: all of them make the counts NaN. kRaise: they
// raise an error where the kernels run on the host; elsewhere as kPoison.
enum class Check : int { kIgnore = 0, kPoison = 1, kRaise = 2 };
// How a voxel's part of TP, FP and FN is measured: by products, by |p - g|, or by (p - g)^2. The last needs alpha =
// beta.
enum class OverlapForm : int { kProduct = 0, kAbsolute = 1, kSquared = 2 };
// The divisor of the mean cross-entropy: sum w b_label, sum w, or C sum w. kLabels is sum w b_label, too: for overlaps
// of which tp + fn is not the weight of a label, so that column kVoxels holds it.
enum class CeMean : int { kClassWeights = 0, kVoxels = 1, kChannels = 2, kLabels = 3 };

// The columns of the counts table, without and with a cross-entropy. kCe: sum g (-log p). kSmoothing: sum (-log p),
// zero without label smoothing. kVoxels: the sum of the voxels' weights, the same for every class (but see
// Volume::sums_label_weights).
enum Count : int { kTp, kFp, kFn, kCe, kSmoothing, kVoxels, kOverlapCounts = 3, kAllCounts = 6 };
// The columns of the coefficients: dL/dp where g = 0 and where g = 1, dL/dCE and dL/dsmoothing.
enum Coefficient : int {
  kBackground,
  kForeground,
  kCeCoefficient,
  kSmoothingCoefficient,
  kOverlapCoefficients = 2,
  kAllCoefficients = 4
};

// ---- One voxel

// p and 1 - p of a binary outcome. Neither is made by a subtraction.
template <typename V>
struct Probability {
  V p, complement;
};

// p and 1 - p of the outcome that the target names.
template <typename V, typename M>
TK_MATH Probability<V> of_outcome(M is_one, const Probability<V>& p) {
  return {is_one ? p.p : p.complement, is_one ? p.complement : p.p};
}

// The softmax over two classes is the sigmoid of z_1 - z_0. But +inf gives NaN, as in any softmax, so that an overflow
// of half precision is seen. top: the larger of the two.
template <typename V>
TK_MATH V two_class_logit(V z0, V z1, V top) {
  return (z1 - z0) + top * 0.0f;
}

// sigmoid(x) from e = exp(-|x|) and inverse = 1 / (1 + e).
template <typename V, typename M>
TK_MATH Probability<V> logistic(M x_is_negative, V e, V inverse) {
  const V small = e * inverse;
  return {x_is_negative ? small : inverse, x_is_negative ? inverse : small};
}

// dz = p (1 - p) u of a sigmoid, from e = exp(-|z|) and inverse = 1 / (1 + e). For a softmax over two classes, which is
// the sigmoid of z_1 - z_0: dz_1 = p_0 p_1 (u_1 - u_0) = -dz_0.
template <typename V>
TK_MATH V logistic_gradient(V e, V inverse, V u) {
  return ((e * inverse) * inverse) * u;
}

// The exponentials of one voxel's softmax. The target's stands apart from the others, so 1 - p_target is a sum of
// positive terms and keeps its relative accuracy as p_target -> 1.
template <typename V>
struct SoftmaxSums {
  V target{}, others{};

  // Adds class c's exponential; returns it where c is not the target (and the voxel counts), else 0.
  template <typename M>
  TK_MATH V add(M is_target, M is_other, V e) {
    const V other = is_other ? e : V{};
    others += other;
    target = is_target ? e : target;
    return other;
  }

  // The same for a class that is the target of no voxel here; 0 where the voxel does not count.
  TK_MATH V add_other(V e) {
    others += e;
    return e;
  }
};

// dz of a softmax with an index target t. A constant may be taken off every u without changing the gradient:
//   excess = sum_k p_k (u_k - shift),   dz_c = p_c (u_c - shift - excess)
// With shift = u_t the target's term drops out and nothing cancels as p_t -> 1; with shift = 0 nothing cancels where
// p_t is small. So the larger half of the probability decides.
template <typename V>
struct SoftmaxGradient {
  V scale;      // voxel weight / sum of exponentials: turns an exponential into a weighted probability
  V offset;     // -(shift + excess), and k_t
  V at_target;  // dz_t

  TK_MATH V other(V e, V u_background) const { return (e * scale) * (u_background + offset); }

  // Adds k_t times the gradient of the cross-entropy: k_t p_c, and -k_t (1 - p_t) at the target.
  TK_MATH void add_cross_entropy(const SoftmaxSums<V>& sums, V k_target) {
    offset += k_target;
    at_target -= k_target * (sums.others * scale);
  }
  // The same with label smoothing: every class has a part s_c, and s_all is their sum. For the other classes the caller
  // still subtracts s_c times the voxel weight.
  TK_MATH void add_smoothed_cross_entropy(const SoftmaxSums<V>& sums, V k_target, V s_target, V s_all) {
    offset += k_target + s_all;
    at_target += (sums.target * scale) * (s_all - s_target) - (sums.others * scale) * (k_target + s_target);
  }
};

// weighted_others = sum_{k != t} e_k u_k; inverse = 1 / (sums.target + sums.others), 0 where the voxel does not count.
template <typename V>
TK_MATH SoftmaxGradient<V> softmax_gradient(const SoftmaxSums<V>& sums, V weighted_others, V u_target, V inverse,
                                            V weight) {
  const V shift = sums.target > sums.others ? u_target : V{};
  const V above = u_target - shift;
  const V excess = (weighted_others + above * sums.target - shift * sums.others) * inverse;
  const V scale = inverse * weight;
  return {scale, -shift - excess, (sums.target * scale) * (above - excess)};
}

// OverlapForm::kSquared with an index target. A voxel adds p^2 to the FP of every other class and (1 - p)^2 to the FN
// of its target. These are the slopes.
template <bool kSquared, typename V>
TK_MATH V error_of(V p) {
  return kSquared ? p * p : p;
}
template <bool kSquared, typename V>
TK_MATH V slope_of_other(V p, V u_background) {
  return kSquared ? (2 * p) * u_background : u_background;
}
template <typename V>
TK_MATH V squared_slope_of_target(V complement, V u_background, V u_foreground) {
  return u_foreground - (2 * complement) * u_background;
}

// -log p_t = (z_top - z_t) + log(sum of exponentials). This is the sum of exponentials - 1, where the largest one is 1,
// for log1p: it keeps its relative accuracy as p_t -> 1.
template <typename V>
TK_MATH V exponentials_beyond_one(const SoftmaxSums<V>& sums) {
  return sums.others + (sums.target - 1);
}

// ---- One voxel and class with a target g of its own, between 0 and 1

// The exponentials of one voxel's softmax. Those of the largest logit (1 each; several in a tie) stand apart from the
// others, so 1 - p of the largest is a sum of positive terms.
template <typename V>
struct TopSums {
  V rest{}, tops{};

  template <typename M>
  TK_MATH void add(M is_top, V e) {
    rest += is_top ? V{} : e;
    tops += is_top ? e : V{};
  }
  TK_MATH void add(bool is_top, V e) {  // without selections
    if (is_top) {
      tops += e;
    } else {
      rest += e;
    }
  }
  TK_MATH V beyond_one() const { return rest + (tops - 1); }  // sum of exponentials - 1
};

// tp, fp and fn that one voxel adds, before its weight.
template <typename V>
struct Overlap {
  V tp, fp, fn;
};

// p - g, by 1 - p where that is more accurate.
template <typename V>
TK_MATH V difference_of(const Probability<V>& p, V g) {
  return g >= 0.5f ? (1 - g) - p.complement : p.p - g;
}

template <typename V>
TK_MATH Overlap<V> overlap_of(const Probability<V>& p, V g, OverlapForm form) {
  if (form == OverlapForm::kProduct) return {p.p * g, p.p * (1 - g), p.complement * g};
  const V d = difference_of(p, g);
  // Every comparison with NaN is false, and its second value is NaN then.
  if (form == OverlapForm::kSquared) return {p.p * g, d < 0 ? V{} : d * d, d > 0 ? V{} : d * d};
  return {g < p.p ? g : p.p, d < 0 ? V{} : d, d > 0 ? V{} : -d};
}

// dL/dp. u_foreground: see foreground_coefficient. Neither coefficient may lose digits to the other, which can be far
// larger. dL/dFP is far larger where beta = 0, or for squares where hardly a voxel is wrong.
template <typename V>
TK_MATH V overlap_slope(const Probability<V>& p, V g, V u_background, V u_foreground, OverlapForm form) {
  if (form == OverlapForm::kProduct) return u_background * (1 - g) + u_foreground * g;
  const V d = difference_of(p, g);
  if (form == OverlapForm::kSquared) return u_foreground * g + (2 * d) * u_background;
  const V middle = (u_background + u_foreground) * 0.5f;
  const V lower = d < 0 ? u_foreground : middle;
  return d > 0 ? u_background : lower;
}

// The focal factor (1 - p)^f of the cross-entropy -log p. f = 2 is asked for most often and needs no power. The caller
// gives pow, because CUDA spells it differently.
template <typename V, typename A, typename Pow>
TK_MATH V focal_factor(V complement, A focal_gamma, const Pow& pow) {
  if (focal_gamma == 2) return complement * complement;
  return pow(complement, focal_gamma);
}

// -p d/dp [(1 - p)^f (-log p)] = (1 - p)^f - f p (1 - p)^f (log p / (1 - p)). This is 1 for f = 0. Where p = 1 the
// factor is 0, and so is this. Where p = 0 it is 1, and -log p is not read. So log(1 + others / target), from
// SoftmaxSums, will do for -log p of a softmax's label: nothing cancels, and where it overflows p is 0.
template <typename V, typename A, typename Pow>
TK_MATH V focal_slope(const Probability<V>& p, V minus_log_p, A focal_gamma, const Pow& pow) {
  const V entropy = p.p > 0 ? p.p * minus_log_p : V{};
  if (focal_gamma == 2) return p.complement * (p.complement + 2 * entropy);
  const V safe = p.complement > 0 ? p.complement : V{} + 1;
  return pow(p.complement, focal_gamma) * (1 + focal_gamma * (entropy / safe));
}

// dz of a dense softmax from all classes' u: as SoftmaxGradient, with the largest logit in the place of the target.
//   rest_u = sum of p u over the others, top_u = sum of u over the largest, beyond_one = S - 1, inverse = 1 / S
template <typename V>
struct DenseSoftmaxGradient {
  V shift, excess;
  TK_MATH V overlap(V p, V u) const { return p * ((u - shift) - excess); }
};

template <typename V>
TK_MATH DenseSoftmaxGradient<V> dense_softmax_gradient(V rest_u, V top_u, V beyond_one, V inverse) {
  const V shift = beyond_one < 1 ? top_u : V{};
  return {shift, rest_u + (top_u - shift) * inverse - shift * (beyond_one * inverse)};
}

// The cross-entropy's part: b_c = (g_c k_c + s_c) focal slope, b_all their sum.  dz_c = p_c b_all - b_c
template <typename V>
TK_MATH V softmax_cross_entropy_gradient(const Probability<V>& p, V b, V b_all) {
  return p.p * (b_all - b) - p.complement * b;
}

// ---- One row of the (N, C) table

struct TverskyParameters {
  double alpha, beta, gamma, smooth_nr, smooth_dr, class_weight;
};

struct TverskyRow {
  double loss;
  double u_background;  // dL/dp where g = 0: dL/dFP
  double u_foreground;  // dL/dp where g = 1: dL/dTP - dL/dFN
};

// A voxel weight below the smallest normal number counts as 0, and so does an exponential: processors and cards treat
// smaller numbers differently.
template <typename A>
constexpr A kSmallestNormal = sizeof(A) == 8 ? A(2.2250738585072014e-308) : A(1.17549435e-38f);

// The coefficient of overlap_slope for g = 1: dL/dp. For squares it is dL/dTP, because dL/dFN is dL/dFP there. u: in
// double.
TK_MATH double foreground_coefficient(const double* u, OverlapForm form) {
  return form == OverlapForm::kSquared ? u[kForeground] + u[kBackground] : u[kForeground];
}

// The largest coefficient that the table makes, for logits computed in double and in float. With gamma < 1 the slope at
// g = 1 of a class that is nearly right, or absent, can be larger than a float. Times g = 0 it must still be 0, also
// after the factor of a GradScaler and summed over a thousand classes. It does not bound an upstream gradient.
constexpr double kMostOfDouble = 1e290, kMostOfFloat = 1e30;
TK_MATH double bounded_coefficient(double x, double most) {
  return x > most ? most : x < -most ? -most : x;  // NaN stays
}

// focal_slope takes -log p = log(1 + others / target) of a softmax's label. This is the target exponential to divide
// by. It is at least 1e-30: below, the quotient would overflow, and p (-log p) is as good as 0.
template <typename V>
TK_MATH V exponential_for_focal_slope(V target) {
  const V least = V{} + 1e-30f;
  return target < least ? least : target;  // NaN stays
}

// The caller gives pow: CUDA spells it differently.
template <typename Pow>
TK_MATH TverskyRow tversky_row(double tp, double fp, double fn, const TverskyParameters& a, Pow pow) {
  const double wrong = a.alpha * fp + a.beta * fn;
  const double error = wrong + (a.smooth_dr - a.smooth_nr);
  const double numerator = tp + a.smooth_nr;
  const double denominator = tp + (wrong + a.smooth_dr);
  if (denominator == 0.0) return {0.0, 0.0, 0.0};  // no voxel, no smoothing: nothing is wrong
  double x = error / denominator;                  // 1 - TI, without forming TI
  double slope = 1.0;                              // d x^gamma / dx
  if (a.gamma != 1.0) {
    // x < 0 needs smooth_nr > smooth_dr. x <= 0 has no finite power or slope for some gamma. So it is the minimum, and
    // flat.
    slope = x <= 0.0 ? 0.0 : a.gamma * pow(x, a.gamma - 1.0);
    x = x <= 0.0 ? 0.0 : pow(x, a.gamma);
  }
  const double common = a.class_weight * slope / denominator;  // the square of a small denominator would be 0
  const double d_tp = -common * (error / denominator);
  const double d_fp = common * a.alpha * (numerator / denominator);
  const double d_fn = common * a.beta * (numerator / denominator);
  return {a.class_weight * x, d_fp, d_tp - d_fn};
}

// ---- The cross-entropy's part of the table

struct CeParameters {
  double tversky_weight, ce_weight, label_smoothing;
  CeMean mean;
};

// A class's part of the cross-entropy and of its divisor, before ce_weight.
struct CeTerms {
  double sum, divisor;
};

TK_MATH CeTerms ce_terms(const double* counts, double class_weight, int64_t classes, const CeParameters& a) {
  const double options = a.mean == CeMean::kChannels ? 2.0 : static_cast<double>(classes);
  const double sum = (1.0 - a.label_smoothing) * counts[kCe] + a.label_smoothing / options * counts[kSmoothing];
  // tp + fn is the weight of the voxels with this label. The sum of weights is the same for every class.
  const double divisor = a.mean == CeMean::kClassWeights ? class_weight * (counts[kTp] + counts[kFn])
                         : a.mean == CeMean::kLabels     ? class_weight * counts[kVoxels]
                         : a.mean == CeMean::kVoxels     ? counts[kVoxels] / static_cast<double>(classes)
                                                         : counts[kVoxels];
  return {class_weight * sum, divisor};
}

// dL/dCE_c and dL/dsmoothing_c where the divisor is 1.
struct CeCoefficients {
  double ce, smoothing;
};
TK_MATH CeCoefficients ce_coefficients(double class_weight, int64_t classes, const CeParameters& a) {
  const double options = a.mean == CeMean::kChannels ? 2.0 : static_cast<double>(classes);
  const double common = a.ce_weight * class_weight;
  return {common * (1.0 - a.label_smoothing), common * a.label_smoothing / options};
}

}  // namespace tversky_kernels
