"""The passes as Triton kernels: count pass, table, gradient pass.

One program takes every P-th tile of BLOCK voxels of one sample. Up to `FEW_CLASSES` classes a tile of all classes stays
in registers and is read once. Beyond, the classes come in chunks of a power of two (and one smaller chunk for the rest,
so that 33 classes are 32 + 1 and not 64): an online softmax over the chunks, then the chunks once more out of the
cache.

The arithmetic is that of csrc/tversky_math.h, which says why; docs/mathematics.md derives it.

What decides the code of a kernel: GENERAL, that every class of a voxel has a target g of its own (DENSE, or class
indices as one-hot); OVERLAP, how it is measured (see enum OverlapForm); CE: 0 no cross-entropy, 1 its sums, 2 and those
for label smoothing; FOCAL, its exponent; RESAMPLED, that target and weight have other sizes than the logits. The counts
have 3 columns, or 6 with a cross-entropy (see enum Count); the coefficients 2, or 4.
"""

import triton
import triton.language as tl

SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)


@triton.jit
def _source(offsets, stride, sy, sx, n0, n1, n2, s0, s1, s2, f0, f1, f2, RESAMPLED: tl.constexpr):
    # Where the voxels are found: one stride apart, or where torch's interpolate(mode="nearest") takes them from.
    if RESAMPLED:
        row = offsets // sx
        z, y, x = row // sy, row % sy, offsets % sx
        z = tl.minimum((z.to(tl.float32) * f0).to(tl.int64), n0 - 1)
        y = tl.minimum((y.to(tl.float32) * f1).to(tl.int64), n1 - 1)
        x = tl.minimum((x.to(tl.float32) * f2).to(tl.int64), n2 - 1)
        at = z * s0 + y * s1 + x * s2
    else:
        at = offsets * stride
    return at


@triton.jit
def _voxels(target, weight, start, voxels, ts_c, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2,
            ignore_index, LABELS, C: tl.constexpr, DENSE: tl.constexpr, RESAMPLED: tl.constexpr,
            HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # -> label (0 of a dense target), weight, whether the voxel counts, whether label or weight are out of range, and
    # the voxels' offsets in the target
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < voxels
    at = _source(offsets, ts_v, sy, sx, n0, n1, n2, t0, t1, t2, f0, f1, f2, RESAMPLED)
    if DENSE:
        label = tl.zeros([BLOCK], tl.int32)
        counts = inside
        bad = label != label
        if HAS_IGNORE:  # voxels that hold it in every class do not count
            others = tl.zeros([BLOCK], tl.int32)
            for c in tl.range(0, C):
                g = tl.load(target + c * ts_c + at, mask=inside, other=0)
                others += (g != ignore_index).to(tl.int32)
            counts = counts & (others > 0)
    else:
        label = tl.load(target + at, mask=inside, other=0)
        label = label.to(tl.int64) if label.dtype == tl.int64 else label.to(tl.int32)
        known = (label >= 0) & (label < LABELS)
        ignored = label != label
        if HAS_IGNORE:
            ignored = label == ignore_index
        counts = inside & known & ~ignored
        bad = inside & ~known & ~ignored
    w = tl.full([BLOCK], 1.0, REAL)
    if HAS_WEIGHT:
        w_at = _source(offsets, ws_v, sy, sx, n0, n1, n2, w0, w1, w2, f0, f1, f2, RESAMPLED)
        w = tl.load(weight + w_at, mask=inside, other=0).to(REAL)
        bad = bad | (inside & ~(w >= 0))
        counts = counts & (w != 0)
    return label.to(tl.int32), w, counts, bad, at


@triton.jit
def _targets(target, at, ts_c, c, label, counts, C: tl.constexpr, FIRST_LABEL: tl.constexpr, DENSE: tl.constexpr,
             REAL: tl.constexpr):  # fmt: skip
    # -> (CLASSES, BLOCK) g: 0 where the voxel does not count
    if DENSE:
        there = (c < C)[:, None] & counts[None, :]
        g = tl.load(target + c.to(tl.int64)[:, None] * ts_c + at[None, :], mask=there, other=0).to(REAL)
    else:
        g = ((c[:, None] + FIRST_LABEL == label[None, :]) & counts[None, :]).to(REAL)
    return g


@triton.jit
def _logits(rows, first, start, voxels, ls_c, ls_v, counts, C: tl.constexpr, CLASSES: tl.constexpr,
            BLOCK: tl.constexpr, FILL: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # -> (CLASSES, BLOCK) logits: 0 where the voxel does not count, FILL where there is no such class
    c = first + tl.arange(0, CLASSES)
    offsets = start + tl.arange(0, BLOCK)
    there = (c < C)[:, None] & (offsets < voxels)[None, :]
    z = tl.load(rows + c.to(tl.int64)[:, None] * ls_c + (offsets * ls_v)[None, :], mask=there, other=0.0).to(REAL)
    z = tl.where(counts[None, :], z, 0.0)
    return tl.where((c < C)[:, None], z, FILL), c


@triton.jit
def _logistic(z):
    # sigmoid(z), 1 - sigmoid(z) and their product, none by subtraction
    e = tl.exp(-tl.abs(z))
    inverse = 1.0 / (1.0 + e)
    small = e * inverse
    return tl.where(z < 0, small, inverse), tl.where(z < 0, inverse, small), small * inverse


@triton.jit
def _two_class_logit(z0, z1):
    top = tl.maximum(z0, z1)
    return (z1 - z0) - (top - top)  # +inf is NaN, as in any softmax


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
def _focal_power(x, focal_gamma, REAL: tl.constexpr):
    # x ** focal_gamma for x in [0, 1]
    some = x > 0
    exponent, mantissa = _exponent(tl.where(some, x, 1.0), REAL)
    power = tl.exp(_log_of_parts(exponent, mantissa - 1.0, REAL) * focal_gamma)
    return tl.where(some, power, x * 0.0)


@triton.jit
def _focal_slope(p, complement, minus_log_p, power, focal_gamma):
    safe = tl.where(complement > 0, complement, 1.0)
    return power * (1.0 + focal_gamma * p * (minus_log_p / safe))


@triton.jit
def _difference(p, complement, g):
    # p - g, by way of 1 - p where that is the more accurate
    return tl.where(g >= 0.5, (1.0 - g) - complement, p - g)


@triton.jit
def _overlap(p, complement, g, OVERLAP: tl.constexpr):
    if OVERLAP == 1:
        d = _difference(p, complement, g)
        tp, fp, fn = tl.where(p < g, p, g), tl.where(d > 0, d, 0.0), tl.where(d < 0, -d, 0.0)
    elif OVERLAP == 2:
        d = _difference(p, complement, g)
        tp, fp, fn = p * g, tl.where(d > 0, d * d, 0.0), tl.where(d < 0, d * d, 0.0)
    else:
        tp, fp, fn = p * g, p * (1.0 - g), complement * g
    return tp, fp, fn


@triton.jit
def _overlap_slope(p, complement, g, background, foreground, OVERLAP: tl.constexpr):
    if OVERLAP == 1:
        d = _difference(p, complement, g)
        slope = tl.where(d > 0, background, tl.where(d < 0, foreground, (background + foreground) * 0.5))
    elif OVERLAP == 2:
        slope = g * (foreground + background) + 2.0 * _difference(p, complement, g) * background
    else:
        slope = background + g * (foreground - background)
    return slope


@triton.jit
def _sigmoid_logs(z, REAL: tl.constexpr):
    # -log p and -log(1 - p)
    common = _log1p(tl.exp(-tl.abs(z)), REAL)
    return common + tl.where(z < 0, -z, 0.0), common + tl.where(z > 0, z, 0.0)


@triton.jit
def _add_tops(z, top, rest, tops):
    # Adds a chunk to the sums of exponentials, the largest logits' apart: see TopSums
    new_top = tl.maximum(top, tl.max(z, 0))
    kept = top == new_top
    rest = tl.where(kept, rest, (rest + tops) * tl.exp(top - new_top))
    tops = tl.where(kept, tops, 0.0)
    is_top = z == new_top[None, :]
    e = tl.exp(z - new_top[None, :])
    return new_top, rest + tl.sum(tl.where(is_top, 0.0, e), 0), tops + tl.sum(tl.where(is_top, e, 0.0), 0)


@triton.jit
def _dense_probability(z, top, beyond_one, inverse):
    p = tl.exp(z - top[None, :]) * inverse[None, :]
    return p, tl.where(z == top[None, :], (beyond_one * inverse)[None, :], 1.0 - p)


@triton.jit
def _split(z, top, c, label, counts):
    # exponentials of the classes that are not the target (0 where it is, or the voxel does not count), and the target's
    e = tl.exp(z - top[None, :])
    is_target = (c[:, None] == label[None, :]) & counts[None, :]
    others = tl.where(is_target | ~counts[None, :], 0.0, e)
    return others, tl.where(is_target, e, 0.0), is_target


@triton.jit
def _label_cross_entropy(z, top, is_target, target, others, counts, w, REAL: tl.constexpr):
    # -log p of the label, weighted; right where the label is one of these classes
    below_top = tl.sum(tl.where(is_target, top[None, :] - z, 0.0), 0)
    ce = below_top + _log1p(others + (target - 1.0), REAL)
    return tl.where(counts, ce * w, 0.0)


@triton.jit
def _gradient_terms(target, others, weighted_others, u_target, k_target, counts, w):
    # -> scale, offset, gradient at the target
    inverse = tl.where(counts, 1.0 / (target + others), 0.0)
    shift = tl.where(target > others, u_target, 0.0)
    above = u_target - shift
    excess = (weighted_others + above * target - shift * others) * inverse
    scale = inverse * w
    return scale, k_target - shift - excess, scale * (target * (above - excess) - k_target * others)


# ---- Count pass ------------------------------------------------------------------------------------------------------


@triton.jit
def _channel_counts(z, c, label, counts, w, FIRST_LABEL: tl.constexpr, ACTIVATION: tl.constexpr):
    # tp, fp, fn of every channel by itself, voxel by voxel
    if ACTIVATION == SIGMOID:
        p, complement, _ = _logistic(z)
    else:
        p = z
        complement = 1.0 - z
    is_target = (c[:, None] + FIRST_LABEL == label[None, :]) & counts[None, :]
    is_other = ~is_target & counts[None, :]
    p = p * w[None, :]
    return tl.where(is_target, p, 0.0), tl.where(is_other, p, 0.0), tl.where(is_target, complement * w[None, :], 0.0)


@triton.jit
def _general_counts(z, g, w, top, beyond_one, inverse, focal_gamma, ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr,
                    CE: tl.constexpr, FOCAL: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # tp, fp, fn, cross-entropy and smoothing of every class and voxel; w is 0 where the voxel does not count
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
    if FOCAL:
        of_one *= _focal_power(complement, focal_gamma, REAL)
        if ACTIVATION == SIGMOID:
            of_zero *= _focal_power(p, focal_gamma, REAL)
    ce = tl.where(g != 0, g * of_one, 0.0)
    smoothing = of_one
    if ACTIVATION == SIGMOID:
        ce += tl.where(g != 1, (1.0 - g) * of_zero, 0.0)
        smoothing += of_zero
    return tp * w, fp * w, fn * w, ce * w, smoothing * w


@triton.jit
def _store_counts(partial, c, tp, fp, fn, ce, smoothing, voxels, bad, C: tl.constexpr, CE: tl.constexpr):
    nan = tl.where(bad, float("nan"), 0.0)
    tl.store(partial + c, tp + nan, mask=c < C)
    tl.store(partial + C + c, fp + nan, mask=c < C)
    tl.store(partial + 2 * C + c, fn + nan, mask=c < C)
    if CE > 0:
        tl.store(partial + 3 * C + c, ce, mask=c < C)
        tl.store(partial + 4 * C + c, smoothing, mask=c < C)
        tl.store(partial + 5 * C + c, voxels + ce * 0.0, mask=c < C)


@triton.jit(do_not_specialize=["focal_gamma"])
def few_classes_count_kernel(
    logits, target, weight, partial, voxels, ls_n, ls_c, ls_v, ts_n, ts_c, ts_v, ws_n, ws_v, sy, sx, n0, n1, n2, t0, t1,
    t2, w0, w1, w2, f0, f1, f2, ignore_index, focal_gamma: tl.int64, programs,
    C: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """partial[n, program, column, C] of a tile that holds all classes at once."""
    n = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows, target, weight = logits + n * ls_n, target + n * ts_n, weight + n * ws_n
    gamma = _double(focal_gamma).to(REAL)
    tp = tl.zeros([CLASSES, BLOCK], REAL)
    fp = tl.zeros([CLASSES, BLOCK], REAL)
    fn = tl.zeros([CLASSES, BLOCK], REAL)
    ce = tl.zeros([CLASSES, BLOCK], REAL)
    smoothing = tl.zeros([CLASSES, BLOCK], REAL)
    # Of all voxels, or (CE's divisor where tp + fn is not that) of those with each label.
    LABEL_WEIGHTS: tl.constexpr = OVERLAP == 2 and ACTIVATION == SOFTMAX and not DENSE
    weights = tl.zeros([CLASSES if LABEL_WEIGHTS else 1, BLOCK], REAL)
    any_bad = tl.zeros([BLOCK], tl.int1)
    step = programs.to(tl.int64) * BLOCK
    for start in tl.range(program.to(tl.int64) * BLOCK, voxels, step):
        label, w, counts, bad, at = _voxels(
            target, weight, start, voxels, ts_c, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2,
            ignore_index, C + FIRST_LABEL, C, DENSE, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, BLOCK, REAL)  # fmt: skip
        any_bad = any_bad | bad
        z, c = _logits(rows, 0, start, voxels, ls_c, ls_v, counts, C, CLASSES, BLOCK, float("-inf"), REAL)
        if CE > 0 and not LABEL_WEIGHTS:
            weights += tl.where(counts, w, 0.0)[None, :]
        if GENERAL:
            g = _targets(target, at, ts_c, c, label, counts, C, FIRST_LABEL, DENSE, REAL)
            if CE > 0 and LABEL_WEIGHTS:
                weights += g * w[None, :]
            top, rest, tops = _add_tops(z, tl.max(z, 0), tl.zeros([BLOCK], REAL), tl.zeros([BLOCK], REAL))
            beyond_one = rest + (tops - 1.0)
            more_tp, more_fp, more_fn, more_ce, more_smoothing = _general_counts(
                z, g, tl.where(counts, w, 0.0), top, beyond_one, 1.0 / (1.0 + beyond_one), gamma, ACTIVATION, OVERLAP,
                CE, FOCAL, REAL)  # fmt: skip
            tp, fp, fn = tp + more_tp, fp + more_fp, fn + more_fn
            if CE > 0:
                ce += more_ce
            if CE == 2:
                smoothing += more_smoothing
        elif ACTIVATION == SOFTMAX:
            top = tl.max(z, 0)
            others, at_target, is_target = _split(z, top, c, label, counts)
            sum_others, sum_target = tl.sum(others, 0), tl.sum(at_target, 0)
            inverse = tl.where(counts, w / (sum_target + sum_others), 0.0)
            fp += others * inverse[None, :]
            tp += at_target * inverse[None, :]
            fn += tl.where(is_target, (sum_others * inverse)[None, :], 0.0)
            if CE > 0:
                of_label = _label_cross_entropy(z, top, is_target, sum_target, sum_others, counts, w, REAL)
                ce += tl.where(is_target, of_label[None, :], 0.0)
        else:
            more_tp, more_fp, more_fn = _channel_counts(z, c, label, counts, w, FIRST_LABEL, ACTIVATION)
            tp, fp, fn = tp + more_tp, fp + more_fp, fn + more_fn
    bad = tl.max(any_bad.to(tl.int32), 0) > 0
    partial += (n * programs + program) * (6 if CE > 0 else 3) * C
    _store_counts(partial, tl.arange(0, CLASSES), tl.sum(tp, 1), tl.sum(fp, 1), tl.sum(fn, 1), tl.sum(ce, 1),
                  tl.sum(smoothing, 1), tl.sum(weights, 1), bad, C, CE)  # fmt: skip


@triton.jit(do_not_specialize=["focal_gamma"])
def two_classes_count_kernel(
    logits, target, weight, partial, voxels, ls_n, ls_c, ls_v, ts_n, ts_c, ts_v, ws_n, ws_v, sy, sx, n0, n1, n2, t0, t1,
    t2, w0, w1, w2, f0, f1, f2, ignore_index, focal_gamma: tl.int64, programs,
    BLOCK: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """partial[n, program, column, 2]: the softmax of two classes is one sigmoid."""
    n = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows, target, weight = logits + n * ls_n, target + n * ts_n, weight + n * ws_n
    right0 = tl.zeros([BLOCK], REAL)
    right1 = tl.zeros([BLOCK], REAL)
    missed0 = tl.zeros([BLOCK], REAL)
    missed1 = tl.zeros([BLOCK], REAL)
    ce0 = tl.zeros([BLOCK], REAL)
    ce1 = tl.zeros([BLOCK], REAL)
    weights = tl.zeros([BLOCK], REAL)
    any_bad = tl.zeros([BLOCK], tl.int1)
    step = programs.to(tl.int64) * BLOCK
    for start in tl.range(program.to(tl.int64) * BLOCK, voxels, step):
        label, w, counts, bad, _ = _voxels(
            target, weight, start, voxels, ts_c, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2,
            ignore_index, 2, 2, False, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, BLOCK, REAL)  # fmt: skip
        any_bad = any_bad | bad
        offsets = start + tl.arange(0, BLOCK)
        z0 = tl.load(rows + offsets * ls_v, mask=counts, other=0.0).to(REAL)
        z1 = tl.load(rows + ls_c + offsets * ls_v, mask=counts, other=0.0).to(REAL)
        difference = _two_class_logit(z0, z1)
        p1, p0, _ = _logistic(difference)
        is1 = counts & (label == 1)
        is0 = counts & (label == 0)
        if CE > 0:
            of1, of0 = _sigmoid_logs(difference, REAL)
            ce1 += tl.where(is1, of1 * w, 0.0)
            ce0 += tl.where(is0, of0 * w, 0.0)
            weights += tl.where(counts, w, 0.0)
        p1, p0 = p1 * w, p0 * w
        right1 += tl.where(is1, p1, 0.0)
        missed1 += tl.where(is1, p0, 0.0)
        right0 += tl.where(is0, p0, 0.0)
        missed0 += tl.where(is0, p1, 0.0)
    nan = tl.where(tl.max(any_bad.to(tl.int32), 0) > 0, float("nan"), 0.0)
    partial += (n * programs + program) * (12 if CE > 0 else 6)
    false0, false1 = tl.sum(missed1, 0) + nan, tl.sum(missed0, 0) + nan
    tl.store(partial, tl.sum(right0, 0) + nan)
    tl.store(partial + 1, tl.sum(right1, 0) + nan)
    tl.store(partial + 2, false0)
    tl.store(partial + 3, false1)
    tl.store(partial + 4, false1)
    tl.store(partial + 5, false0)
    if CE > 0:
        tl.store(partial + 6, tl.sum(ce0, 0))
        tl.store(partial + 7, tl.sum(ce1, 0))
        tl.store(partial + 8, 0.0)
        tl.store(partial + 9, 0.0)
        tl.store(partial + 10, tl.sum(weights, 0))
        tl.store(partial + 11, tl.sum(weights, 0))


@triton.jit
def _online(z, c, label, counts, top, sum_target, sum_others):
    new_top = tl.maximum(top, tl.max(z, 0))
    rescale = tl.exp(top - new_top)
    others, at_target, _ = _split(z, new_top, c, label, counts)
    return (
        new_top,
        sum_target * rescale + tl.sum(at_target, 0),
        sum_others * rescale + tl.sum(others, 0),
        others,
        rescale,
    )


@triton.jit
def _add_column(at, c, value, is_first, C: tl.constexpr):
    # Only this program touches its row of the partial sums.
    tl.store(at + c, value + tl.load(at + c, mask=(c < C) & ~is_first, other=0.0), mask=c < C)


@triton.jit
def _count_chunk(rows, target, first, start, voxels, ls_c, ls_v, ts_c, at, label, counts, w, bad, top, sum_target,
                 sum_others, gamma, partial, is_first, C: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr,
                 ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr, DENSE: tl.constexpr, OVERLAP: tl.constexpr,
                 CE: tl.constexpr, FOCAL: tl.constexpr, GENERAL: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # GENERAL: sum_target are the largest logits, sum_others the rest.
    z, c = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CLASSES, BLOCK, float("-inf"), REAL)
    ce = tl.zeros([CLASSES], REAL)
    smoothing = tl.zeros([CLASSES], REAL)
    weights = ce + tl.sum(tl.where(counts, w, 0.0), 0)
    if GENERAL:
        g = _targets(target, at, ts_c, c, label, counts, C, FIRST_LABEL, DENSE, REAL)
        beyond_one = sum_others + (sum_target - 1.0)
        tps, fps, fns, ces, smoothings = _general_counts(
            z, g, tl.where(counts, w, 0.0), top, beyond_one, 1.0 / (1.0 + beyond_one), gamma, ACTIVATION, OVERLAP, CE,
            FOCAL, REAL)  # fmt: skip
        tp, fp, fn = tl.sum(tps, 1), tl.sum(fps, 1), tl.sum(fns, 1)
        if CE > 0:
            ce = tl.sum(ces, 1)
        if CE == 2:
            smoothing = tl.sum(smoothings, 1)
        if OVERLAP == 2 and ACTIVATION == SOFTMAX and not DENSE:  # as LABEL_WEIGHTS
            weights = tl.sum(g * w[None, :], 1)
    elif ACTIVATION == SOFTMAX:
        others, at_target, is_target = _split(z, top, c, label, counts)
        inverse = tl.where(counts, w / (sum_target + sum_others), 0.0)
        tp = tl.sum(at_target * inverse[None, :], 1)
        fp = tl.sum(others * inverse[None, :], 1)
        fn = tl.sum(tl.where(is_target, (sum_others * inverse)[None, :], 0.0), 1)
        if CE > 0:
            of_label = _label_cross_entropy(z, top, is_target, sum_target, sum_others, counts, w, REAL)
            ce = tl.sum(tl.where(is_target, of_label[None, :], 0.0), 1)
    else:
        tps, fps, fns = _channel_counts(z, c, label, counts, w, FIRST_LABEL, ACTIVATION)
        tp, fp, fn = tl.sum(tps, 1), tl.sum(fps, 1), tl.sum(fns, 1)
    nan = tl.where(bad, float("nan"), 0.0)
    _add_column(partial, c, tp + nan, is_first, C)
    _add_column(partial + C, c, fp + nan, is_first, C)
    _add_column(partial + 2 * C, c, fn + nan, is_first, C)
    if CE > 0:
        _add_column(partial + 3 * C, c, ce, is_first, C)
        _add_column(partial + 4 * C, c, smoothing, is_first, C)
        _add_column(partial + 5 * C, c, weights, is_first, C)


@triton.jit(do_not_specialize=["focal_gamma"])
def many_classes_count_kernel(
    logits, target, weight, partial, voxels, ls_n, ls_c, ls_v, ts_n, ts_c, ts_v, ws_n, ws_v, sy, sx, n0, n1, n2, t0, t1,
    t2, w0, w1, w2, f0, f1, f2, ignore_index, focal_gamma: tl.int64, programs,
    C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    FIRST_LABEL: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """partial[n, program, column, C], the classes in chunks."""
    n = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows, target, weight = logits + n * ls_n, target + n * ts_n, weight + n * ws_n
    gamma = _double(focal_gamma).to(REAL)
    partial += (n * programs + program) * (6 if CE > 0 else 3) * C
    full = C // CHUNK * CHUNK
    begin = program.to(tl.int64) * BLOCK
    step = programs.to(tl.int64) * BLOCK
    for start in tl.range(begin, voxels, step):
        label, w, counts, bad, at = _voxels(
            target, weight, start, voxels, ts_c, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2,
            ignore_index, C + FIRST_LABEL, C, DENSE, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, BLOCK, REAL)  # fmt: skip
        any_bad = tl.max(bad.to(tl.int32), 0) > 0
        top = tl.full([BLOCK], float("-inf"), REAL)
        sum_target = tl.zeros([BLOCK], REAL)
        sum_others = tl.zeros([BLOCK], REAL)
        if ACTIVATION == SOFTMAX:
            for first in tl.range(0, full, CHUNK):
                z, c = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CHUNK, BLOCK, float("-inf"), REAL)
                if GENERAL:
                    top, sum_others, sum_target = _add_tops(z, top, sum_others, sum_target)
                else:
                    top, sum_target, sum_others, _, _ = _online(z, c, label, counts, top, sum_target, sum_others)
            if TAIL > 0:
                z, c = _logits(rows, full, start, voxels, ls_c, ls_v, counts, C, TAIL, BLOCK, float("-inf"), REAL)
                if GENERAL:
                    top, sum_others, sum_target = _add_tops(z, top, sum_others, sum_target)
                else:
                    top, sum_target, sum_others, _, _ = _online(z, c, label, counts, top, sum_target, sum_others)
        for first in tl.range(0, full, CHUNK):
            _count_chunk(rows, target, first, start, voxels, ls_c, ls_v, ts_c, at, label, counts, w, any_bad, top,
                         sum_target, sum_others, gamma, partial, start == begin, C, CHUNK, BLOCK, ACTIVATION,
                         FIRST_LABEL, DENSE, OVERLAP, CE, FOCAL, GENERAL, REAL)  # fmt: skip
        if TAIL > 0:
            _count_chunk(rows, target, full, start, voxels, ls_c, ls_v, ts_c, at, label, counts, w, any_bad, top,
                         sum_target, sum_others, gamma, partial, start == begin, C, TAIL, BLOCK, ACTIVATION,
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
        error = a * fp + b * fn + (smooth_dr - smooth_nr)
        numerator = tp + smooth_nr
        denominator = numerator + error
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
        common = tl.where(used, cw * slope / (denominator * denominator), 0.0)
        u_background = common * a * numerator * tversky_weight
        u_foreground = (-common * error - common * b * numerator) * tversky_weight
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
                tl.store(at + 2, per * (1.0 - smooth), mask=there)
                tl.store(at + 3, per * smooth / options, mask=there)
        if REDUCTION == 0:
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
            tl.store(at, tl.load(at, mask=there, other=0.0) * scale, mask=there)
            tl.store(at + 1, tl.load(at + 1, mask=there, other=0.0) * scale, mask=there)
            if CE:
                per = ce_weight * ce_cw * ce_scale
                tl.store(at + 2, per * (1.0 - smooth), mask=there)
                tl.store(at + 3, per * smooth / options, mask=there)


# ---- Gradient pass ---------------------------------------------------------------------------------------------------


@triton.jit
def _finite(x, REAL: tl.constexpr):
    # In the type in which is computed, and a number of it where x is one
    most = 4e307 if tl.float64 == REAL else 8e37
    return tl.where(x > most, most, tl.where(x < -most, -most, x)).to(REAL)


@triton.jit
def _coefficients(coefficients, grad_loss, c, row, C: tl.constexpr, GRAD_CLASSES: tl.constexpr,
                  KEPT: tl.constexpr, CE: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # dL/dp where g = 0 and where g = 1, dL/dCE and dL/dsmoothing, times the upstream gradient. GRAD_CLASSES: 0 for a
    # scalar loss, else C'; KEPT: a power of two that holds it.
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
    ce, smoothing = background * 0.0, background * 0.0
    if CE > 0:
        ce = tl.load(at + 2, mask=there, other=0.0) * of_row
        smoothing = tl.load(at + 3, mask=there, other=0.0) * of_row
    return (
        _finite(background, REAL)[:, None],
        _finite(foreground, REAL)[:, None],
        _finite(ce, REAL)[:, None],
        _finite(smoothing, REAL)[:, None],
    )


@triton.jit
def _store_gradient(out, dz, c, start, voxels, gs_c, gs_v, C: tl.constexpr, BLOCK: tl.constexpr):
    offsets = start + tl.arange(0, BLOCK)
    there = (c < C)[:, None] & (offsets < voxels)[None, :]
    at = out + c.to(tl.int64)[:, None] * gs_c + (offsets * gs_v)[None, :]
    tl.store(at, dz.to(out.dtype.element_ty), mask=there)


@triton.jit
def _channel_gradient(z, c, label, counts, w, background, foreground, FIRST_LABEL: tl.constexpr,
                      ACTIVATION: tl.constexpr):  # fmt: skip
    dz = tl.where(c[:, None] + FIRST_LABEL == label[None, :], foreground, background)
    if ACTIVATION == SIGMOID:
        _, _, product = _logistic(z)
        dz = product * dz
    return tl.where(counts[None, :], dz * w[None, :], 0.0)


@triton.jit
def _general_channel_gradient(z, g, counts, w, gamma, background, foreground, ce, smoothing, ACTIVATION: tl.constexpr,
                              OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
                              REAL: tl.constexpr):  # fmt: skip
    if ACTIVATION == SIGMOID:
        p, complement, product = _logistic(z)
        dz = product * _overlap_slope(p, complement, g, background, foreground, OVERLAP)
        if CE > 0:
            of_one, of_zero = g * ce + smoothing, (1.0 - g) * ce + smoothing
            if FOCAL:
                log_one, log_zero = _sigmoid_logs(z, REAL)
                of_one *= _focal_slope(p, complement, log_one, _focal_power(complement, gamma, REAL), gamma)
                of_zero *= _focal_slope(complement, p, log_zero, _focal_power(p, gamma, REAL), gamma)
            dz += p * of_zero - complement * of_one
    else:
        dz = _overlap_slope(z, 1.0 - z, g, background, foreground, OVERLAP)
    return tl.where(counts[None, :], dz * w[None, :], 0.0)


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
            minus_log_p = tl.where(z == float("-inf"), 0.0, minus_log_p)  # p is 0 there, and so is what it multiplies
            b *= _focal_slope(p, complement, minus_log_p, _focal_power(complement, gamma, REAL), gamma)
    return p, complement, u, b


@triton.jit
def _general_sums(z, top, p, u, b):
    # sum of p u of all but the largest, sum of u of the largest, sum of b
    is_top = z == top[None, :]
    return tl.sum(tl.where(is_top, 0.0, p * u), 0), tl.sum(tl.where(is_top, u, 0.0), 0), tl.sum(b, 0)


@triton.jit
def _general_gradient(p, complement, u, b, rest_u, top_u, b_all, beyond_one, inverse, counts, w, CE: tl.constexpr):
    shift = tl.where(beyond_one < 1.0, top_u, 0.0)
    excess = rest_u + (top_u - shift) * inverse - shift * (beyond_one * inverse)
    dz = p * ((u - shift[None, :]) - excess[None, :])
    if CE > 0:
        dz += p * (b_all[None, :] - b) - complement * b
    return tl.where(counts[None, :], dz * w[None, :], 0.0)


@triton.jit(do_not_specialize=["focal_gamma"])
def few_classes_gradient_kernel(
    grad_loss, logits, target, weight, coefficients, out, voxels, ls_n, ls_c, ls_v, gs_n, gs_c, gs_v, ts_n, ts_c, ts_v,
    ws_n, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2, ignore_index, focal_gamma: tl.int64, programs,
    row_stride,
    C: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr,
    GRAD_CLASSES: tl.constexpr, KEPT: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """dL/dlogits of a tile that holds all classes at once. row_stride: 0 where the batch shares one row, else 1."""
    n = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows, target, weight, out = logits + n * ls_n, target + n * ts_n, weight + n * ws_n, out + n * gs_n
    gamma = _double(focal_gamma).to(REAL)
    background, foreground, ce, smoothing = _coefficients(
        coefficients, grad_loss, tl.arange(0, CLASSES), n * row_stride, C, GRAD_CLASSES, KEPT, CE, REAL
    )
    step = programs.to(tl.int64) * BLOCK
    for start in tl.range(program.to(tl.int64) * BLOCK, voxels, step):
        label, w, counts, _, at = _voxels(
            target, weight, start, voxels, ts_c, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2,
            ignore_index, C + FIRST_LABEL, C, DENSE, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, BLOCK, REAL)  # fmt: skip
        z, c = _logits(rows, 0, start, voxels, ls_c, ls_v, counts, C, CLASSES, BLOCK, float("-inf"), REAL)
        if GENERAL:
            g = _targets(target, at, ts_c, c, label, counts, C, FIRST_LABEL, DENSE, REAL)
            if ACTIVATION == SOFTMAX:
                top, rest, tops = _add_tops(z, tl.max(z, 0), tl.zeros([BLOCK], REAL), tl.zeros([BLOCK], REAL))
                beyond_one = rest + (tops - 1.0)
                inverse = 1.0 / (1.0 + beyond_one)
                p, complement, u, b = _general_slopes(
                    z, g, top, beyond_one, inverse, gamma, background, foreground, ce, smoothing, OVERLAP, CE, FOCAL,
                    REAL)  # fmt: skip
                rest_u, top_u, b_all = _general_sums(z, top, p, u, b)
                dz = _general_gradient(p, complement, u, b, rest_u, top_u, b_all, beyond_one, inverse, counts, w, CE)
            else:
                dz = _general_channel_gradient(
                    z, g, counts, w, gamma, background, foreground, ce, smoothing, ACTIVATION, OVERLAP, CE, FOCAL, REAL
                )
        elif ACTIVATION == SOFTMAX:
            others, at_target, is_target = _split(z, tl.max(z, 0), c, label, counts)
            u_target = tl.sum(tl.where(is_target, foreground, 0.0), 0)
            k_target = u_target * 0.0
            if CE > 0:
                k_target = tl.sum(tl.where(is_target, ce, 0.0), 0)
            scale, offset, target_dz = _gradient_terms(
                tl.sum(at_target, 0), tl.sum(others, 0), tl.sum(others * background, 0), u_target, k_target, counts, w
            )
            dz = others * scale[None, :] * (background + offset[None, :])
            dz = tl.where(is_target, target_dz[None, :], dz)
        else:
            dz = _channel_gradient(z, c, label, counts, w, background, foreground, FIRST_LABEL, ACTIVATION)
        _store_gradient(out, dz, c, start, voxels, gs_c, gs_v, C, BLOCK)


@triton.jit(do_not_specialize=["focal_gamma"])
def two_classes_gradient_kernel(
    grad_loss, logits, target, weight, coefficients, out, voxels, ls_n, ls_c, ls_v, gs_n, gs_c, gs_v, ts_n, ts_c, ts_v,
    ws_n, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2, ignore_index, focal_gamma: tl.int64, programs,
    row_stride,
    BLOCK: tl.constexpr, GRAD_CLASSES: tl.constexpr, KEPT: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """dL/dlogits of two classes: dz_1 = p_0 p_1 (u_1 - u_0) = -dz_0."""
    n = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows, target, weight, out = logits + n * ls_n, target + n * ts_n, weight + n * ws_n, out + n * gs_n
    background, foreground, ce, _no_smoothing = _coefficients(
        coefficients, grad_loss, tl.arange(0, 2), n * row_stride, 2, GRAD_CLASSES, KEPT, CE, REAL
    )
    sign = tl.where(tl.arange(0, 2) == 1, 1.0, -1.0).to(REAL)[:, None]
    # u_1 - u_0 where the label is 1: foreground_1 - background_0; where it is 0: background_1 - foreground_0
    is_class_1 = sign > 0
    if_label_1 = tl.sum(tl.where(is_class_1, foreground, -background))
    if_label_0 = tl.sum(tl.where(is_class_1, background, -foreground))
    ce_1 = tl.sum(tl.where(is_class_1, ce, 0.0))
    ce_0 = tl.sum(tl.where(is_class_1, 0.0, ce))
    step = programs.to(tl.int64) * BLOCK
    for start in tl.range(program.to(tl.int64) * BLOCK, voxels, step):
        label, w, counts, _, _ = _voxels(
            target, weight, start, voxels, ts_c, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2,
            ignore_index, 2, 2, False, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, BLOCK, REAL)  # fmt: skip
        offsets = start + tl.arange(0, BLOCK)
        z0 = tl.load(rows + offsets * ls_v, mask=counts, other=0.0).to(REAL)
        z1 = tl.load(rows + ls_c + offsets * ls_v, mask=counts, other=0.0).to(REAL)
        p1, p0, product = _logistic(_two_class_logit(z0, z1))
        dz = product * tl.where(label == 1, if_label_1, if_label_0)
        if CE > 0:
            dz += tl.where(label == 1, -ce_1 * p0, ce_0 * p1)
        dz = tl.where(counts, dz * w, 0.0)
        inside = offsets < voxels
        tl.store(out + offsets * gs_v, (-dz).to(out.dtype.element_ty), mask=inside)
        tl.store(out + gs_c + offsets * gs_v, dz.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_chunk(rows, out, target, first, start, voxels, ls_c, ls_v, gs_c, gs_v, ts_c, at, label, counts, w, top,
                    scale, offset, target_dz, gamma, rest_u, top_u, b_all, beyond_one, inverse, coefficients,
                    grad_loss, row, C: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr,
                    ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr, GRAD_CLASSES: tl.constexpr,
                    KEPT: tl.constexpr, DENSE: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr,
                    FOCAL: tl.constexpr, GENERAL: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    z, c = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CLASSES, BLOCK, float("-inf"), REAL)
    background, foreground, ce, smoothing = _coefficients(
        coefficients, grad_loss, c, row, C, GRAD_CLASSES, KEPT, CE, REAL
    )
    if GENERAL:
        g = _targets(target, at, ts_c, c, label, counts, C, FIRST_LABEL, DENSE, REAL)
        if ACTIVATION == SOFTMAX:
            p, complement, u, b = _general_slopes(
                z, g, top, beyond_one, inverse, gamma, background, foreground, ce, smoothing, OVERLAP, CE, FOCAL, REAL
            )
            dz = _general_gradient(p, complement, u, b, rest_u, top_u, b_all, beyond_one, inverse, counts, w, CE)
        else:
            dz = _general_channel_gradient(
                z, g, counts, w, gamma, background, foreground, ce, smoothing, ACTIVATION, OVERLAP, CE, FOCAL, REAL
            )
    elif ACTIVATION == SOFTMAX:
        others, _, is_target = _split(z, top, c, label, counts)
        dz = others * scale[None, :] * (background + offset[None, :])
        dz = tl.where(is_target, target_dz[None, :], dz)
    else:
        dz = _channel_gradient(z, c, label, counts, w, background, foreground, FIRST_LABEL, ACTIVATION)
    _store_gradient(out, dz, c, start, voxels, gs_c, gs_v, C, BLOCK)


@triton.jit
def _online_gradient(rows, first, start, voxels, ls_c, ls_v, label, counts, top, sum_target, sum_others,
                     weighted_others, u_target, k_target, coefficients, grad_loss, row, C: tl.constexpr,
                     CLASSES: tl.constexpr, BLOCK: tl.constexpr, GRAD_CLASSES: tl.constexpr, KEPT: tl.constexpr,
                     CE: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    z, c = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CLASSES, BLOCK, float("-inf"), REAL)
    background, foreground, ce, _ = _coefficients(coefficients, grad_loss, c, row, C, GRAD_CLASSES, KEPT, CE, REAL)
    top, sum_target, sum_others, others, rescale = _online(z, c, label, counts, top, sum_target, sum_others)
    weighted_others = weighted_others * rescale + tl.sum(others * background, 0)
    is_target = (c[:, None] == label[None, :]) & counts[None, :]
    u_target += tl.sum(tl.where(is_target, foreground, 0.0), 0)
    if CE > 0:
        k_target += tl.sum(tl.where(is_target, ce, 0.0), 0)
    return top, sum_target, sum_others, weighted_others, u_target, k_target


@triton.jit
def _general_sums_of_chunk(rows, target, first, start, voxels, ls_c, ls_v, ts_c, at, label, counts, top, beyond_one,
                           inverse, gamma, rest_u, top_u, b_all, coefficients, grad_loss, row, C: tl.constexpr,
                           CLASSES: tl.constexpr, BLOCK: tl.constexpr, FIRST_LABEL: tl.constexpr,
                           GRAD_CLASSES: tl.constexpr, KEPT: tl.constexpr, DENSE: tl.constexpr, OVERLAP: tl.constexpr,
                           CE: tl.constexpr, FOCAL: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    z, c = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CLASSES, BLOCK, float("-inf"), REAL)
    background, foreground, ce, smoothing = _coefficients(
        coefficients, grad_loss, c, row, C, GRAD_CLASSES, KEPT, CE, REAL
    )
    g = _targets(target, at, ts_c, c, label, counts, C, FIRST_LABEL, DENSE, REAL)
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
    C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    FIRST_LABEL: tl.constexpr, GRAD_CLASSES: tl.constexpr, KEPT: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """dL/dlogits, the classes in chunks. A chunk is read again only before it is written: out may be logits."""
    n = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows, target, weight, out = logits + n * ls_n, target + n * ts_n, weight + n * ws_n, out + n * gs_n
    gamma = _double(focal_gamma).to(REAL)
    row = n * row_stride
    full = C // CHUNK * CHUNK
    step = programs.to(tl.int64) * BLOCK
    for start in tl.range(program.to(tl.int64) * BLOCK, voxels, step):
        label, w, counts, _, at = _voxels(
            target, weight, start, voxels, ts_c, ts_v, ws_v, sy, sx, n0, n1, n2, t0, t1, t2, w0, w1, w2, f0, f1, f2,
            ignore_index, C + FIRST_LABEL, C, DENSE, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, BLOCK, REAL)  # fmt: skip
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
            for first in tl.range(0, full, CHUNK):
                top, sum_target, sum_others, weighted_others, u_target, k_target = _online_gradient(
                    rows, first, start, voxels, ls_c, ls_v, label, counts, top, sum_target, sum_others, weighted_others,
                    u_target, k_target, coefficients, grad_loss, row, C, CHUNK, BLOCK, GRAD_CLASSES, KEPT, CE,
                    REAL)  # fmt: skip
            if TAIL > 0:
                top, sum_target, sum_others, weighted_others, u_target, k_target = _online_gradient(
                    rows, full, start, voxels, ls_c, ls_v, label, counts, top, sum_target, sum_others, weighted_others,
                    u_target, k_target, coefficients, grad_loss, row, C, TAIL, BLOCK, GRAD_CLASSES, KEPT, CE,
                    REAL)  # fmt: skip
        if ACTIVATION == SOFTMAX and GENERAL:
            # weighted_others and u_target are rest_u and top_u, sum_target the largest.
            for first in tl.range(0, full, CHUNK):
                z, _c = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CHUNK, BLOCK, float("-inf"), REAL)
                top, sum_others, sum_target = _add_tops(z, top, sum_others, sum_target)
            if TAIL > 0:
                z, _c = _logits(rows, full, start, voxels, ls_c, ls_v, counts, C, TAIL, BLOCK, float("-inf"), REAL)
                top, sum_others, sum_target = _add_tops(z, top, sum_others, sum_target)
            beyond_one = sum_others + (sum_target - 1.0)
            inverse = 1.0 / (1.0 + beyond_one)
            for first in tl.range(0, full, CHUNK):
                weighted_others, u_target, b_all = _general_sums_of_chunk(
                    rows, target, first, start, voxels, ls_c, ls_v, ts_c, at, label, counts, top, beyond_one, inverse,
                    gamma, weighted_others, u_target, b_all, coefficients, grad_loss, row, C, CHUNK, BLOCK, FIRST_LABEL,
                    GRAD_CLASSES, KEPT, DENSE, OVERLAP, CE, FOCAL, REAL)  # fmt: skip
            if TAIL > 0:
                weighted_others, u_target, b_all = _general_sums_of_chunk(
                    rows, target, full, start, voxels, ls_c, ls_v, ts_c, at, label, counts, top, beyond_one, inverse,
                    gamma, weighted_others, u_target, b_all, coefficients, grad_loss, row, C, TAIL, BLOCK, FIRST_LABEL,
                    GRAD_CLASSES, KEPT, DENSE, OVERLAP, CE, FOCAL, REAL)  # fmt: skip
        scale, offset, target_dz = _gradient_terms(
            sum_target, sum_others, weighted_others, u_target, k_target, counts, w
        )
        for first in tl.range(0, full, CHUNK):
            _gradient_chunk(rows, out, target, first, start, voxels, ls_c, ls_v, gs_c, gs_v, ts_c, at, label, counts, w,
                            top, scale, offset, target_dz, gamma, weighted_others, u_target, b_all, beyond_one, inverse,
                            coefficients, grad_loss, row, C, CHUNK, BLOCK, ACTIVATION, FIRST_LABEL, GRAD_CLASSES, KEPT,
                            DENSE, OVERLAP, CE, FOCAL, GENERAL, REAL)  # fmt: skip
        if TAIL > 0:
            _gradient_chunk(rows, out, target, full, start, voxels, ls_c, ls_v, gs_c, gs_v, ts_c, at, label, counts, w,
                            top, scale, offset, target_dz, gamma, weighted_others, u_target, b_all, beyond_one, inverse,
                            coefficients, grad_loss, row, C, TAIL, BLOCK, ACTIVATION, FIRST_LABEL, GRAD_CLASSES, KEPT,
                            DENSE, OVERLAP, CE, FOCAL, GENERAL, REAL)  # fmt: skip
