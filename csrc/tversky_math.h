// The mathematics of softmax + Tversky loss, one definition for host and device.
//
// With p = softmax(z) or sigmoid(z), g the one-hot target and u_c = dL/dp_c (see docs/mathematics.md):
//
//   counts     TP_c = sum p_c g_c,  FP_c = sum p_c (1 - g_c),  FN_c = sum (1 - p_c) g_c
//   index      1 - TI = (alpha FP + beta FN + s_dr - s_nr) / (TP + alpha FP + beta FN + s_dr)
//   gradient   softmax  dz_c = p_c (u_c - sum_k p_k u_k)        sigmoid  dz_c = p_c (1 - p_c) u_c
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

// ---- One voxel

// p and 1 - p of a binary outcome, neither by subtraction.
template <typename V>
struct Probability {
  V p, complement;
};

// Softmax over two classes is the sigmoid of z_1 - z_0; but +inf gives NaN, as any softmax does, so that an overflow of
// half precision is seen.
template <typename V>
TK_MATH V two_class_logit(V z0, V z1) {
  const V top = z0 > z1 ? z0 : z1;
  return (z1 - z0) - (top - top);
}

// sigmoid(x) from e = exp(-|x|) and inverse = 1 / (1 + e).
template <typename V, typename M>
TK_MATH Probability<V> logistic(M x_is_negative, V e, V inverse) {
  const V small = e * inverse;
  return {x_is_negative ? small : inverse, x_is_negative ? inverse : small};
}

// dz = p (1 - p) u of a sigmoid, from e = exp(-|z|) and inverse = 1 / (1 + e). For softmax over two
// classes, the sigmoid of z_1 - z_0: dz_1 = p_0 p_1 (u_1 - u_0) = -dz_0.
template <typename V>
TK_MATH V logistic_gradient(V e, V inverse, V u) {
  return ((e * inverse) * inverse) * u;
}

// The exponentials of one voxel's softmax, the target's apart from the others', so that 1 - p_target is a sum of
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

  // The same for a class that is no voxel's target; 0 where the voxel does not count.
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
  V offset;     // -(shift + excess)
  V at_target;  // dz_t

  TK_MATH V other(V e, V u_background) const { return (e * scale) * (u_background + offset); }
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

// ---- One row of the (N, C) table

struct TverskyParameters {
  double alpha, beta, gamma, smooth_nr, smooth_dr, class_weight;
};

struct TverskyRow {
  double loss;
  double u_background;  // dL/dp where g = 0: dL/dFP
  double u_foreground;  // dL/dp where g = 1: dL/dTP - dL/dFN
};

// pow is the caller's, for it is spelled differently in CUDA.
template <typename Pow>
TK_MATH TverskyRow tversky_row(double tp, double fp, double fn, const TverskyParameters& a, Pow pow) {
  const double error = a.alpha * fp + a.beta * fn + (a.smooth_dr - a.smooth_nr);
  const double numerator = tp + a.smooth_nr;
  const double denominator = numerator + error;
  if (denominator == 0.0) return {0.0, 0.0, 0.0};  // no voxel, no smoothing: nothing is wrong
  double x = error / denominator;                  // 1 - TI, without forming TI
  double slope = 1.0;                              // d x^gamma / dx
  if (a.gamma != 1.0) {
    // x < 0 needs smooth_nr > smooth_dr; x <= 0 has no finite power or slope for every gamma: the minimum, flat.
    slope = x <= 0.0 ? 0.0 : a.gamma * pow(x, a.gamma - 1.0);
    x = x <= 0.0 ? 0.0 : pow(x, a.gamma);
  }
  const double common = a.class_weight * slope / (denominator * denominator);
  const double d_tp = -common * error;
  const double d_fp = common * a.alpha * numerator;
  const double d_fn = common * a.beta * numerator;
  return {a.class_weight * x, d_fp, d_tp - d_fn};
}

}  // namespace tversky_kernels
