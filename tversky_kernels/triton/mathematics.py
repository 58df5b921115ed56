"""The arithmetic of a voxel, as in csrc/common/mathematics.h, which says why; docs/mathematics.md derives it."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
# Values of OVERLAP (enum OverlapForm), CE, FOCAL, RESAMPLED and DENSE.
ABSOLUTE = tl.constexpr(1)
SQUARED = tl.constexpr(2)
SMOOTHED = tl.constexpr(2)
SQUARE = tl.constexpr(2)
CENTRES = tl.constexpr(2)
CHECKED = tl.constexpr(2)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # libdevice is not there then


@triton.jit
def _exp(x):
    # Results below the smallest normal number are 0: tl.exp takes three instructions more to make them.
    if x.dtype == tl.float64:
        e = tl.where(x < -708.3964185322641, 0.0, tl.exp(x))
    elif INTERPRETED:
        e = tl.where(x < -87.33654, 0.0, tl.exp(x))
    else:
        e = libdevice.exp2(x * 1.4426950408889634)
    return e


@triton.jit
def _divide(x, y):
    # Within 2 ulp, for y between 2^-126 and 2^126.
    return x / y if INTERPRETED or y.dtype == tl.float64 else libdevice.fast_dividef(x, y)


@triton.jit
def _logistic(z):
    # sigmoid(z), 1 - sigmoid(z) and their product, none by subtraction
    e = _exp(-tl.abs(z))
    inverse = _divide(1.0, 1.0 + e)
    small = e * inverse
    return tl.where(z < 0, small, inverse), tl.where(z < 0, inverse, small), small * inverse


@triton.jit
def _double(bits):
    # Triton passes every Python float as a float32; this one comes as the bits of a float64.
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _log_of_parts(exponent, f, REAL: tl.constexpr):
    # log(2^exponent (1 + f)) for 1 + f in [sqrt(1/2), sqrt(2)), by atanh's series: tl.log has no relative accuracy at 1
    s = f / (2.0 + f)
    z = s * s
    if tl.float64 == REAL:
        series = 1.0 / 19 + z / 21
        for i in tl.static_range(8, 0, -1):
            series = series * z + 1.0 / (2 * i + 1)
    else:
        series = 1.0 / 9 + z / 11
        for i in tl.static_range(3, 0, -1):
            series = series * z + 1.0 / (2 * i + 1)
    n = exponent.to(REAL)
    return n * 0.693359375 + (n * -2.121944400546905827679e-4 + (2.0 * s * z * series + 2.0 * s))


@triton.jit
def _exponent(x, REAL: tl.constexpr):
    # -> the exponent of x > 0 and x / 2^exponent in [sqrt(1/2), sqrt(2))
    if tl.float64 == REAL:
        bits = x.to(tl.int64, bitcast=True)
        exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
        mantissa = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) >> 23
        mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    return exponent, mantissa


@triton.jit
def _log1p(x, REAL: tl.constexpr):
    exponent, mantissa = _exponent(1.0 + x, REAL)
    return _log_of_parts(exponent, tl.where(exponent == 0, x, mantissa - 1.0), REAL) + (x - x)


@triton.jit
def _log1p_small(x, REAL: tl.constexpr):
    # The same for x in [0, 1], in float32 without taking it apart: the first term left out is at most 2e-8 of it
    if tl.float64 == REAL:
        logarithm = _log1p(x, REAL)
    else:
        s = _divide(x, 2.0 + x)
        z = s * s
        series = 1.0 / 11 + z / 13
        for i in tl.static_range(4, 0, -1):
            series = series * z + 1.0 / (2 * i + 1)
        logarithm = 2.0 * (s * z * series + s)
    return logarithm


@triton.jit
def _focal_power(x, focal_gamma, REAL: tl.constexpr):
    # x ** focal_gamma for x in [0, 1]
    some = x > 0
    exponent, mantissa = _exponent(tl.where(some, x, 1.0), REAL)
    power = _exp(_log_of_parts(exponent, mantissa - 1.0, REAL) * focal_gamma)
    return tl.where(some, power, x * 0.0)


@triton.jit
def _focal_factor(complement, focal_gamma, FOCAL: tl.constexpr, REAL: tl.constexpr):
    return complement * complement if FOCAL == SQUARE else _focal_power(complement, focal_gamma, REAL)


@triton.jit
def _focal_slope(p, complement, minus_log_p, focal_gamma, FOCAL: tl.constexpr, REAL: tl.constexpr):
    entropy = tl.where(p > 0, p * minus_log_p, 0.0)
    if FOCAL == SQUARE:
        slope = complement * (complement + 2.0 * entropy)
    else:
        safe = tl.where(complement > 0, complement, 1.0)
        slope = _focal_power(complement, focal_gamma, REAL) * (1.0 + focal_gamma * (entropy / safe))
    return slope


@triton.jit
def _difference(p, complement, g):
    # p - g, by way of 1 - p where that is the more accurate
    return tl.where(g >= 0.5, (1.0 - g) - complement, p - g)


@triton.jit
def _overlap(p, complement, g, OVERLAP: tl.constexpr):
    if OVERLAP == ABSOLUTE:
        d = _difference(p, complement, g)
        # Every comparison is false of NaN, and then takes what is NaN.
        tp, fp, fn = tl.where(g < p, g, p), tl.where(d < 0, 0.0, d), tl.where(d > 0, 0.0, -d)
    elif OVERLAP == SQUARED:
        d = _difference(p, complement, g)
        tp, fp, fn = p * g, tl.where(d < 0, 0.0, d * d), tl.where(d > 0, 0.0, d * d)
    else:
        tp, fp, fn = p * g, p * (1.0 - g), complement * g
    return tp, fp, fn


@triton.jit
def _overlap_slope(p, complement, g, background, foreground, OVERLAP: tl.constexpr):
    if OVERLAP == ABSOLUTE:
        d = _difference(p, complement, g)
        slope = tl.where(d > 0, background, tl.where(d < 0, foreground, (background + foreground) * 0.5))
    elif OVERLAP == SQUARED:
        slope = foreground * g + 2.0 * _difference(p, complement, g) * background
    else:  # neither loses digits to the other, which can be far larger
        slope = background * (1.0 - g) + foreground * g
    return slope


@triton.jit
def _slope_of_other(p, background, OVERLAP: tl.constexpr):
    # Where the label is the target and this class is not: see slope_of_other in csrc/common/mathematics.h
    return (2.0 * p) * background if OVERLAP == SQUARED else background


@triton.jit
def _squared_slope_of_target(complement, background, foreground):
    return foreground - (2.0 * complement) * background


@triton.jit
def _sigmoid_logs(z, REAL: tl.constexpr):
    # -log p and -log(1 - p)
    common = _log1p_small(_exp(-tl.abs(z)), REAL)
    return common + tl.where(z < 0, -z, 0.0), common + tl.where(z > 0, z, 0.0)


@triton.jit
def _top_sums(z, top):
    # The sums of exponentials, the largest logits' apart: see TopSums
    is_top = z == top[None, :]
    e = _exp(z - top[None, :])
    return tl.sum(tl.where(is_top, 0.0, e), 0), tl.sum(tl.where(is_top, e, 0.0), 0)


@triton.jit
def _sum_beyond_one(zs, top, TILES: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr):
    # -> the sum of exponentials of all tiles, less 1, and 1 / the sum
    rest = tl.zeros([BLOCK], REAL)
    tops = tl.zeros([BLOCK], REAL)
    for i in tl.static_range(TILES):
        more_rest, more_tops = _top_sums(zs[i], top)
        rest += more_rest
        tops += more_tops
    beyond_one = rest + (tops - 1.0)
    return beyond_one, _divide(1.0, 1.0 + beyond_one)


@triton.jit
def _add_tops(z, top, rest, tops):
    # Adds a chunk to them
    new_top = tl.maximum(top, tl.max(z, 0))
    kept = top == new_top
    rest = tl.where(kept, rest, (rest + tops) * _exp(top - new_top))
    more_rest, more_tops = _top_sums(z, new_top)
    return new_top, rest + more_rest, tl.where(kept, tops, 0.0) + more_tops


@triton.jit
def _dense_probability(z, top, beyond_one, inverse):
    p = _exp(z - top[None, :]) * inverse[None, :]
    return p, tl.where(z == top[None, :], (beyond_one * inverse)[None, :], 1.0 - p)


@triton.jit
def _split(z, top, c, label):
    # exponentials of the classes that are not the target (0 where it is), the sum of those, the target's
    e = _exp(z - top[None, :])
    is_target = c[:, None] == label[None, :]
    others = tl.where(is_target, 0.0, e)
    return others, tl.sum(others, 0), tl.sum(tl.where(is_target, e, 0.0), 0)


@triton.jit
def _again(x, sum_of_exponentials):
    # x, computed so that the compiler does not know it is x (no sum of exponentials is negative). So it computes again
    # what follows from x, and does not keep it in registers.
    return x + tl.where(sum_of_exponentials < 0.0, 1, 0)


@triton.jit
def _of_target(x, c, label):
    # (CLASSES, BLOCK): x where the class is the target, else 0
    return tl.where(c[:, None] == label[None, :], x, 0.0)


@triton.jit
def _label_cross_entropy(below_top, sum_target, sum_others, w, focal_gamma, FOCAL: tl.constexpr, REAL: tl.constexpr):
    # -> -log p of the label, weighted, and log(sum of exponentials). below_top: the largest logit less the label's; 0
    # where the voxel does not count, whatever it holds.
    log_sum = _log1p(sum_others + (sum_target - 1.0), REAL)
    ce = below_top + log_sum
    if FOCAL:
        ce *= _focal_factor(_divide(sum_others, sum_target + sum_others), focal_gamma, FOCAL, REAL)
    return tl.where(w == 0, 0.0, ce * w), log_sum


@triton.jit
def _label_focal_slope(target, others, focal_gamma, FOCAL: tl.constexpr, REAL: tl.constexpr):
    # What a focal exponent makes of dL/dCE of the label: see focal_slope in csrc/common/mathematics.h
    inverse = _divide(1.0, target + others)
    # Where the target's is so small that the quotient would overflow, p (-log p) is as good as 0.
    minus_log_p = _log1p(_divide(others, tl.where(target < 1e-30, 1e-30, target)), REAL)
    return _focal_slope(target * inverse, others * inverse, minus_log_p, focal_gamma, FOCAL, REAL)


@triton.jit
def _gradient_terms(target, others, weighted_others, u_target, k_target, s_target, s_all, w):
    # -> scale, offset, gradient at the target: see SoftmaxGradient
    inverse = _divide(1.0, target + others)
    shift = tl.where(target > others, u_target, 0.0)
    above = u_target - shift
    excess = (weighted_others + above * target - shift * others) * inverse
    scale = inverse * w
    at_target = target * (above - excess + (s_all - s_target)) - (k_target + s_target) * others
    return scale, k_target + s_all - shift - excess, scale * at_target


@triton.jit
def _channel_counts(z, c, label, w, FIRST_LABEL: tl.constexpr, ACTIVATION: tl.constexpr):
    # tp, fp, fn of every channel by itself, voxel by voxel
    if ACTIVATION == SIGMOID:
        p, complement, _ = _logistic(z)
    else:
        p = z
        complement = 1.0 - z
    is_target = c[:, None] + FIRST_LABEL == label[None, :]
    p = p * w[None, :]
    return tl.where(is_target, p, 0.0), tl.where(is_target, 0.0, p), tl.where(is_target, complement * w[None, :], 0.0)


@triton.jit
def _general_counts(z, g, w, top, beyond_one, inverse, focal_gamma, ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr,
                    CE: tl.constexpr, FOCAL: tl.constexpr, HARD: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # tp, fp, fn, cross-entropy and smoothing of every class and voxel; w is 0 where the voxel does not count
    # HARD: g is 0 or 1, so that a binary cross-entropy has one term
    of_zero = z * 0.0
    if ACTIVATION == SOFTMAX:
        p, complement = _dense_probability(z, top, beyond_one, inverse)
        of_one = (top[None, :] - z) + _log1p(beyond_one, REAL)[None, :]
    elif ACTIVATION == SIGMOID:
        p, complement, _ = _logistic(z)
        of_one, of_zero = _sigmoid_logs(z, REAL)
    else:
        p, complement, of_one = z, 1.0 - z, of_zero
    tp, fp, fn = _overlap(p, complement, g, OVERLAP)
    w = w[None, :]
    if ACTIVATION == SIGMOID and HARD and CE < SMOOTHED:
        ce = tl.where(g != 0, of_one, of_zero)
        if FOCAL:
            ce *= _focal_factor(tl.where(g != 0, complement, p), focal_gamma, FOCAL, REAL)
        smoothing = ce
    else:
        if FOCAL:
            of_one *= _focal_factor(complement, focal_gamma, FOCAL, REAL)
            if ACTIVATION == SIGMOID:
                of_zero *= _focal_factor(p, focal_gamma, FOCAL, REAL)
        ce = tl.where(g != 0, g * of_one, 0.0)
        smoothing = of_one
        if ACTIVATION == SIGMOID:
            ce += tl.where(g != 1, (1.0 - g) * of_zero, 0.0)
            smoothing += of_zero
    return tp * w, fp * w, fn * w, ce * w, smoothing * w


@triton.jit
def _channel_gradient(z, c, label, w, background, foreground, FIRST_LABEL: tl.constexpr, ACTIVATION: tl.constexpr):
    dz = tl.where(c[:, None] + FIRST_LABEL == label[None, :], foreground, background)
    if ACTIVATION == SIGMOID:
        _, _, product = _logistic(z)
        dz = product * dz
    return dz * w[None, :]


@triton.jit
def _general_channel_gradient(z, g, w, gamma, background, foreground, ce, smoothing, ACTIVATION: tl.constexpr,
                              OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr, HARD: tl.constexpr,
                              REAL: tl.constexpr):  # fmt: skip
    if ACTIVATION == SIGMOID:
        p, complement, product = _logistic(z)
        dz = product * _overlap_slope(p, complement, g, background, foreground, OVERLAP)
        if CE == 1 and HARD:
            right, wrong = tl.where(g != 0, p, complement), tl.where(g != 0, complement, p)
            slope = wrong * ce
            if FOCAL:
                log_one, log_zero = _sigmoid_logs(z, REAL)
                slope *= _focal_slope(right, wrong, tl.where(g != 0, log_one, log_zero), gamma, FOCAL, REAL)
            dz += tl.where(g != 0, -slope, slope)
        elif CE > 0:
            of_one, of_zero = g * ce + smoothing, (1.0 - g) * ce + smoothing
            if FOCAL:
                log_one, log_zero = _sigmoid_logs(z, REAL)
                of_one *= _focal_slope(p, complement, log_one, gamma, FOCAL, REAL)
                of_zero *= _focal_slope(complement, p, log_zero, gamma, FOCAL, REAL)
            dz += p * of_zero - complement * of_one
    else:
        dz = _overlap_slope(z, 1.0 - z, g, background, foreground, OVERLAP)
    return dz * w[None, :]


@triton.jit
def _general_slopes(z, g, top, beyond_one, inverse, gamma, background, foreground, ce, smoothing, OVERLAP: tl.constexpr,
                    CE: tl.constexpr, FOCAL: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # -> p, 1 - p, u and b of every class and voxel
    p, complement = _dense_probability(z, top, beyond_one, inverse)
    u = _overlap_slope(p, complement, g, background, foreground, OVERLAP)
    b = p * 0.0
    if CE > 0:
        b = g * ce + smoothing
        if FOCAL:
            minus_log_p = (top[None, :] - z) + _log1p(beyond_one, REAL)[None, :]
            b *= _focal_slope(p, complement, minus_log_p, gamma, FOCAL, REAL)
    return p, complement, u, b


@triton.jit
def _general_sums(z, top, p, u, b):
    # sum of p u of all but the largest, sum of u of the largest, sum of b
    is_top = z == top[None, :]
    return tl.sum(tl.where(is_top, 0.0, p * u), 0), tl.sum(tl.where(is_top, u, 0.0), 0), tl.sum(b, 0)


@triton.jit
def _general_gradient(p, complement, u, b, rest_u, top_u, b_all, beyond_one, inverse, w, CE: tl.constexpr):
    shift = tl.where(beyond_one < 1.0, top_u, 0.0)
    excess = rest_u + (top_u - shift) * inverse - shift * (beyond_one * inverse)
    dz = p * ((u - shift[None, :]) - excess[None, :])
    if CE > 0:
        dz += p * (b_all[None, :] - b) - complement * b
    return dz * w[None, :]
