"""The family "two classes": the softmax of two classes and a label, which is one sigmoid of the logits' difference."""

import triton
import triton.language as tl

from .mathematics import (
    SMOOTHED,
    SQUARED,
    _double,
    _focal_factor,
    _focal_slope,
    _logistic,
    _sigmoid_logs,
    _squared_slope_of_target,
)
from .voxels import _coefficients, _offsets, _share, _two_logits, _voxels


@triton.jit(do_not_specialize=["focal_gamma"])
def two_classes_count_kernel(
    logits, target, weight, partial, voxels, ls, ts, geometry, ignore_index, focal_gamma: tl.int64, programs,
    BLOCK: tl.constexpr, PACK: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """partial[n, program, column, 2]: the softmax of two classes is one sigmoid."""
    ls_c, ls_v = ls.c, ls.v
    n, program, begin, step, last = _share(programs, voxels, BLOCK)
    rows, target, weight = logits + n * ls.n, target + n * ts.n, weight + n * ts.weight_n
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
        start = begin + last - at  # from the end: see enum Order in csrc/cuda/launch.h
        label, w, counts, _ = _voxels(
            target, weight, start, voxels, ts, geometry,
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
            if CE == SMOOTHED:
                smoothing0 += of0 * w
                smoothing1 += of1 * w
            if OVERLAP == SQUARED:
                weights0 += tl.where(is1, 0.0, w)
                weights1 += tl.where(is1, w, 0.0)
            else:
                weights0 += w
        weighted1, weighted0 = p1 * w, p0 * w
        right1 += tl.where(is1, weighted1, 0.0)
        right0 += tl.where(is1, 0.0, weighted0)
        missed1 += tl.where(is1, weighted0 * p0 if OVERLAP == SQUARED else weighted0, 0.0)
        missed0 += tl.where(is1, 0.0, weighted1 * p1 if OVERLAP == SQUARED else weighted1)
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
        tl.store(partial + 11, tl.sum(weights1 if OVERLAP == SQUARED else weights0, 0))


@triton.jit(do_not_specialize=["focal_gamma"])
def two_classes_gradient_kernel(
    grad_loss, logits, target, weight, coefficients, out, voxels, ls, gs, ts, geometry, ignore_index,
    focal_gamma: tl.int64, programs, row_stride,
    BLOCK: tl.constexpr, PACK: tl.constexpr, GRAD_CLASSES: tl.constexpr, KEPT: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """dL/dlogits of two classes: dz_1 = p_0 p_1 (u_1 - u_0) = -dz_0."""
    ls_c, ls_v, gs_c, gs_v = ls.c, ls.v, gs.c, gs.v
    n, _program, begin, step, _last = _share(programs, voxels, BLOCK)
    rows, target, weight, out = logits + n * ls.n, target + n * ts.n, weight + n * ts.weight_n, out + n * gs.n
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
            target, weight, start, voxels, ts, geometry,
            ignore_index, 2, False, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, BLOCK, PACK, REAL)  # fmt: skip
        difference = _two_logits(rows, start, voxels, ls_c, ls_v, counts, HAS_IGNORE or HAS_WEIGHT, BLOCK, PACK, REAL)
        p1, p0, product = _logistic(difference)
        slope = tl.where(label == 1, if_label_1, if_label_0)
        if OVERLAP == SQUARED:
            slope = tl.where(
                label == 1,
                _squared_slope_of_target(p0, backgrounds, foreground_1),
                -_squared_slope_of_target(p1, backgrounds, foreground_0),
            )
        dz = product * slope
        if CE == SMOOTHED:  # p_1 b_0 - p_0 b_1
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
