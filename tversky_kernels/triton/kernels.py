"""The passes as Triton kernels: count pass, table, gradient pass.

One program takes every P-th tile of BLOCK voxels of one sample. Up to 128 classes a tile holds all of them, so that
logits and target are read once a pass. Such a program is one warp: a thread has PACK neighbouring voxels of some of
the classes, and what goes over the classes of a voxel goes by shuffles, with no barrier. The classes are in tiles of
SIZES, powers of two: 33 classes are 32 + 4 and not 64. Beyond 128 the classes come in chunks: an online softmax over
them, then the chunks once more out of the cache.

The arithmetic is that of csrc/tversky_math.h, which says why; docs/mathematics.md derives it.

What decides the code of a kernel: GENERAL, that every class of a voxel has a target g of its own (DENSE, or class
indices as one-hot: of a sigmoid with a cross-entropy, of label smoothing together with a focal exponent or squares, and
of squares or smoothing where the classes are in chunks); OVERLAP, how it is measured (see enum OverlapForm); CE: 0 no
cross-entropy, 1 its sums, 2 and those for label smoothing; FOCAL: 0 without an exponent, 1 with any, 2 with that of 2;
RESAMPLED, that target and weight have other sizes than the logits. The counts have 3 columns, or 6 with a cross-entropy
(see enum Count); the coefficients 2, or 4.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # libdevice is not there then


@triton.jit
def _exp(x):
    # What would be below the smallest normal number is 0: tl.exp takes three instructions more for such results.
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
def _offsets(start, BLOCK: tl.constexpr, PACK: tl.constexpr):
    # PACK of them a thread, whatever the type of what is read there, so that it need not change threads; and no more is
    # known of where these begin, or what follows from it is taken for aligned
    return start + tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), PACK), PACK)


@triton.jit
def _place(x, scale, RESAMPLED: tl.constexpr):
    # Rounded as torch rounds: once after the product and the first shift.
    return ((x + 0.5).to(tl.float64) * scale - 0.5).to(tl.float32) + 0.5 if RESAMPLED == 2 else x * scale


@triton.jit
def _source(offsets, stride, sy, sx, n0, n1, n2, s0, s1, s2, f0, f1, f2, RESAMPLED: tl.constexpr):
    # Where the voxels are found: one stride apart, or where torch's interpolate takes them from, with the mode
    # "nearest" (1) or "nearest-exact" (2).
    if RESAMPLED:
        row = offsets // sx
        z, y, x = row // sy, row % sy, offsets % sx
        z = tl.minimum(_place(z.to(tl.float32), f0, RESAMPLED).to(tl.int64), n0 - 1)
        y = tl.minimum(_place(y.to(tl.float32), f1, RESAMPLED).to(tl.int64), n1 - 1)
        x = tl.minimum(_place(x.to(tl.float32), f2, RESAMPLED).to(tl.int64), n2 - 1)
        at = z * s0 + y * s1 + x * s2
    else:
        at = offsets * stride
    return at


@triton.jit
def _voxels(target, weight, start, voxels, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2,
            ignore_index, LABELS, DENSE: tl.constexpr, RESAMPLED: tl.constexpr, HAS_IGNORE: tl.constexpr,
            HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # -> label (0 of a dense target); weight: 0 where the voxel does not count, NaN where label or weight are out of
    # range; whether it counts; the voxels' offsets in the target
    offsets = _offsets(start, BLOCK, PACK)
    inside = offsets < voxels
    at = _source(offsets, ts_v, sy, sx, n0, n1, n2, t0, t1, t2, f0, f1, f2, RESAMPLED)
    counts = inside
    if DENSE:
        label = tl.zeros([BLOCK], tl.int32)
        good = label == label
    else:
        label = tl.load(target + at, mask=inside, other=0)
        wide = label if label.dtype == tl.int64 else label.to(tl.int32)
        good = (wide >= 0) & (wide < LABELS)
        if HAS_IGNORE:
            ignored = label.to(tl.int64) == ignore_index
            good = good | ignored
            counts = counts & ~ignored
        label = label.to(tl.int32)
    w = tl.full([BLOCK], 1.0, REAL)
    if HAS_WEIGHT:
        w_at = _source(offsets, ws_v, sy, sx, n0, n1, n2, w0, w1, w2, f0, f1, f2, RESAMPLED)
        w = tl.load(weight + w_at, mask=inside, other=0).to(REAL)
        good = good & (w >= 0)
        counts = counts & (tl.abs(w) >= (2.2250738585072014e-308 if tl.float64 == REAL else 1.17549435e-38))
    return label, tl.where(good, tl.where(counts, w, 0.0), float("nan")), counts, at


@triton.jit
def _differs(g, c, ignore_index, C: tl.constexpr):
    # How many classes of a voxel hold something else than ignore_index
    return tl.sum(((g != ignore_index) & (c < C)[:, None]).to(tl.int32), 0)


@triton.jit
def _without_bad_targets(g, w, counts, REAL: tl.constexpr):
    # The weight of a voxel is NaN where a class of its dense target has a value outside [0, 1].
    g = g.to(REAL)
    bad = tl.sum(((g >= 0) & (g <= 1)).to(tl.int32), 0) < g.shape[0]
    return tl.where(counts & bad, float("nan"), w)


@triton.jit
def _without_ignored(differ, w, counts, HAS_WEIGHT: tl.constexpr):
    # Voxels that hold ignore_index in every class do not count; a weight out of range stays NaN.
    counts = counts & (differ > 0)
    kept = counts
    if HAS_WEIGHT:
        kept = counts | ~(w >= 0)
    return tl.where(kept, w, 0.0), counts


@triton.jit
def _classes(first, CLASSES: tl.constexpr):
    return first + tl.arange(0, CLASSES)


@triton.jit
def _dense_targets(target, at, ts_c, first, start, voxels, C: tl.constexpr, CLASSES: tl.constexpr, WHOLE: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    # -> (CLASSES, BLOCK) of a dense target, in its own type
    c = _classes(first, CLASSES)
    there = (start + tl.arange(0, BLOCK) < voxels)[None, :]
    if not WHOLE:
        there = there & (c < C)[:, None]
    return tl.load(target + c.to(tl.int64)[:, None] * ts_c + at[None, :], mask=there, other=0)


@triton.jit
def _target_of(dense, c, label, counts, FIRST_LABEL: tl.constexpr, DENSE: tl.constexpr, CLEAR: tl.constexpr,
               REAL: tl.constexpr):  # fmt: skip
    # -> (CLASSES, BLOCK) g
    if DENSE:
        g = dense.to(REAL)
        if CLEAR:
            g = tl.where(counts[None, :], g, 0.0)
    else:
        g = (c[:, None] + FIRST_LABEL == label[None, :]).to(REAL)
    return g


@triton.jit
def _logits(rows, first, start, voxels, ls_c, ls_v, counts, C: tl.constexpr, CLASSES: tl.constexpr,
            WHOLE: tl.constexpr, CLEAR: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
            REAL: tl.constexpr):  # fmt: skip
    # -> (CLASSES, BLOCK) logits, -inf where there is no such class. WHOLE: there are all. CLEAR: some voxels may not
    # count, whatever they hold; 0 is taken for it.
    c = _classes(first, CLASSES)
    offsets = _offsets(start, BLOCK, PACK)
    there = (offsets < voxels)[None, :]
    if not WHOLE:
        there = there & (c < C)[:, None]
    z = tl.load(rows + c.to(tl.int64)[:, None] * ls_c + (offsets * ls_v)[None, :], mask=there, other=0.0).to(REAL)
    if CLEAR:
        z = tl.where(counts[None, :], z, 0.0)
    if not WHOLE:
        z = tl.where((c < C)[:, None], z, float("-inf"))
    return z


@triton.jit
def _logistic(z):
    # sigmoid(z), 1 - sigmoid(z) and their product, none by subtraction
    e = _exp(-tl.abs(z))
    inverse = _divide(1.0, 1.0 + e)
    small = e * inverse
    return tl.where(z < 0, small, inverse), tl.where(z < 0, inverse, small), small * inverse


@triton.jit
def _two_logits(rows, start, voxels, ls_c, ls_v, counts, CLEAR: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
                REAL: tl.constexpr):  # fmt: skip
    # z_1 - z_0, 0 where the voxel does not count
    offsets = _offsets(start, BLOCK, PACK)
    inside = offsets < voxels
    z0 = tl.load(rows + offsets * ls_v, mask=inside, other=0.0).to(REAL)
    z1 = tl.load(rows + ls_c + offsets * ls_v, mask=inside, other=0.0).to(REAL)
    difference = (z1 - z0) + tl.maximum(z0, z1) * 0.0  # +inf is NaN, as in any softmax
    if CLEAR:
        difference = tl.where(counts, difference, 0.0)
    return difference


@triton.jit
def _all_classes(rows, target, weight, start, voxels, ls_c, ls_v, ts_c, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0,
                 w1, w2, f0, f1, f2, ignore_index, C: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
                 TILES: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr, ACTIVATION: tl.constexpr,
                 FIRST_LABEL: tl.constexpr, DENSE: tl.constexpr, RESAMPLED: tl.constexpr, HAS_IGNORE: tl.constexpr,
                 HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # -> label, weight and whether a voxel counts, as _voxels; of each tile of classes the dense target and the logits;
    # the largest logit of a softmax
    CLEAR: tl.constexpr = HAS_IGNORE or HAS_WEIGHT
    label, w, counts, at = _voxels(
        target, weight, start, voxels, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2,
        ignore_index, C + FIRST_LABEL, DENSE, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, BLOCK, PACK, REAL)  # fmt: skip
    dense = ()
    for i in tl.static_range(TILES):
        g = label
        if DENSE:
            g = _dense_targets(target, at, ts_c, i * MAIN, start, voxels, C, MAIN if i == 0 else TAIL,
                               (MAIN if i == 0 else MAIN + TAIL) <= C, BLOCK)  # fmt: skip
        dense += (g,)
    if DENSE and HAS_IGNORE:
        differ = tl.zeros([BLOCK], tl.int32)
        for i in tl.static_range(TILES):
            differ += _differs(dense[i], _classes(i * MAIN, MAIN if i == 0 else TAIL), ignore_index, C)
        w, counts = _without_ignored(differ, w, counts, HAS_WEIGHT)
    if DENSE == 2:
        for i in tl.static_range(TILES):
            w = _without_bad_targets(dense[i], w, counts, REAL)
    zs = ()
    top = tl.full([BLOCK], float("-inf"), REAL)
    for i in tl.static_range(TILES):
        z = _logits(rows, i * MAIN, start, voxels, ls_c, ls_v, counts, C, MAIN if i == 0 else TAIL,
                    (MAIN if i == 0 else MAIN + TAIL) <= C, CLEAR, BLOCK, PACK, REAL)  # fmt: skip
        zs += (z,)
        if ACTIVATION == SOFTMAX:
            top = tl.maximum(top, tl.max(z, 0))
    return label, w, counts, dense, zs, top


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
    return complement * complement if FOCAL == 2 else _focal_power(complement, focal_gamma, REAL)


@triton.jit
def _focal_slope(p, complement, minus_log_p, focal_gamma, FOCAL: tl.constexpr, REAL: tl.constexpr):
    entropy = tl.where(p > 0, p * minus_log_p, 0.0)
    if FOCAL == 2:
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
    if OVERLAP == 1:
        d = _difference(p, complement, g)
        # Every comparison is false of NaN, and then takes what is NaN.
        tp, fp, fn = tl.where(g < p, g, p), tl.where(d < 0, 0.0, d), tl.where(d > 0, 0.0, -d)
    elif OVERLAP == 2:
        d = _difference(p, complement, g)
        tp, fp, fn = p * g, tl.where(d < 0, 0.0, d * d), tl.where(d > 0, 0.0, d * d)
    else:
        tp, fp, fn = p * g, p * (1.0 - g), complement * g
    return tp, fp, fn


@triton.jit
def _overlap_slope(p, complement, g, background, foreground, OVERLAP: tl.constexpr):
    if OVERLAP == 1:
        d = _difference(p, complement, g)
        slope = tl.where(d > 0, background, tl.where(d < 0, foreground, (background + foreground) * 0.5))
    elif OVERLAP == 2:
        slope = foreground * g + 2.0 * _difference(p, complement, g) * background
    else:  # neither loses digits to the other, which can be far larger
        slope = background * (1.0 - g) + foreground * g
    return slope


@triton.jit
def _slope_of_other(p, background, OVERLAP: tl.constexpr):
    # Where the label is the target and this class is not: see slope_of_other in csrc/tversky_math.h
    return (2.0 * p) * background if OVERLAP == 2 else background


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
    # x, in a way that the compiler does not see through: no sum of exponentials is negative. What follows from it is
    # made again instead of kept, for which registers are few.
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
    # What a focal exponent makes of dL/dCE of the label: see focal_slope in csrc/tversky_math.h
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


# ---- Count pass ------------------------------------------------------------------------------------------------------


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
    if ACTIVATION == SIGMOID and HARD and CE < 2:
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
def _store_counts(partial, c, tp, fp, fn, ce, smoothing, weights, C: tl.constexpr, CE: tl.constexpr):
    nan = (tp + fp + fn) * 0.0  # what is NaN in one is so in all
    tl.store(partial + c, tp + nan, mask=c < C)
    tl.store(partial + C + c, fp + nan, mask=c < C)
    tl.store(partial + 2 * C + c, fn + nan, mask=c < C)
    if CE > 0:
        tl.store(partial + 3 * C + c, ce, mask=c < C)
        tl.store(partial + 4 * C + c, smoothing, mask=c < C)
        tl.store(partial + 5 * C + c, weights, mask=c < C)


@triton.jit
def _share(programs, voxels, BLOCK: tl.constexpr):
    # -> the sample, which of its programs this is, its first voxel, the distance of its tiles, its last tile
    n = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    step = tl.cast(programs, tl.int64) * BLOCK  # a 1 is a constant there
    begin = program.to(tl.int64) * BLOCK
    return n.to(tl.int64), program, begin, step, begin + (voxels - 1 - begin) // step * step


@triton.jit
def _no_sums(CLASSES: tl.constexpr, PACKS: tl.constexpr, REAL: tl.constexpr):
    return tl.zeros([CLASSES, PACKS], REAL)


@triton.jit
def _sum_packs(x, CLASSES: tl.constexpr, PACKS: tl.constexpr, PACK: tl.constexpr):
    # (CLASSES, PACKS * PACK) -> (CLASSES, PACKS): a thread sums what it has itself
    return tl.sum(tl.reshape(x, [CLASSES, PACKS, PACK]), 2)


@triton.jit(do_not_specialize=["focal_gamma"])
def all_classes_count_kernel(
    logits, target, weight, partial, voxels, ls_n, ls_c, ls_v, ts_n, ts_c, ts_v, ws_n, ws_v, sy, sx, n0, n1, n2, t0, t1,
    t2, w0, w1, w2, f0, f1, f2, ignore_index, focal_gamma: tl.int64, programs,
    C: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
    PACK: tl.constexpr, ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """partial[n, program, column, C] of tiles that hold all classes at once: MAIN and, where TILES is 2, TAIL more."""
    CLEAR: tl.constexpr = HAS_IGNORE or HAS_WEIGHT
    if INTERLEAVED:  # the classes of a voxel lie side by side, and how these are aligned follows from C
        ls_v = C
    PACKS: tl.constexpr = BLOCK // PACK
    # Of all voxels, or (CE's divisor where tp + fn is not that) of those with each label.
    LABEL_WEIGHTS: tl.constexpr = OVERLAP == 2 and ACTIVATION == SOFTMAX and not DENSE
    n, program, begin, step, last = _share(programs, voxels, BLOCK)
    rows, target, weight = logits + n * ls_n, target + n * ts_n, weight + n * ws_n
    gamma = _double(focal_gamma).to(REAL)
    sums = ()  # of each tile: tp, fp, fn, cross-entropy, smoothing, weights by label
    for i in tl.static_range(TILES):
        for _ in tl.static_range(6):
            sums += (_no_sums(MAIN if i == 0 else TAIL, PACKS, REAL),)
    weights = tl.zeros([BLOCK], REAL)
    for at in tl.range(begin, voxels, step):
        start = begin + last - at  # from the end: see enum Order in csrc/cuda/kernels.h
        label, w, counts, dense, zs, top = _all_classes(
            rows, target, weight, start, voxels, ls_c, ls_v, ts_c, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1,
            w2, f0, f1, f2, ignore_index, C, MAIN, TAIL, TILES, BLOCK, PACK, ACTIVATION, FIRST_LABEL, DENSE, RESAMPLED,
            HAS_IGNORE, HAS_WEIGHT, REAL)  # fmt: skip
        if CE > 0:
            weights += w
        new_sums = ()
        if GENERAL:
            beyond_one = tl.zeros([BLOCK], REAL)
            inverse = tl.zeros([BLOCK], REAL)
            if ACTIVATION == SOFTMAX:
                beyond_one, inverse = _sum_beyond_one(zs, top, TILES, BLOCK, REAL)
            for i in tl.static_range(TILES):
                g = _target_of(dense[i], _classes(i * MAIN, MAIN if i == 0 else TAIL), label, counts, FIRST_LABEL,
                               DENSE, CLEAR, REAL)  # fmt: skip
                terms = _general_counts(
                    zs[i], g, w, top, beyond_one, inverse, gamma, ACTIVATION, OVERLAP, CE, FOCAL, not DENSE, REAL
                )
                for j in tl.static_range(3):
                    new_sums += (sums[6 * i + j] + _sum_packs(terms[j], MAIN if i == 0 else TAIL, PACKS, PACK),)
                ce, smoothing, label_weights = sums[6 * i + 3], sums[6 * i + 4], sums[6 * i + 5]
                if CE > 0:
                    ce += _sum_packs(terms[3], MAIN if i == 0 else TAIL, PACKS, PACK)
                if CE == 2:
                    smoothing += _sum_packs(terms[4], MAIN if i == 0 else TAIL, PACKS, PACK)
                if CE > 0 and LABEL_WEIGHTS:
                    label_weights += _sum_packs(g * w[None, :], MAIN if i == 0 else TAIL, PACKS, PACK)
                new_sums += (ce, smoothing, label_weights)
        elif ACTIVATION == SOFTMAX:
            others = ()
            sum_others = tl.zeros([BLOCK], REAL)
            sum_target = tl.zeros([BLOCK], REAL)
            z_target = tl.zeros([BLOCK], REAL)
            for i in tl.static_range(TILES):
                c = _classes(i * MAIN, MAIN if i == 0 else TAIL)
                of_tile, more_others, more_target = _split(zs[i], top, c, label)
                others += (of_tile,)
                sum_others += more_others
                sum_target += more_target
                if CE > 0:
                    z_target += tl.sum(_of_target(zs[i], c, label), 0)
            inverse = _divide(1.0 if OVERLAP == 2 else w, sum_others + sum_target)
            weighted = inverse
            if OVERLAP == 2:
                weighted = inverse * w
            right, missed = sum_target * weighted, sum_others * weighted
            if OVERLAP == 2:
                missed *= sum_others * inverse
            of_label = missed
            if CE > 0:
                of_label, log_sum = _label_cross_entropy(top - z_target, sum_target, sum_others, w, gamma, FOCAL, REAL)
            label = _again(label, sum_others)
            for i in tl.static_range(TILES):
                c = _classes(i * MAIN, MAIN if i == 0 else TAIL)
                tp = _of_target(right[None, :], c, label)
                fp = others[i] * weighted[None, :]
                if OVERLAP == 2:
                    fp *= others[i] * inverse[None, :]
                fn = _of_target(missed[None, :], c, label)
                new_sums += (
                    sums[6 * i] + _sum_packs(tp, MAIN if i == 0 else TAIL, PACKS, PACK),
                    sums[6 * i + 1] + _sum_packs(fp, MAIN if i == 0 else TAIL, PACKS, PACK),
                    sums[6 * i + 2] + _sum_packs(fn, MAIN if i == 0 else TAIL, PACKS, PACK),
                )
                ce = sums[6 * i + 3]
                if CE > 0:
                    ce += _sum_packs(_of_target(of_label[None, :], c, label), MAIN if i == 0 else TAIL, PACKS, PACK)
                label_weights = sums[6 * i + 5]
                if CE > 0 and LABEL_WEIGHTS:
                    label_weights += _sum_packs(_of_target(w[None, :], c, label), MAIN if i == 0 else TAIL, PACKS, PACK)
                smoothing = sums[6 * i + 4]
                if CE == 2:
                    term = ((top[None, :] - zs[i]) + log_sum[None, :]) * w[None, :]
                    smoothing += _sum_packs(term, MAIN if i == 0 else TAIL, PACKS, PACK)
                new_sums += (ce, smoothing, label_weights)
        else:
            for i in tl.static_range(TILES):
                terms = _channel_counts(
                    zs[i], _classes(i * MAIN, MAIN if i == 0 else TAIL), label, w, FIRST_LABEL, ACTIVATION
                )
                for j in tl.static_range(3):
                    new_sums += (sums[6 * i + j] + _sum_packs(terms[j], MAIN if i == 0 else TAIL, PACKS, PACK),)
                new_sums += (sums[6 * i + 3], sums[6 * i + 4], sums[6 * i + 5])
        sums = new_sums
    partial += (n * programs + program) * (6 if CE > 0 else 3) * C
    for i in tl.static_range(TILES):
        by_label = tl.sum(sums[6 * i + 5], 1)
        if not LABEL_WEIGHTS:
            by_label += tl.sum(weights, 0)
        _store_counts(partial, _classes(i * MAIN, MAIN if i == 0 else TAIL), tl.sum(sums[6 * i], 1),
                      tl.sum(sums[6 * i + 1], 1), tl.sum(sums[6 * i + 2], 1), tl.sum(sums[6 * i + 3], 1),
                      tl.sum(sums[6 * i + 4], 1), by_label, C, CE)  # fmt: skip


@triton.jit(do_not_specialize=["focal_gamma"])
def two_classes_count_kernel(
    logits, target, weight, partial, voxels, ls_n, ls_c, ls_v, ts_n, ts_c, ts_v, ws_n, ws_v, sy, sx, n0, n1, n2, t0, t1,
    t2, w0, w1, w2, f0, f1, f2, ignore_index, focal_gamma: tl.int64, programs,
    BLOCK: tl.constexpr, PACK: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """partial[n, program, column, 2]: the softmax of two classes is one sigmoid."""
    n, program, begin, step, last = _share(programs, voxels, BLOCK)
    rows, target, weight = logits + n * ls_n, target + n * ts_n, weight + n * ws_n
    gamma = _double(focal_gamma).to(REAL)
    right0 = tl.zeros([BLOCK], REAL)
    right1 = tl.zeros([BLOCK], REAL)
    missed0 = tl.zeros([BLOCK], REAL)
    missed1 = tl.zeros([BLOCK], REAL)
    ce0 = tl.zeros([BLOCK], REAL)
    ce1 = tl.zeros([BLOCK], REAL)
    smoothing0 = tl.zeros([BLOCK], REAL)
    smoothing1 = tl.zeros([BLOCK], REAL)
    weights0 = tl.zeros([BLOCK], REAL)  # of label 0 or, without squares, of all voxels
    weights1 = tl.zeros([BLOCK], REAL)
    for at in tl.range(begin, voxels, step):
        start = begin + last - at  # from the end: see enum Order in csrc/cuda/kernels.h
        label, w, counts, _ = _voxels(
            target, weight, start, voxels, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2,
            ignore_index, 2, False, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, BLOCK, PACK, REAL)  # fmt: skip
        difference = _two_logits(rows, start, voxels, ls_c, ls_v, counts, HAS_IGNORE or HAS_WEIGHT, BLOCK, PACK, REAL)
        p1, p0, _ = _logistic(difference)
        is1 = label == 1
        if CE > 0:
            of1, of0 = _sigmoid_logs(difference, REAL)
            of_label = tl.where(is1, of1, of0)
            if FOCAL:
                of_label *= _focal_factor(tl.where(is1, p0, p1), gamma, FOCAL, REAL)
            of_label *= w
            ce1 += tl.where(is1, of_label, 0.0)
            ce0 += tl.where(is1, 0.0, of_label)
            if CE == 2:
                smoothing0 += of0 * w
                smoothing1 += of1 * w
            if OVERLAP == 2:
                weights0 += tl.where(is1, 0.0, w)
                weights1 += tl.where(is1, w, 0.0)
            else:
                weights0 += w
        weighted1, weighted0 = p1 * w, p0 * w
        right1 += tl.where(is1, weighted1, 0.0)
        right0 += tl.where(is1, 0.0, weighted0)
        missed1 += tl.where(is1, weighted0 * p0 if OVERLAP == 2 else weighted0, 0.0)
        missed0 += tl.where(is1, 0.0, weighted1 * p1 if OVERLAP == 2 else weighted1)
    partial += (n * programs + program) * (12 if CE > 0 else 6)
    true0, true1, false0, false1 = tl.sum(right0, 0), tl.sum(right1, 0), tl.sum(missed1, 0), tl.sum(missed0, 0)
    nan = (true0 + true1 + false0 + false1) * 0.0  # what is NaN in one is so in all
    tl.store(partial, true0 + nan)
    tl.store(partial + 1, true1 + nan)
    tl.store(partial + 2, false0 + nan)
    tl.store(partial + 3, false1 + nan)
    tl.store(partial + 4, false1 + nan)
    tl.store(partial + 5, false0 + nan)
    if CE > 0:
        tl.store(partial + 6, tl.sum(ce0, 0))
        tl.store(partial + 7, tl.sum(ce1, 0))
        tl.store(partial + 8, tl.sum(smoothing0, 0))
        tl.store(partial + 9, tl.sum(smoothing1, 0))
        tl.store(partial + 10, tl.sum(weights0, 0))
        tl.store(partial + 11, tl.sum(weights1 if OVERLAP == 2 else weights0, 0))


@triton.jit
def _online(z, c, label, top, sum_target, sum_others):
    # Adds a chunk to a voxel's sums of exponentials
    new_top = tl.maximum(top, tl.max(z, 0))
    rescale = _exp(top - new_top)
    others, more_others, more_target = _split(z, new_top, c, label)
    return new_top, sum_target * rescale + more_target, sum_others * rescale + more_others, others, rescale


@triton.jit
def _add_column(at, c, value, filled, C: tl.constexpr):
    # Only this program touches its row of the partial sums, which has values up to `filled`.
    tl.store(at + c, value + tl.load(at + c, mask=c < filled, other=0.0), mask=c < C)


@triton.jit
def _count_chunk(rows, target, first, start, voxels, ls_c, ls_v, ts_c, at, label, counts, w, top, sum_target,
                 sum_others, gamma, partial, filled, C: tl.constexpr, CLASSES: tl.constexpr, WHOLE: tl.constexpr,
                 CLEAR: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr, ACTIVATION: tl.constexpr,
                 FIRST_LABEL: tl.constexpr, DENSE: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr,
                 FOCAL: tl.constexpr, GENERAL: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # GENERAL: sum_target are the largest logits, sum_others the rest.
    c = _classes(first, CLASSES)
    z = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CLASSES, WHOLE, CLEAR, BLOCK, PACK, REAL)
    ce = tl.zeros([CLASSES], REAL)
    smoothing = tl.zeros([CLASSES], REAL)
    weights = ce + tl.sum(w, 0)
    if GENERAL:
        dense = label
        if DENSE:
            dense = _dense_targets(target, at, ts_c, first, start, voxels, C, CLASSES, WHOLE, BLOCK)
        if DENSE == 2:
            w = _without_bad_targets(dense, w, counts, REAL)
        g = _target_of(dense, c, label, counts, FIRST_LABEL, DENSE, CLEAR, REAL)
        beyond_one = sum_others + (sum_target - 1.0)
        tps, fps, fns, ces, smoothings = _general_counts(
            z,
            g,
            w,
            top,
            beyond_one,
            _divide(1.0, 1.0 + beyond_one),
            gamma,
            ACTIVATION,
            OVERLAP,
            CE,
            FOCAL,
            not DENSE,
            REAL,
        )
        tp, fp, fn = tl.sum(tps, 1), tl.sum(fps, 1), tl.sum(fns, 1)
        if CE > 0:
            ce = tl.sum(ces, 1)
        if CE == 2:
            smoothing = tl.sum(smoothings, 1)
        if OVERLAP == 2 and ACTIVATION == SOFTMAX and not DENSE:  # as LABEL_WEIGHTS
            weights = tl.sum(g * w[None, :], 1)
    elif ACTIVATION == SOFTMAX:
        others, _, _ = _split(z, top, c, label)
        inverse = _divide(w, sum_target + sum_others)
        tp = tl.sum(_of_target((sum_target * inverse)[None, :], c, label), 1)
        fp = tl.sum(others * inverse[None, :], 1)
        fn = tl.sum(_of_target((sum_others * inverse)[None, :], c, label), 1)
        if CE > 0:
            below_top = tl.sum(_of_target(top[None, :] - z, c, label), 0)
            of_label, _ = _label_cross_entropy(below_top, sum_target, sum_others, w, gamma, FOCAL, REAL)
            ce = tl.sum(_of_target(of_label[None, :], c, label), 1)
    else:
        tps, fps, fns = _channel_counts(z, c, label, w, FIRST_LABEL, ACTIVATION)
        tp, fp, fn = tl.sum(tps, 1), tl.sum(fps, 1), tl.sum(fns, 1)
    nan = (tp + fp + fn) * 0.0  # what is NaN in one is so in all
    _add_column(partial, c, tp + nan, filled, C)
    _add_column(partial + C, c, fp + nan, filled, C)
    _add_column(partial + 2 * C, c, fn + nan, filled, C)
    if CE > 0:
        _add_column(partial + 3 * C, c, ce, filled, C)
        _add_column(partial + 4 * C, c, smoothing, filled, C)
        _add_column(partial + 5 * C, c, weights, filled, C)


@triton.jit
def _ignored_by_chunks(target, at, ts_c, start, voxels, w, counts, ignore_index, C: tl.constexpr,
                       HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    differ = tl.zeros([BLOCK], tl.int32)
    for c in tl.range(0, C):
        g = _dense_targets(target, at, ts_c, c, start, voxels, C, 1, True, BLOCK)
        differ += _differs(g, _classes(c, 1), ignore_index, C)
    return _without_ignored(differ, w, counts, HAS_WEIGHT)


@triton.jit(do_not_specialize=["focal_gamma"])
def many_classes_count_kernel(
    logits, target, weight, partial, voxels, ls_n, ls_c, ls_v, ts_n, ts_c, ts_v, ws_n, ws_v, sy, sx, n0, n1, n2, t0, t1,
    t2, w0, w1, w2, f0, f1, f2, ignore_index, focal_gamma: tl.int64, programs,
    C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
    ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """partial[n, program, column, C], the classes in chunks."""
    CLEAR: tl.constexpr = HAS_IGNORE or HAS_WEIGHT
    WHOLE: tl.constexpr = C % CHUNK == 0
    n, program, begin, step, last = _share(programs, voxels, BLOCK)
    rows, target, weight = logits + n * ls_n, target + n * ts_n, weight + n * ws_n
    gamma = _double(focal_gamma).to(REAL)
    partial += (n * programs + program) * (6 if CE > 0 else 3) * C
    for passed in tl.range(begin, voxels, step):
        start = begin + last - passed  # from the end: see enum Order in csrc/cuda/kernels.h
        label, w, counts, at = _voxels(
            target, weight, start, voxels, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2,
            ignore_index, C + FIRST_LABEL, DENSE, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, BLOCK, PACK, REAL)  # fmt: skip
        if DENSE and HAS_IGNORE:
            w, counts = _ignored_by_chunks(
                target, at, ts_c, start, voxels, w, counts, ignore_index, C, HAS_WEIGHT, BLOCK
            )
        top = tl.full([BLOCK], float("-inf"), REAL)
        sum_target = tl.zeros([BLOCK], REAL)
        sum_others = tl.zeros([BLOCK], REAL)
        if ACTIVATION == SOFTMAX:
            for first in tl.range(0, C, CHUNK):
                z = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CHUNK, WHOLE, CLEAR, BLOCK, PACK, REAL)
                if GENERAL:
                    top, sum_others, sum_target = _add_tops(z, top, sum_others, sum_target)
                else:
                    c = _classes(first, CHUNK)
                    top, sum_target, sum_others, _, _ = _online(z, c, label, top, sum_target, sum_others)
        filled = tl.where(start == last, 0, C)
        for first in tl.range(0, C, CHUNK):
            _count_chunk(rows, target, first, start, voxels, ls_c, ls_v, ts_c, at, label, counts, w, top, sum_target,
                         sum_others, gamma, partial, filled, C, CHUNK, WHOLE, CLEAR, BLOCK, PACK, ACTIVATION,
                         FIRST_LABEL, DENSE, OVERLAP, CE, FOCAL, GENERAL, REAL)  # fmt: skip
        tl.debug_barrier()  # the row's stores before the next tile's loads


# ---- Table -----------------------------------------------------------------------------------------------------------


@triton.jit
def sum_partial_kernel(
    partial, counts, programs, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr
):
    """counts[n, c, q] = sum of partial[n, :, q, c] in float64, always in the same order."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    total = tl.zeros([ROWS, TOGETHER], tl.float64)
    for first in tl.range(0, programs, ROWS):
        p = first + tl.arange(0, ROWS)
        there = (p < programs)[:, None] & (i < COLUMNS * C)[None, :]
        at = partial + (n * programs + p)[:, None] * COLUMNS * C + i[None, :]
        total += tl.load(at, mask=there, other=0.0).to(tl.float64)
    tl.store(counts + n * COLUMNS * C + i % C * COLUMNS + i // C, tl.sum(total, 0), mask=i < COLUMNS * C)


@triton.jit
def _power(x, gamma):
    # x ** gamma for x > 0
    return tl.exp(tl.log(x) * gamma)


@triton.jit
def _column(counts, first, together, c, there, q, C: tl.constexpr, COLUMNS: tl.constexpr, CLASSES: tl.constexpr):
    # One column of a row: the sum over its samples.
    total = tl.zeros([CLASSES], tl.float64)
    for k in tl.range(0, together):
        n = (first + k).to(tl.int64)
        total += tl.load(counts + (n * C + c) * COLUMNS + q, mask=there, other=0.0)
    return total


@triton.jit
def _bounded(x, loss):
    # A coefficient of at most what bounded_coefficient in csrc/tversky_math.h says
    most = 1e290 if loss.dtype.element_ty == tl.float64 else 1e30
    return tl.where(x > most, most, tl.where(x < -most, -most, x))


@triton.jit
def _ratio(numerator, denominator):
    some = denominator != 0
    return tl.where(some, numerator / tl.where(some, denominator, 1.0), 0.0)


@triton.jit(
    do_not_specialize=[
        *("alpha", "beta", "gamma", "smooth_nr", "smooth_dr"),
        *("tversky_weight", "ce_weight", "label_smoothing"),
    ]
)
def table_kernel(
    counts, class_parameters, loss, coefficients, samples, alpha: tl.int64, beta: tl.int64, gamma: tl.int64,
    smooth_nr: tl.int64, smooth_dr: tl.int64, tversky_weight: tl.int64, ce_weight: tl.int64,
    label_smoothing: tl.int64,
    C: tl.constexpr, CLASSES: tl.constexpr, FIRST_CLASS: tl.constexpr, BATCH: tl.constexpr, ABSENT: tl.constexpr,
    REDUCTION: tl.constexpr, HAS_CLASS_PARAMETERS: tl.constexpr, CE: tl.constexpr, CE_MEAN: tl.constexpr,
):  # fmt: skip
    """Loss and coefficients[rows, C, 2 or 4] from counts[n, c, 3 or 6]; one program.

    alpha to label_smoothing are the bits of a float64, for Triton passes every Python float as a float32.
    """
    COLUMNS: tl.constexpr = 6 if CE else 3
    WIDTH: tl.constexpr = 4 if CE else 2
    gamma = _double(gamma)
    smooth_nr, smooth_dr = _double(smooth_nr), _double(smooth_dr)
    tversky_weight, ce_weight, smooth = _double(tversky_weight), _double(ce_weight), _double(label_smoothing)
    c = tl.arange(0, CLASSES)
    there = c < C
    kept = there & (c >= FIRST_CLASS)
    a = tl.full([CLASSES], 0.0, tl.float64) + _double(alpha)
    b = tl.full([CLASSES], 0.0, tl.float64) + _double(beta)
    cw = tl.full([CLASSES], 1.0, tl.float64)
    ce_cw = tl.where(there, cw, 0.0)
    if HAS_CLASS_PARAMETERS:
        a = tl.load(class_parameters + c, mask=there, other=0.0)
        b = tl.load(class_parameters + C + c, mask=there, other=0.0)
        cw = tl.load(class_parameters + 2 * C + c, mask=there, other=0.0)
        ce_cw = tl.load(class_parameters + 3 * C + c, mask=there, other=0.0)
    options = 2.0 if CE_MEAN == 2 else C * 1.0
    total = tl.zeros([CLASSES], tl.float64)
    averaged = tl.zeros([CLASSES], tl.float64)
    ce_total = tl.zeros([CLASSES], tl.float64)
    divisors = tl.zeros([CLASSES], tl.float64)
    rows = samples
    together = 1
    if BATCH:
        rows = 1
        together = samples
    for r in tl.range(0, rows):
        tp = _column(counts, r * together, together, c, there, 0, C, COLUMNS, CLASSES)
        fp = _column(counts, r * together, together, c, there, 1, C, COLUMNS, CLASSES)
        fn = _column(counts, r * together, together, c, there, 2, C, COLUMNS, CLASSES)
        is_absent = tp + fn == 0
        wrong = a * fp + b * fn
        error = wrong + (smooth_dr - smooth_nr)
        numerator = tp + smooth_nr
        denominator = tp + (wrong + smooth_dr)
        empty = denominator == 0
        denominator = tl.where(empty, 1.0, denominator)
        x = tl.where(empty, 0.0, error / denominator)
        flat = x <= 0
        safe = tl.where(flat, 1.0, x)
        is_linear = gamma == 1.0
        slope = tl.where(is_linear, 1.0, tl.where(flat, 0.0, gamma * _power(safe, gamma - 1.0)))
        x = tl.where(is_linear, x, tl.where(flat, 0.0, _power(safe, gamma)))
        used = kept & ~empty
        if ABSENT != 0:
            used = used & ~is_absent
        common = tl.where(used, cw * slope / denominator, 0.0)
        u_background = common * a * (numerator / denominator) * tversky_weight
        u_foreground = (-common * (error / denominator) - common * b * (numerator / denominator)) * tversky_weight
        value = tl.where(used, cw * x, 0.0) * tversky_weight
        at = coefficients + (r * C + c) * WIDTH
        tl.store(at, u_background, mask=there)
        tl.store(at + 1, u_foreground, mask=there)
        if CE:
            terms = (1.0 - smooth) * _column(counts, r * together, together, c, there, 3, C, COLUMNS, CLASSES)
            terms += smooth / options * _column(counts, r * together, together, c, there, 4, C, COLUMNS, CLASSES)
            voxels = _column(counts, r * together, together, c, there, 5, C, COLUMNS, CLASSES)
            if CE_MEAN == 0:
                divisor = tl.where(there, ce_cw * (tp + fn), 0.0)
            elif CE_MEAN == 3:
                divisor = tl.where(there, ce_cw * voxels, 0.0)
            elif CE_MEAN == 1:
                divisor = voxels / C
            else:
                divisor = voxels
            ce_total += tl.where(there, ce_cw * terms, 0.0)
            divisors += divisor
            if REDUCTION == 0:
                row_divisor = tl.sum(divisor, 0)
                value += ce_weight * _ratio(tl.sum(tl.where(there, ce_cw * terms, 0.0), 0), row_divisor)
                per = ce_weight * ce_cw * _ratio(1.0, row_divisor)
                tl.store(at + 2, _bounded(per * (1.0 - smooth), loss), mask=there)
                tl.store(at + 3, _bounded(per * smooth / options, loss), mask=there)
        if REDUCTION == 0:
            tl.store(at, _bounded(u_background, loss), mask=there)
            tl.store(at + 1, _bounded(u_foreground, loss), mask=there)
            tl.store(loss + r * (C - FIRST_CLASS) + c - FIRST_CLASS, value.to(loss.dtype.element_ty), mask=kept)
        total += value
        counted = kept
        if ABSENT == 2:
            counted = counted & ~is_absent
        averaged += counted.to(tl.float64)
    if REDUCTION != 0:
        scale = tl.sum(averaged * 0.0, 0) + 1.0
        ce_scale = scale
        if REDUCTION == 2:
            scale = _ratio(1.0, tl.sum(averaged, 0))
            ce_scale = _ratio(1.0, tl.sum(divisors, 0))
        value = tl.sum(total, 0) * scale + ce_weight * tl.sum(ce_total, 0) * ce_scale
        tl.store(loss, value.to(loss.dtype.element_ty))
        tl.debug_barrier()  # the coefficients' stores before they are scaled
        for r in tl.range(0, rows):
            at = coefficients + (r * C + c) * WIDTH
            tl.store(at, _bounded(tl.load(at, mask=there, other=0.0) * scale, loss), mask=there)
            tl.store(at + 1, _bounded(tl.load(at + 1, mask=there, other=0.0) * scale, loss), mask=there)
            if CE:
                per = ce_weight * ce_cw * ce_scale
                tl.store(at + 2, _bounded(per * (1.0 - smooth), loss), mask=there)
                tl.store(at + 3, _bounded(per * smooth / options, loss), mask=there)


# ---- Gradient pass ---------------------------------------------------------------------------------------------------


@triton.jit
def _coefficients(coefficients, grad_loss, c, row, C: tl.constexpr, GRAD_CLASSES: tl.constexpr,
                  KEPT: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # dL/dp where g = 0 and where g = 1, dL/dCE and dL/dsmoothing, times the upstream gradient. GRAD_CLASSES: 0 for a
    # scalar loss, else C'; KEPT: a power of two that holds it. Of squares dL/dTP where g = 1, for dL/dFN is dL/dFP.
    at = coefficients + (row * C + c) * (4 if CE > 0 else 2)
    there = c < C
    if GRAD_CLASSES == 0:
        upstream = tl.load(grad_loss).to(tl.float64)
        of_row = upstream
    else:
        dropped = C - GRAD_CLASSES
        graded = there & (c >= dropped)
        upstream = tl.load(grad_loss + row * GRAD_CLASSES + c - dropped, mask=graded, other=0.0).to(tl.float64)
        of_row = upstream
        if CE > 0:  # every value of the row contains the cross-entropy
            every = tl.arange(0, KEPT)
            values = tl.load(grad_loss + row * GRAD_CLASSES + every, mask=every < GRAD_CLASSES, other=0.0)
            of_row = tl.sum(values.to(tl.float64), 0)
    background = tl.load(at, mask=there, other=0.0) * upstream
    foreground = tl.load(at + 1, mask=there, other=0.0) * upstream
    if OVERLAP == 2:
        foreground += background
    ce, smoothing = background * 0.0, background * 0.0
    if CE > 0:
        ce = tl.load(at + 2, mask=there, other=0.0) * of_row
        smoothing = tl.load(at + 3, mask=there, other=0.0) * of_row
    return (
        background.to(REAL)[:, None],
        foreground.to(REAL)[:, None],
        ce.to(REAL)[:, None],
        smoothing.to(REAL)[:, None],
    )


@triton.jit
def _store_gradient(out, dz, first, start, voxels, gs_c, gs_v, C: tl.constexpr, CLASSES: tl.constexpr,
                    WHOLE: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr):  # fmt: skip
    c = _classes(first, CLASSES)
    offsets = _offsets(start, BLOCK, PACK)
    there = (offsets < voxels)[None, :]
    if not WHOLE:
        there = there & (c < C)[:, None]
    at = out + c.to(tl.int64)[:, None] * gs_c + (offsets * gs_v)[None, :]
    tl.store(at, dz.to(out.dtype.element_ty), mask=there)


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


@triton.jit(do_not_specialize=["focal_gamma"])
def all_classes_gradient_kernel(
    grad_loss, logits, target, weight, coefficients, out, voxels, ls_n, ls_c, ls_v, gs_n, gs_c, gs_v, ts_n, ts_c, ts_v,
    ws_n, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2, ignore_index, focal_gamma: tl.int64, programs,
    row_stride,
    C: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
    PACK: tl.constexpr, ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr, GRAD_CLASSES: tl.constexpr,
    KEPT: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """dL/dlogits by tiles that hold all classes at once. row_stride: 0 where the batch shares one row, else 1."""
    CLEAR: tl.constexpr = HAS_IGNORE or HAS_WEIGHT
    if INTERLEAVED:  # as in the count pass
        ls_v = C
        gs_v = C
    n, _program, begin, step, _last = _share(programs, voxels, BLOCK)
    rows, target, weight, out = logits + n * ls_n, target + n * ts_n, weight + n * ws_n, out + n * gs_n
    gamma = _double(focal_gamma).to(REAL)
    coefficients_of = ()  # each tile
    for i in tl.static_range(TILES):
        coefficients_of += (
            _coefficients(coefficients, grad_loss, _classes(i * MAIN, MAIN if i == 0 else TAIL), n * row_stride, C,
                          GRAD_CLASSES, KEPT, OVERLAP, CE, REAL),
        )  # fmt: skip
    s_all = 0.0
    if CE == 2:
        for i in tl.static_range(TILES):
            s_all += tl.sum(coefficients_of[i][3])
    for start in tl.range(begin, voxels, step):
        label, w, counts, dense, zs, top = _all_classes(
            rows, target, weight, start, voxels, ls_c, ls_v, ts_c, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1,
            w2, f0, f1, f2, ignore_index, C, MAIN, TAIL, TILES, BLOCK, PACK, ACTIVATION, FIRST_LABEL, DENSE, RESAMPLED,
            HAS_IGNORE, HAS_WEIGHT, REAL)  # fmt: skip
        if GENERAL and ACTIVATION == SOFTMAX:
            beyond_one, inverse = _sum_beyond_one(zs, top, TILES, BLOCK, REAL)
            rest_u = tl.zeros([BLOCK], REAL)
            top_u = tl.zeros([BLOCK], REAL)
            b_all = tl.zeros([BLOCK], REAL)
            slopes = ()
            for i in tl.static_range(TILES):
                background, foreground, ce, smoothing = coefficients_of[i]
                g = _target_of(dense[i], _classes(i * MAIN, MAIN if i == 0 else TAIL), label, counts, FIRST_LABEL,
                               DENSE, CLEAR, REAL)  # fmt: skip
                of_tile = _general_slopes(zs[i], g, top, beyond_one, inverse, gamma, background, foreground, ce,
                                          smoothing, OVERLAP, CE, FOCAL, REAL)  # fmt: skip
                p, _complement, u, b = of_tile
                slopes += (u, b)
                more_rest_u, more_top_u, more_b = _general_sums(zs[i], top, p, u, b)
                rest_u += more_rest_u
                top_u += more_top_u
                b_all += more_b
            top = _again(top, 1.0 + beyond_one)
            for i in tl.static_range(TILES):
                p, complement = _dense_probability(zs[i], top, beyond_one, inverse)
                dz = _general_gradient(
                    p, complement, slopes[2 * i], slopes[2 * i + 1], rest_u, top_u, b_all, beyond_one, inverse, w, CE
                )
                _store_gradient(out, dz, i * MAIN, start, voxels, gs_c, gs_v, C, MAIN if i == 0 else TAIL,
                                (MAIN if i == 0 else MAIN + TAIL) <= C, BLOCK, PACK)  # fmt: skip
        elif ACTIVATION == SOFTMAX:
            others = ()
            sum_others = tl.zeros([BLOCK], REAL)
            sum_target = tl.zeros([BLOCK], REAL)
            weighted_others = tl.zeros([BLOCK], REAL)
            u_target = tl.zeros([BLOCK], REAL)
            k_target = tl.zeros([BLOCK], REAL)
            b_target = tl.zeros([BLOCK], REAL)
            s_target = tl.zeros([BLOCK], REAL)
            for i in tl.static_range(TILES):
                background, foreground, ce, smoothing = coefficients_of[i]
                c = _classes(i * MAIN, MAIN if i == 0 else TAIL)
                of_tile, more_others, more_target = _split(zs[i], top, c, label)
                others += (of_tile,)
                sum_others += more_others
                sum_target += more_target
                weighted_others += tl.sum(of_tile * _slope_of_other(of_tile, background, OVERLAP), 0)
                u_target += tl.sum(_of_target(foreground, c, label), 0)
                if OVERLAP == 2:
                    b_target += tl.sum(_of_target(background, c, label), 0)
                if CE > 0:
                    k_target += tl.sum(_of_target(ce, c, label), 0)
                if CE == 2:
                    s_target += tl.sum(_of_target(smoothing, c, label), 0)
            inverse = _divide(1.0, sum_target + sum_others)
            if OVERLAP == 2:
                weighted_others *= inverse  # the slopes were made of exponentials
                u_target = _squared_slope_of_target(sum_others * inverse, b_target, u_target)
            if FOCAL:
                k_target *= _label_focal_slope(sum_target, sum_others, gamma, FOCAL, REAL)
            scale, offset, target_dz = _gradient_terms(
                sum_target, sum_others, weighted_others, u_target, k_target, s_target, s_all, w
            )
            label = _again(label, sum_others)
            for i in tl.static_range(TILES):
                background, _foreground, _ce, smoothing = coefficients_of[i]
                c = _classes(i * MAIN, MAIN if i == 0 else TAIL)
                slope = _slope_of_other(others[i] * inverse[None, :], background, OVERLAP)
                dz = others[i] * scale[None, :] * (slope + offset[None, :])
                if CE == 2:
                    dz -= smoothing * w[None, :]
                dz = tl.where(c[:, None] == label[None, :], target_dz[None, :], dz)
                _store_gradient(out, dz, i * MAIN, start, voxels, gs_c, gs_v, C, MAIN if i == 0 else TAIL,
                                (MAIN if i == 0 else MAIN + TAIL) <= C, BLOCK, PACK)  # fmt: skip
        else:
            for i in tl.static_range(TILES):
                background, foreground, ce, smoothing = coefficients_of[i]
                c = _classes(i * MAIN, MAIN if i == 0 else TAIL)
                if GENERAL:
                    g = _target_of(dense[i], c, label, counts, FIRST_LABEL, DENSE, CLEAR, REAL)
                    dz = _general_channel_gradient(zs[i], g, w, gamma, background, foreground, ce, smoothing,
                                                   ACTIVATION, OVERLAP, CE, FOCAL, not DENSE, REAL)  # fmt: skip
                else:
                    dz = _channel_gradient(zs[i], c, label, w, background, foreground, FIRST_LABEL, ACTIVATION)
                _store_gradient(out, dz, i * MAIN, start, voxels, gs_c, gs_v, C, MAIN if i == 0 else TAIL,
                                (MAIN if i == 0 else MAIN + TAIL) <= C, BLOCK, PACK)  # fmt: skip


@triton.jit(do_not_specialize=["focal_gamma"])
def two_classes_gradient_kernel(
    grad_loss, logits, target, weight, coefficients, out, voxels, ls_n, ls_c, ls_v, gs_n, gs_c, gs_v, ts_n, ts_c, ts_v,
    ws_n, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2, ignore_index, focal_gamma: tl.int64, programs,
    row_stride,
    BLOCK: tl.constexpr, PACK: tl.constexpr, GRAD_CLASSES: tl.constexpr, KEPT: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """dL/dlogits of two classes: dz_1 = p_0 p_1 (u_1 - u_0) = -dz_0."""
    n, _program, begin, step, _last = _share(programs, voxels, BLOCK)
    rows, target, weight, out = logits + n * ls_n, target + n * ts_n, weight + n * ws_n, out + n * gs_n
    gamma = _double(focal_gamma).to(REAL)
    background, foreground, ce, smoothing = _coefficients(
        coefficients, grad_loss, tl.arange(0, 2), n * row_stride, 2, GRAD_CLASSES, KEPT, OVERLAP, CE, REAL
    )
    sign = tl.where(tl.arange(0, 2) == 1, 1.0, -1.0).to(REAL)[:, None]
    # u_1 - u_0 where the label is 1: foreground_1 - background_0; where it is 0: background_1 - foreground_0
    is_class_1 = sign > 0
    if_label_1 = tl.sum(tl.where(is_class_1, foreground, -background))
    if_label_0 = tl.sum(tl.where(is_class_1, background, -foreground))
    # Of squares, u_label - u_other = foreground - 2 p_other (both backgrounds).
    foreground_1 = tl.sum(tl.where(is_class_1, foreground, 0.0))
    foreground_0 = tl.sum(tl.where(is_class_1, 0.0, foreground))
    backgrounds = tl.sum(background)
    ce_1 = tl.sum(tl.where(is_class_1, ce, 0.0))
    ce_0 = tl.sum(tl.where(is_class_1, 0.0, ce))
    smoothing_1 = tl.sum(tl.where(is_class_1, smoothing, 0.0))
    smoothing_0 = tl.sum(tl.where(is_class_1, 0.0, smoothing))
    for start in tl.range(begin, voxels, step):
        label, w, counts, _ = _voxels(
            target, weight, start, voxels, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2,
            ignore_index, 2, False, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, BLOCK, PACK, REAL)  # fmt: skip
        difference = _two_logits(rows, start, voxels, ls_c, ls_v, counts, HAS_IGNORE or HAS_WEIGHT, BLOCK, PACK, REAL)
        p1, p0, product = _logistic(difference)
        slope = tl.where(label == 1, if_label_1, if_label_0)
        if OVERLAP == 2:
            slope = tl.where(
                label == 1,
                _squared_slope_of_target(p0, backgrounds, foreground_1),
                -_squared_slope_of_target(p1, backgrounds, foreground_0),
            )
        dz = product * slope
        if CE == 2:  # p_1 b_0 - p_0 b_1
            b0 = tl.where(label == 1, smoothing_0, ce_0 + smoothing_0)
            b1 = tl.where(label == 1, ce_1 + smoothing_1, smoothing_1)
            dz += p1 * b0 - p0 * b1
        elif CE > 0:
            of_label = tl.where(label == 1, -ce_1 * p0, ce_0 * p1)
            if FOCAL:
                of1, of0 = _sigmoid_logs(difference, REAL)
                right, wrong = tl.where(label == 1, p1, p0), tl.where(label == 1, p0, p1)
                minus_log_p = tl.where(label == 1, of1, of0)
                of_label *= _focal_slope(right, wrong, minus_log_p, gamma, FOCAL, REAL)
            dz += of_label
        dz *= w
        offsets = _offsets(start, BLOCK, PACK)
        inside = offsets < voxels
        tl.store(out + offsets * gs_v, (-dz).to(out.dtype.element_ty), mask=inside)
        tl.store(out + gs_c + offsets * gs_v, dz.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_chunk(rows, out, target, first, start, voxels, ls_c, ls_v, gs_c, gs_v, ts_c, at, label, counts, w, top,
                    scale, offset, target_dz, gamma, rest_u, top_u, b_all, beyond_one, inverse, coefficients,
                    grad_loss, row, C: tl.constexpr, CLASSES: tl.constexpr, WHOLE: tl.constexpr, CLEAR: tl.constexpr,
                    BLOCK: tl.constexpr, PACK: tl.constexpr, ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr,
                    GRAD_CLASSES: tl.constexpr, KEPT: tl.constexpr, DENSE: tl.constexpr, OVERLAP: tl.constexpr,
                    CE: tl.constexpr, FOCAL: tl.constexpr, GENERAL: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    c = _classes(first, CLASSES)
    z = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CLASSES, WHOLE, CLEAR, BLOCK, PACK, REAL)
    background, foreground, ce, smoothing = _coefficients(
        coefficients, grad_loss, c, row, C, GRAD_CLASSES, KEPT, OVERLAP, CE, REAL
    )
    if GENERAL:
        dense = label
        if DENSE:
            dense = _dense_targets(target, at, ts_c, first, start, voxels, C, CLASSES, WHOLE, BLOCK)
        g = _target_of(dense, c, label, counts, FIRST_LABEL, DENSE, CLEAR, REAL)
        if ACTIVATION == SOFTMAX:
            p, complement, u, b = _general_slopes(
                z, g, top, beyond_one, inverse, gamma, background, foreground, ce, smoothing, OVERLAP, CE, FOCAL, REAL
            )
            dz = _general_gradient(p, complement, u, b, rest_u, top_u, b_all, beyond_one, inverse, w, CE)
        else:
            dz = _general_channel_gradient(
                z, g, w, gamma, background, foreground, ce, smoothing, ACTIVATION, OVERLAP, CE, FOCAL, not DENSE, REAL
            )
    elif ACTIVATION == SOFTMAX:
        others, _, _ = _split(z, top, c, label)
        dz = others * scale[None, :] * (background + offset[None, :])
        dz = tl.where(c[:, None] == label[None, :], target_dz[None, :], dz)
    else:
        dz = _channel_gradient(z, c, label, w, background, foreground, FIRST_LABEL, ACTIVATION)
    _store_gradient(out, dz, first, start, voxels, gs_c, gs_v, C, CLASSES, WHOLE, BLOCK, PACK)


@triton.jit
def _online_gradient(rows, first, start, voxels, ls_c, ls_v, label, counts, top, sum_target, sum_others,
                     weighted_others, u_target, k_target, coefficients, grad_loss, row, C: tl.constexpr,
                     CLASSES: tl.constexpr, WHOLE: tl.constexpr, CLEAR: tl.constexpr, BLOCK: tl.constexpr,
                     PACK: tl.constexpr, GRAD_CLASSES: tl.constexpr, KEPT: tl.constexpr, CE: tl.constexpr,
                     REAL: tl.constexpr):  # fmt: skip
    c = _classes(first, CLASSES)
    z = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CLASSES, WHOLE, CLEAR, BLOCK, PACK, REAL)
    background, foreground, ce, _ = _coefficients(coefficients, grad_loss, c, row, C, GRAD_CLASSES, KEPT, 0, CE, REAL)
    top, sum_target, sum_others, others, rescale = _online(z, c, label, top, sum_target, sum_others)
    weighted_others = weighted_others * rescale + tl.sum(others * background, 0)
    u_target += tl.sum(_of_target(foreground, c, label), 0)
    if CE > 0:
        k_target += tl.sum(_of_target(ce, c, label), 0)
    return top, sum_target, sum_others, weighted_others, u_target, k_target


@triton.jit
def _general_sums_of_chunk(rows, target, first, start, voxels, ls_c, ls_v, ts_c, at, label, counts, top, beyond_one,
                           inverse, gamma, rest_u, top_u, b_all, coefficients, grad_loss, row, C: tl.constexpr,
                           CLASSES: tl.constexpr, WHOLE: tl.constexpr, CLEAR: tl.constexpr, BLOCK: tl.constexpr,
                           PACK: tl.constexpr, FIRST_LABEL: tl.constexpr, GRAD_CLASSES: tl.constexpr,
                           KEPT: tl.constexpr, DENSE: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr,
                           FOCAL: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    c = _classes(first, CLASSES)
    z = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CLASSES, WHOLE, CLEAR, BLOCK, PACK, REAL)
    background, foreground, ce, smoothing = _coefficients(
        coefficients, grad_loss, c, row, C, GRAD_CLASSES, KEPT, OVERLAP, CE, REAL
    )
    dense = label
    if DENSE:
        dense = _dense_targets(target, at, ts_c, first, start, voxels, C, CLASSES, WHOLE, BLOCK)
    g = _target_of(dense, c, label, counts, FIRST_LABEL, DENSE, CLEAR, REAL)
    p, _, u, b = _general_slopes(
        z, g, top, beyond_one, inverse, gamma, background, foreground, ce, smoothing, OVERLAP, CE, FOCAL, REAL
    )
    more_rest_u, more_top_u, more_b = _general_sums(z, top, p, u, b)
    return rest_u + more_rest_u, top_u + more_top_u, b_all + more_b


@triton.jit(do_not_specialize=["focal_gamma"])
def many_classes_gradient_kernel(
    grad_loss, logits, target, weight, coefficients, out, voxels, ls_n, ls_c, ls_v, gs_n, gs_c, gs_v, ts_n, ts_c, ts_v,
    ws_n, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2, ignore_index, focal_gamma: tl.int64, programs,
    row_stride,
    C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
    ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr, GRAD_CLASSES: tl.constexpr, KEPT: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """dL/dlogits, the classes in chunks. A chunk is read again only before it is written: out may be logits."""
    CLEAR: tl.constexpr = HAS_IGNORE or HAS_WEIGHT
    WHOLE: tl.constexpr = C % CHUNK == 0
    n, _program, begin, step, _last = _share(programs, voxels, BLOCK)
    rows, target, weight, out = logits + n * ls_n, target + n * ts_n, weight + n * ws_n, out + n * gs_n
    gamma = _double(focal_gamma).to(REAL)
    row = n * row_stride
    for start in tl.range(begin, voxels, step):
        label, w, counts, at = _voxels(
            target, weight, start, voxels, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2,
            ignore_index, C + FIRST_LABEL, DENSE, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, BLOCK, PACK, REAL)  # fmt: skip
        if DENSE and HAS_IGNORE:
            w, counts = _ignored_by_chunks(
                target, at, ts_c, start, voxels, w, counts, ignore_index, C, HAS_WEIGHT, BLOCK
            )
        top = tl.full([BLOCK], float("-inf"), REAL)
        sum_target = tl.zeros([BLOCK], REAL)
        sum_others = tl.zeros([BLOCK], REAL)
        weighted_others = tl.zeros([BLOCK], REAL)
        u_target = tl.zeros([BLOCK], REAL)
        k_target = tl.zeros([BLOCK], REAL)
        b_all = tl.zeros([BLOCK], REAL)
        beyond_one = tl.zeros([BLOCK], REAL)
        inverse = tl.zeros([BLOCK], REAL)
        if ACTIVATION == SOFTMAX and not GENERAL:
            for first in tl.range(0, C, CHUNK):
                top, sum_target, sum_others, weighted_others, u_target, k_target = _online_gradient(
                    rows, first, start, voxels, ls_c, ls_v, label, counts, top, sum_target, sum_others, weighted_others,
                    u_target, k_target, coefficients, grad_loss, row, C, CHUNK, WHOLE, CLEAR, BLOCK, PACK, GRAD_CLASSES,
                    KEPT, CE, REAL)  # fmt: skip
        if ACTIVATION == SOFTMAX and GENERAL:
            # weighted_others and u_target are rest_u and top_u, sum_target the largest.
            for first in tl.range(0, C, CHUNK):
                z = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CHUNK, WHOLE, CLEAR, BLOCK, PACK, REAL)
                top, sum_others, sum_target = _add_tops(z, top, sum_others, sum_target)
            beyond_one = sum_others + (sum_target - 1.0)
            inverse = _divide(1.0, 1.0 + beyond_one)
            for first in tl.range(0, C, CHUNK):
                weighted_others, u_target, b_all = _general_sums_of_chunk(
                    rows, target, first, start, voxels, ls_c, ls_v, ts_c, at, label, counts, top, beyond_one, inverse,
                    gamma, weighted_others, u_target, b_all, coefficients, grad_loss, row, C, CHUNK, WHOLE, CLEAR,
                    BLOCK, PACK, FIRST_LABEL, GRAD_CLASSES, KEPT, DENSE, OVERLAP, CE, FOCAL, REAL)  # fmt: skip
        if FOCAL and ACTIVATION == SOFTMAX and not GENERAL:
            k_target *= _label_focal_slope(sum_target, sum_others, gamma, FOCAL, REAL)
        scale, offset, target_dz = _gradient_terms(
            sum_target, sum_others, weighted_others, u_target, k_target, 0.0, 0.0, w
        )
        for first in tl.range(0, C, CHUNK):
            _gradient_chunk(rows, out, target, first, start, voxels, ls_c, ls_v, gs_c, gs_v, ts_c, at, label, counts, w,
                            top, scale, offset, target_dz, gamma, weighted_others, u_target, b_all, beyond_one, inverse,
                            coefficients, grad_loss, row, C, CHUNK, WHOLE, CLEAR, BLOCK, PACK, ACTIVATION, FIRST_LABEL,
                            GRAD_CLASSES, KEPT, DENSE, OVERLAP, CE, FOCAL, GENERAL, REAL)  # fmt: skip
