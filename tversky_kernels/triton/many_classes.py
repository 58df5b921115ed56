"""The family "many classes": the classes come in chunks; an online softmax over them, then the chunks once more."""

import triton
import triton.language as tl

from .mathematics import (
    CHECKED,
    SMOOTHED,
    SOFTMAX,
    SQUARED,
    _add_tops,
    _channel_counts,
    _channel_gradient,
    _divide,
    _double,
    _exp,
    _general_channel_gradient,
    _general_counts,
    _general_gradient,
    _general_slopes,
    _general_sums,
    _gradient_terms,
    _label_cross_entropy,
    _label_focal_slope,
    _of_target,
    _split,
)
from .voxels import (
    _classes,
    _coefficients,
    _dense_targets,
    _differs,
    _logits,
    _share,
    _store_gradient,
    _target_of,
    _voxels,
    _without_bad_targets,
    _without_ignored,
)


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
        if DENSE == CHECKED:
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
        if CE == SMOOTHED:
            smoothing = tl.sum(smoothings, 1)
        if OVERLAP == SQUARED and ACTIVATION == SOFTMAX and not DENSE:  # as LABEL_WEIGHTS
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
    logits, target, weight, partial, voxels, ls, ts, geometry, ignore_index, focal_gamma: tl.int64, programs,
    C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
    ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """partial[n, program, column, C], the classes in chunks."""
    ls_c, ls_v = ls.c, ls.v
    ts_c = ts.c
    CLEAR: tl.constexpr = HAS_IGNORE or HAS_WEIGHT
    WHOLE: tl.constexpr = C % CHUNK == 0
    n, program, begin, step, last = _share(programs, voxels, BLOCK)
    rows, target, weight = logits + n * ls.n, target + n * ts.n, weight + n * ts.weight_n
    gamma = _double(focal_gamma).to(REAL)
    partial += (n * programs + program) * (6 if CE > 0 else 3) * C
    for passed in tl.range(begin, voxels, step):
        start = begin + last - passed  # from the end: see enum Order in csrc/cuda/launch.h
        label, w, counts, at = _voxels(
            target, weight, start, voxels, ts, geometry,
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
    grad_loss, logits, target, weight, coefficients, out, voxels, ls, gs, ts, geometry, ignore_index,
    focal_gamma: tl.int64, programs, row_stride,
    C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
    ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr, GRAD_CLASSES: tl.constexpr, KEPT: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """dL/dlogits, the classes in chunks. A chunk is read again only before it is written: out may be logits."""
    ls_c, ls_v, gs_c, gs_v = ls.c, ls.v, gs.c, gs.v
    ts_c = ts.c
    CLEAR: tl.constexpr = HAS_IGNORE or HAS_WEIGHT
    WHOLE: tl.constexpr = C % CHUNK == 0
    n, _program, begin, step, _last = _share(programs, voxels, BLOCK)
    rows, target, weight, out = logits + n * ls.n, target + n * ts.n, weight + n * ts.weight_n, out + n * gs.n
    gamma = _double(focal_gamma).to(REAL)
    row = n * row_stride
    for start in tl.range(begin, voxels, step):
        label, w, counts, at = _voxels(
            target, weight, start, voxels, ts, geometry,
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
