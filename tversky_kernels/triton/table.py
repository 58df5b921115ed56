"""The table: counts from the partial sums of all programs, then loss and coefficients."""

import triton
import triton.language as tl

from .mathematics import _double


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
    # Bounds a coefficient, as bounded_coefficient in csrc/common/mathematics.h
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
