"""The passes as Triton kernels: count pass, table, gradient pass.

One program takes every P-th tile of BLOCK voxels of one sample. Up to `FEW_CLASSES` classes a tile of all classes stays
in registers and is read once. Beyond, the classes come in chunks of a power of two (and one smaller chunk for the rest,
so that 33 classes are 32 + 1 and not 64): an online softmax over the chunks, then the chunks once more out of the
cache.

The arithmetic is that of csrc/tversky_math.h, which says why; docs/mathematics.md derives it.
"""

import triton
import triton.language as tl

SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)


@triton.jit
def _labels(target, weight, start, voxels, ts_v, ws_v, ignore_index, LABELS, HAS_IGNORE: tl.constexpr,
            HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # -> label, weight, whether the voxel counts, whether label or weight are out of range
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < voxels
    label = tl.load(target + offsets * ts_v, mask=inside, other=0)
    label = label.to(tl.int64) if label.dtype == tl.int64 else label.to(tl.int32)
    known = (label >= 0) & (label < LABELS)
    ignored = label != label
    if HAS_IGNORE:
        ignored = label == ignore_index
    counts = inside & known & ~ignored
    bad = inside & ~known & ~ignored
    w = tl.full([BLOCK], 1.0, REAL)
    if HAS_WEIGHT:
        w = tl.load(weight + offsets * ws_v, mask=inside, other=0).to(REAL)
        bad = bad | (inside & ~(w >= 0))
        counts = counts & (w != 0)
    return label.to(tl.int32), w, counts, bad


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
def _split(z, top, c, label, counts):
    # exponentials of the classes that are not the target (0 where it is, or the voxel does not count), and the target's
    e = tl.exp(z - top[None, :])
    is_target = (c[:, None] == label[None, :]) & counts[None, :]
    others = tl.where(is_target | ~counts[None, :], 0.0, e)
    return others, tl.where(is_target, e, 0.0), is_target


@triton.jit
def _gradient_terms(target, others, weighted_others, u_target, counts, w):
    # -> scale, offset, gradient at the target
    inverse = tl.where(counts, 1.0 / (target + others), 0.0)
    shift = tl.where(target > others, u_target, 0.0)
    above = u_target - shift
    excess = (weighted_others + above * target - shift * others) * inverse
    scale = inverse * w
    return scale, -shift - excess, target * scale * (above - excess)


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
def _store_counts(partial, c, tp, fp, fn, bad, C: tl.constexpr):
    nan = tl.where(bad, float("nan"), 0.0)
    tl.store(partial + c, tp + nan, mask=c < C)
    tl.store(partial + C + c, fp + nan, mask=c < C)
    tl.store(partial + 2 * C + c, fn + nan, mask=c < C)


@triton.jit
def few_classes_count_kernel(
    logits, target, weight, partial, voxels, ls_n, ls_c, ls_v, ts_n, ts_v, ws_n, ws_v, ignore_index, programs,
    C: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr,
    HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """partial[n, program, (tp, fp, fn), C] of a tile that holds all classes at once."""
    n = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows, target, weight = logits + n * ls_n, target + n * ts_n, weight + n * ws_n
    tp = tl.zeros([CLASSES, BLOCK], REAL)
    fp = tl.zeros([CLASSES, BLOCK], REAL)
    fn = tl.zeros([CLASSES, BLOCK], REAL)
    any_bad = tl.zeros([BLOCK], tl.int1)
    step = programs.to(tl.int64) * BLOCK
    for start in tl.range(program.to(tl.int64) * BLOCK, voxels, step):
        label, w, counts, bad = _labels(
            target,
            weight,
            start,
            voxels,
            ts_v,
            ws_v,
            ignore_index,
            C + FIRST_LABEL,
            HAS_IGNORE,
            HAS_WEIGHT,
            BLOCK,
            REAL,
        )
        any_bad = any_bad | bad
        z, c = _logits(rows, 0, start, voxels, ls_c, ls_v, counts, C, CLASSES, BLOCK, float("-inf"), REAL)
        if ACTIVATION == SOFTMAX:
            others, at_target, is_target = _split(z, tl.max(z, 0), c, label, counts)
            sum_others, sum_target = tl.sum(others, 0), tl.sum(at_target, 0)
            inverse = tl.where(counts, w / (sum_target + sum_others), 0.0)
            fp += others * inverse[None, :]
            tp += at_target * inverse[None, :]
            fn += tl.where(is_target, (sum_others * inverse)[None, :], 0.0)
        else:
            more_tp, more_fp, more_fn = _channel_counts(z, c, label, counts, w, FIRST_LABEL, ACTIVATION)
            tp, fp, fn = tp + more_tp, fp + more_fp, fn + more_fn
    bad = tl.max(any_bad.to(tl.int32), 0) > 0
    partial += (n * programs + program) * 3 * C
    _store_counts(partial, tl.arange(0, CLASSES), tl.sum(tp, 1), tl.sum(fp, 1), tl.sum(fn, 1), bad, C)


@triton.jit
def two_classes_count_kernel(
    logits, target, weight, partial, voxels, ls_n, ls_c, ls_v, ts_n, ts_v, ws_n, ws_v, ignore_index, programs,
    BLOCK: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """partial[n, program, (tp, fp, fn), 2]: the softmax of two classes is one sigmoid."""
    n = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows, target, weight = logits + n * ls_n, target + n * ts_n, weight + n * ws_n
    right0 = tl.zeros([BLOCK], REAL)
    right1 = tl.zeros([BLOCK], REAL)
    missed0 = tl.zeros([BLOCK], REAL)
    missed1 = tl.zeros([BLOCK], REAL)
    any_bad = tl.zeros([BLOCK], tl.int1)
    step = programs.to(tl.int64) * BLOCK
    for start in tl.range(program.to(tl.int64) * BLOCK, voxels, step):
        label, w, counts, bad = _labels(
            target, weight, start, voxels, ts_v, ws_v, ignore_index, 2, HAS_IGNORE, HAS_WEIGHT, BLOCK, REAL
        )
        any_bad = any_bad | bad
        offsets = start + tl.arange(0, BLOCK)
        z0 = tl.load(rows + offsets * ls_v, mask=counts, other=0.0).to(REAL)
        z1 = tl.load(rows + ls_c + offsets * ls_v, mask=counts, other=0.0).to(REAL)
        p1, p0, _ = _logistic(_two_class_logit(z0, z1))
        is1 = counts & (label == 1)
        is0 = counts & (label == 0)
        p1, p0 = p1 * w, p0 * w
        right1 += tl.where(is1, p1, 0.0)
        missed1 += tl.where(is1, p0, 0.0)
        right0 += tl.where(is0, p0, 0.0)
        missed0 += tl.where(is0, p1, 0.0)
    nan = tl.where(tl.max(any_bad.to(tl.int32), 0) > 0, float("nan"), 0.0)
    partial += (n * programs + program) * 6
    false0, false1 = tl.sum(missed1, 0) + nan, tl.sum(missed0, 0) + nan
    tl.store(partial, tl.sum(right0, 0) + nan)
    tl.store(partial + 1, tl.sum(right1, 0) + nan)
    tl.store(partial + 2, false0)
    tl.store(partial + 3, false1)
    tl.store(partial + 4, false1)
    tl.store(partial + 5, false0)


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
def _add_counts(partial, c, tp, fp, fn, is_first, C: tl.constexpr):
    # Only this program touches its row of the partial sums.
    old = (c < C) & ~is_first
    tl.store(partial + c, tp + tl.load(partial + c, mask=old, other=0.0), mask=c < C)
    tl.store(partial + C + c, fp + tl.load(partial + C + c, mask=old, other=0.0), mask=c < C)
    tl.store(partial + 2 * C + c, fn + tl.load(partial + 2 * C + c, mask=old, other=0.0), mask=c < C)


@triton.jit
def _count_chunk(rows, first, start, voxels, ls_c, ls_v, label, counts, w, bad, top, sum_target, sum_others, partial,
                 is_first, C: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
                 FIRST_LABEL: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    z, c = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CLASSES, BLOCK, float("-inf"), REAL)
    if ACTIVATION == SOFTMAX:
        others, at_target, is_target = _split(z, top, c, label, counts)
        inverse = tl.where(counts, w / (sum_target + sum_others), 0.0)
        tp = tl.sum(at_target * inverse[None, :], 1)
        fp = tl.sum(others * inverse[None, :], 1)
        fn = tl.sum(tl.where(is_target, (sum_others * inverse)[None, :], 0.0), 1)
    else:
        tps, fps, fns = _channel_counts(z, c, label, counts, w, FIRST_LABEL, ACTIVATION)
        tp, fp, fn = tl.sum(tps, 1), tl.sum(fps, 1), tl.sum(fns, 1)
    nan = tl.where(bad, float("nan"), 0.0)
    _add_counts(partial, c, tp + nan, fp + nan, fn + nan, is_first, C)


@triton.jit
def many_classes_count_kernel(
    logits, target, weight, partial, voxels, ls_n, ls_c, ls_v, ts_n, ts_v, ws_n, ws_v, ignore_index, programs,
    C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    FIRST_LABEL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """partial[n, program, (tp, fp, fn), C], the classes in chunks."""
    n = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows, target, weight = logits + n * ls_n, target + n * ts_n, weight + n * ws_n
    partial += (n * programs + program) * 3 * C
    full = C // CHUNK * CHUNK
    begin = program.to(tl.int64) * BLOCK
    step = programs.to(tl.int64) * BLOCK
    for start in tl.range(begin, voxels, step):
        label, w, counts, bad = _labels(
            target,
            weight,
            start,
            voxels,
            ts_v,
            ws_v,
            ignore_index,
            C + FIRST_LABEL,
            HAS_IGNORE,
            HAS_WEIGHT,
            BLOCK,
            REAL,
        )
        any_bad = tl.max(bad.to(tl.int32), 0) > 0
        top = tl.full([BLOCK], float("-inf"), REAL)
        sum_target = tl.zeros([BLOCK], REAL)
        sum_others = tl.zeros([BLOCK], REAL)
        if ACTIVATION == SOFTMAX:
            for first in tl.range(0, full, CHUNK):
                z, c = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CHUNK, BLOCK, float("-inf"), REAL)
                top, sum_target, sum_others, _, _ = _online(z, c, label, counts, top, sum_target, sum_others)
            if TAIL > 0:
                z, c = _logits(rows, full, start, voxels, ls_c, ls_v, counts, C, TAIL, BLOCK, float("-inf"), REAL)
                top, sum_target, sum_others, _, _ = _online(z, c, label, counts, top, sum_target, sum_others)
        for first in tl.range(0, full, CHUNK):
            _count_chunk(rows, first, start, voxels, ls_c, ls_v, label, counts, w, any_bad, top, sum_target, sum_others,
                         partial, start == begin, C, CHUNK, BLOCK, ACTIVATION, FIRST_LABEL, REAL)  # fmt: skip
        if TAIL > 0:
            _count_chunk(rows, full, start, voxels, ls_c, ls_v, label, counts, w, any_bad, top, sum_target, sum_others,
                         partial, start == begin, C, TAIL, BLOCK, ACTIVATION, FIRST_LABEL, REAL)  # fmt: skip
        tl.debug_barrier()  # the row's stores before the next tile's loads


# ---- Table -----------------------------------------------------------------------------------------------------------


@triton.jit
def sum_partial_kernel(partial, counts, programs, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """counts[n, c, q] = sum of partial[n, :, q, c] in float64, always in the same order."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in tl.range(0, programs, ROWS):
        p = first + tl.arange(0, ROWS)
        there = (p < programs)[:, None] & (i < 3 * C)[None, :]
        total += tl.load(partial + (n * programs + p)[:, None] * 3 * C + i[None, :], mask=there, other=0.0).to(
            tl.float64
        )
    tl.store(counts + n * 3 * C + i % C * 3 + i // C, tl.sum(total, 0), mask=i < 3 * C)


@triton.jit
def _power(x, gamma):
    # x ** gamma for x > 0
    return tl.exp(tl.log(x) * gamma)


@triton.jit
def _double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["alpha", "beta", "gamma", "smooth_nr", "smooth_dr"])
def table_kernel(
    counts, class_parameters, loss, coefficients, samples, alpha: tl.int64, beta: tl.int64, gamma: tl.int64,
    smooth_nr: tl.int64, smooth_dr: tl.int64,
    C: tl.constexpr, CLASSES: tl.constexpr, FIRST_CLASS: tl.constexpr, BATCH: tl.constexpr, ABSENT: tl.constexpr,
    REDUCTION: tl.constexpr, HAS_CLASS_PARAMETERS: tl.constexpr,
):  # fmt: skip
    """Loss and coefficients[rows, C, (background, foreground)] from counts[n, c, 3]; one program.

    alpha to smooth_dr are the bits of a float64, for Triton passes every Python float as a float32.
    """
    gamma = _double(gamma)
    smooth_nr, smooth_dr = _double(smooth_nr), _double(smooth_dr)
    c = tl.arange(0, CLASSES)
    there = c < C
    kept = there & (c >= FIRST_CLASS)
    a = tl.full([CLASSES], 0.0, tl.float64) + _double(alpha)
    b = tl.full([CLASSES], 0.0, tl.float64) + _double(beta)
    cw = tl.full([CLASSES], 1.0, tl.float64)
    if HAS_CLASS_PARAMETERS:
        a = tl.load(class_parameters + c, mask=there, other=0.0)
        b = tl.load(class_parameters + C + c, mask=there, other=0.0)
        cw = tl.load(class_parameters + 2 * C + c, mask=there, other=0.0)
    total = tl.zeros([CLASSES], tl.float64)
    averaged = tl.zeros([CLASSES], tl.float64)
    rows = samples
    together = 1
    if BATCH:
        rows = 1
        together = samples
    for r in tl.range(0, rows):
        tp = tl.zeros([CLASSES], tl.float64)
        fp = tl.zeros([CLASSES], tl.float64)
        fn = tl.zeros([CLASSES], tl.float64)
        for k in tl.range(0, together):
            n = (r * together + k).to(tl.int64)
            at = counts + (n * C + c) * 3
            tp += tl.load(at, mask=there, other=0.0)
            fp += tl.load(at + 1, mask=there, other=0.0)
            fn += tl.load(at + 2, mask=there, other=0.0)
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
        u_background = common * a * numerator
        u_foreground = -common * error - common * b * numerator
        value = tl.where(used, cw * x, 0.0)
        at = coefficients + (r * C + c) * 2
        tl.store(at, u_background, mask=there)
        tl.store(at + 1, u_foreground, mask=there)
        if REDUCTION == 0:
            tl.store(loss + r * (C - FIRST_CLASS) + c - FIRST_CLASS, value.to(loss.dtype.element_ty), mask=kept)
        total += value
        counted = kept
        if ABSENT == 2:
            counted = counted & ~is_absent
        averaged += counted.to(tl.float64)
    if REDUCTION != 0:
        scale = tl.sum(averaged * 0.0, 0) + 1.0
        if REDUCTION == 2:
            number = tl.sum(averaged, 0)
            scale = tl.where(number > 0, 1.0 / tl.maximum(number, 1.0), 0.0)
        tl.store(loss, (tl.sum(total, 0) * scale).to(loss.dtype.element_ty))
        tl.debug_barrier()  # the coefficients' stores before they are scaled
        for r in tl.range(0, rows):
            at = coefficients + (r * C + c) * 2
            tl.store(at, tl.load(at, mask=there, other=0.0) * scale, mask=there)
            tl.store(at + 1, tl.load(at + 1, mask=there, other=0.0) * scale, mask=there)


# ---- Gradient pass ---------------------------------------------------------------------------------------------------


@triton.jit
def _coefficients(coefficients, grad_loss, c, row, C: tl.constexpr, GRAD_CLASSES: tl.constexpr, REAL: tl.constexpr):
    # dL/dp where g = 0 and where g = 1, times the upstream gradient. GRAD_CLASSES: 0 for a scalar loss, else C'.
    at = coefficients + (row * C + c) * 2
    there = c < C
    if GRAD_CLASSES == 0:
        upstream = tl.load(grad_loss).to(tl.float64)
    else:
        dropped = C - GRAD_CLASSES
        graded = there & (c >= dropped)
        upstream = tl.load(grad_loss + row * GRAD_CLASSES + c - dropped, mask=graded, other=0.0).to(tl.float64)
    background = tl.load(at, mask=there, other=0.0) * upstream
    foreground = tl.load(at + 1, mask=there, other=0.0) * upstream
    return background.to(REAL)[:, None], foreground.to(REAL)[:, None]


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
def few_classes_gradient_kernel(
    grad_loss, logits, target, weight, coefficients, out, voxels, ls_n, ls_c, ls_v, gs_n, gs_c, gs_v, ts_n, ts_v, ws_n,
    ws_v, ignore_index, programs, row_stride,
    C: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr,
    HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, GRAD_CLASSES: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """dL/dlogits of a tile that holds all classes at once. row_stride: 0 where the batch shares one row, else 1."""
    n = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows, target, weight, out = logits + n * ls_n, target + n * ts_n, weight + n * ws_n, out + n * gs_n
    background, foreground = _coefficients(
        coefficients, grad_loss, tl.arange(0, CLASSES), n * row_stride, C, GRAD_CLASSES, REAL
    )
    step = programs.to(tl.int64) * BLOCK
    for start in tl.range(program.to(tl.int64) * BLOCK, voxels, step):
        label, w, counts, _ = _labels(
            target,
            weight,
            start,
            voxels,
            ts_v,
            ws_v,
            ignore_index,
            C + FIRST_LABEL,
            HAS_IGNORE,
            HAS_WEIGHT,
            BLOCK,
            REAL,
        )
        z, c = _logits(rows, 0, start, voxels, ls_c, ls_v, counts, C, CLASSES, BLOCK, float("-inf"), REAL)
        if ACTIVATION == SOFTMAX:
            others, at_target, is_target = _split(z, tl.max(z, 0), c, label, counts)
            u_target = tl.sum(tl.where(is_target, foreground, 0.0), 0)
            scale, offset, target_dz = _gradient_terms(
                tl.sum(at_target, 0), tl.sum(others, 0), tl.sum(others * background, 0), u_target, counts, w
            )
            dz = others * scale[None, :] * (background + offset[None, :])
            dz = tl.where(is_target, target_dz[None, :], dz)
        else:
            dz = _channel_gradient(z, c, label, counts, w, background, foreground, FIRST_LABEL, ACTIVATION)
        _store_gradient(out, dz, c, start, voxels, gs_c, gs_v, C, BLOCK)


@triton.jit
def two_classes_gradient_kernel(
    grad_loss, logits, target, weight, coefficients, out, voxels, ls_n, ls_c, ls_v, gs_n, gs_c, gs_v, ts_n, ts_v, ws_n,
    ws_v, ignore_index, programs, row_stride,
    BLOCK: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, GRAD_CLASSES: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """dL/dlogits of two classes: dz_1 = p_0 p_1 (u_1 - u_0) = -dz_0."""
    n = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows, target, weight, out = logits + n * ls_n, target + n * ts_n, weight + n * ws_n, out + n * gs_n
    background, foreground = _coefficients(
        coefficients, grad_loss, tl.arange(0, 2), n * row_stride, 2, GRAD_CLASSES, REAL
    )
    sign = tl.where(tl.arange(0, 2) == 1, 1.0, -1.0).to(REAL)[:, None]
    # u_1 - u_0 where the label is 1: foreground_1 - background_0; where it is 0: background_1 - foreground_0
    is_class_1 = sign > 0
    if_label_1 = tl.sum(tl.where(is_class_1, foreground, -background))
    if_label_0 = tl.sum(tl.where(is_class_1, background, -foreground))
    step = programs.to(tl.int64) * BLOCK
    for start in tl.range(program.to(tl.int64) * BLOCK, voxels, step):
        label, w, counts, _ = _labels(
            target, weight, start, voxels, ts_v, ws_v, ignore_index, 2, HAS_IGNORE, HAS_WEIGHT, BLOCK, REAL
        )
        offsets = start + tl.arange(0, BLOCK)
        z0 = tl.load(rows + offsets * ls_v, mask=counts, other=0.0).to(REAL)
        z1 = tl.load(rows + ls_c + offsets * ls_v, mask=counts, other=0.0).to(REAL)
        _, _, product = _logistic(_two_class_logit(z0, z1))
        dz = product * tl.where(label == 1, if_label_1, if_label_0) * w
        dz = tl.where(counts, dz, 0.0)
        inside = offsets < voxels
        tl.store(out + offsets * gs_v, (-dz).to(out.dtype.element_ty), mask=inside)
        tl.store(out + gs_c + offsets * gs_v, dz.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_chunk(rows, out, first, start, voxels, ls_c, ls_v, gs_c, gs_v, label, counts, w, top, scale, offset,
                    target_dz, coefficients, grad_loss, row, C: tl.constexpr, CLASSES: tl.constexpr,
                    BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr,
                    GRAD_CLASSES: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    z, c = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CLASSES, BLOCK, float("-inf"), REAL)
    background, foreground = _coefficients(coefficients, grad_loss, c, row, C, GRAD_CLASSES, REAL)
    if ACTIVATION == SOFTMAX:
        others, _, is_target = _split(z, top, c, label, counts)
        dz = others * scale[None, :] * (background + offset[None, :])
        dz = tl.where(is_target, target_dz[None, :], dz)
    else:
        dz = _channel_gradient(z, c, label, counts, w, background, foreground, FIRST_LABEL, ACTIVATION)
    _store_gradient(out, dz, c, start, voxels, gs_c, gs_v, C, BLOCK)


@triton.jit
def _online_gradient(rows, first, start, voxels, ls_c, ls_v, label, counts, top, sum_target, sum_others,
                     weighted_others, u_target, coefficients, grad_loss, row, C: tl.constexpr, CLASSES: tl.constexpr,
                     BLOCK: tl.constexpr, GRAD_CLASSES: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    z, c = _logits(rows, first, start, voxels, ls_c, ls_v, counts, C, CLASSES, BLOCK, float("-inf"), REAL)
    background, foreground = _coefficients(coefficients, grad_loss, c, row, C, GRAD_CLASSES, REAL)
    top, sum_target, sum_others, others, rescale = _online(z, c, label, counts, top, sum_target, sum_others)
    weighted_others = weighted_others * rescale + tl.sum(others * background, 0)
    is_target = (c[:, None] == label[None, :]) & counts[None, :]
    u_target += tl.sum(tl.where(is_target, foreground, 0.0), 0)
    return top, sum_target, sum_others, weighted_others, u_target


@triton.jit
def many_classes_gradient_kernel(
    grad_loss, logits, target, weight, coefficients, out, voxels, ls_n, ls_c, ls_v, gs_n, gs_c, gs_v, ts_n, ts_v, ws_n,
    ws_v, ignore_index, programs, row_stride,
    C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    FIRST_LABEL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, GRAD_CLASSES: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """dL/dlogits, the classes in chunks. A chunk is read again only before it is written: out may be logits."""
    n = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows, target, weight, out = logits + n * ls_n, target + n * ts_n, weight + n * ws_n, out + n * gs_n
    row = n * row_stride
    full = C // CHUNK * CHUNK
    step = programs.to(tl.int64) * BLOCK
    for start in tl.range(program.to(tl.int64) * BLOCK, voxels, step):
        label, w, counts, _ = _labels(
            target,
            weight,
            start,
            voxels,
            ts_v,
            ws_v,
            ignore_index,
            C + FIRST_LABEL,
            HAS_IGNORE,
            HAS_WEIGHT,
            BLOCK,
            REAL,
        )
        top = tl.full([BLOCK], float("-inf"), REAL)
        sum_target = tl.zeros([BLOCK], REAL)
        sum_others = tl.zeros([BLOCK], REAL)
        weighted_others = tl.zeros([BLOCK], REAL)
        u_target = tl.zeros([BLOCK], REAL)
        if ACTIVATION == SOFTMAX:
            for first in tl.range(0, full, CHUNK):
                top, sum_target, sum_others, weighted_others, u_target = _online_gradient(
                    rows, first, start, voxels, ls_c, ls_v, label, counts, top, sum_target, sum_others, weighted_others,
                    u_target, coefficients, grad_loss, row, C, CHUNK, BLOCK, GRAD_CLASSES, REAL)  # fmt: skip
            if TAIL > 0:
                top, sum_target, sum_others, weighted_others, u_target = _online_gradient(
                    rows, full, start, voxels, ls_c, ls_v, label, counts, top, sum_target, sum_others, weighted_others,
                    u_target, coefficients, grad_loss, row, C, TAIL, BLOCK, GRAD_CLASSES, REAL)  # fmt: skip
        scale, offset, target_dz = _gradient_terms(sum_target, sum_others, weighted_others, u_target, counts, w)
        for first in tl.range(0, full, CHUNK):
            _gradient_chunk(rows, out, first, start, voxels, ls_c, ls_v, gs_c, gs_v, label, counts, w, top, scale,
                            offset, target_dz, coefficients, grad_loss, row, C, CHUNK, BLOCK, ACTIVATION, FIRST_LABEL,
                            GRAD_CLASSES, REAL)  # fmt: skip
        if TAIL > 0:
            _gradient_chunk(rows, out, full, start, voxels, ls_c, ls_v, gs_c, gs_v, label, counts, w, top, scale,
                            offset, target_dz, coefficients, grad_loss, row, C, TAIL, BLOCK, ACTIVATION, FIRST_LABEL,
                            GRAD_CLASSES, REAL)  # fmt: skip
