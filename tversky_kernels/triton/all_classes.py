"""The family "all classes": a tile holds all classes of its voxels, up to 128, with any target and activation.

A program is one warp: a thread has PACK neighbouring voxels of some of the classes, and what goes over the classes of a
voxel goes by shuffles, with no barrier. The classes are in tiles of MAIN and TAIL, powers of two: 33 classes are 32 + 4
and not 64. So logits and target are read once a pass.
"""

import triton
import triton.language as tl

from .mathematics import (
    CHECKED,
    SMOOTHED,
    SOFTMAX,
    SQUARED,
    _again,
    _channel_counts,
    _channel_gradient,
    _dense_probability,
    _divide,
    _double,
    _general_channel_gradient,
    _general_counts,
    _general_gradient,
    _general_slopes,
    _general_sums,
    _gradient_terms,
    _label_cross_entropy,
    _label_focal_slope,
    _of_target,
    _slope_of_other,
    _split,
    _squared_slope_of_target,
    _sum_beyond_one,
)
from .voxels import (
    _classes,
    _coefficients,
    _dense_targets,
    _differs,
    _logits,
    _no_sums,
    _share,
    _store_counts,
    _store_gradient,
    _sum_packs,
    _target_of,
    _voxels,
    _without_bad_targets,
    _without_ignored,
)


@triton.jit
def _all_classes(rows, target, weight, start, voxels, ls_c, ls_v, ts, geometry, ignore_index, C: tl.constexpr,
                 MAIN: tl.constexpr, TAIL: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
                 ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr, DENSE: tl.constexpr, RESAMPLED: tl.constexpr,
                 HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # -> label, weight and whether a voxel counts, as _voxels; of each tile of classes the dense target and the logits;
    # the largest logit of a softmax
    CLEAR: tl.constexpr = HAS_IGNORE or HAS_WEIGHT
    label, w, counts, at = _voxels(
        target, weight, start, voxels, ts, geometry,
        ignore_index, C + FIRST_LABEL, DENSE, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, BLOCK, PACK, REAL)  # fmt: skip
    dense = ()
    for i in tl.static_range(TILES):
        g = label
        if DENSE:
            g = _dense_targets(target, at, ts.c, i * MAIN, start, voxels, C, MAIN if i == 0 else TAIL,
                               (MAIN if i == 0 else MAIN + TAIL) <= C, BLOCK)  # fmt: skip
        dense += (g,)
    if DENSE and HAS_IGNORE:
        differ = tl.zeros([BLOCK], tl.int32)
        for i in tl.static_range(TILES):
            differ += _differs(dense[i], _classes(i * MAIN, MAIN if i == 0 else TAIL), ignore_index, C)
        w, counts = _without_ignored(differ, w, counts, HAS_WEIGHT)
    if DENSE == CHECKED:
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


@triton.jit(do_not_specialize=["focal_gamma"])
def all_classes_count_kernel(
    logits, target, weight, partial, voxels, ls, ts, geometry, ignore_index, focal_gamma: tl.int64, programs,
    C: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
    PACK: tl.constexpr, ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """partial[n, program, column, C] of tiles that hold all classes at once: MAIN and, where TILES is 2, TAIL more."""
    ls_c, ls_v = ls.c, ls.v
    CLEAR: tl.constexpr = HAS_IGNORE or HAS_WEIGHT
    if INTERLEAVED:  # the classes of a voxel lie side by side, and how these are aligned follows from C
        ls_v = C
    PACKS: tl.constexpr = BLOCK // PACK
    # Of all voxels, or (CE's divisor where tp + fn is not that) of those with each label.
    LABEL_WEIGHTS: tl.constexpr = OVERLAP == SQUARED and ACTIVATION == SOFTMAX and not DENSE
    n, program, begin, step, last = _share(programs, voxels, BLOCK)
    rows, target, weight = logits + n * ls.n, target + n * ts.n, weight + n * ts.weight_n
    gamma = _double(focal_gamma).to(REAL)
    sums = ()  # of each tile: tp, fp, fn, cross-entropy, smoothing, weights by label
    for i in tl.static_range(TILES):
        for _ in tl.static_range(6):
            sums += (_no_sums(MAIN if i == 0 else TAIL, PACKS, REAL),)
    weights = tl.zeros([BLOCK], REAL)
    for at in tl.range(begin, voxels, step):
        start = begin + last - at  # from the end: see enum Order in csrc/cuda/launch.h
        label, w, counts, dense, zs, top = _all_classes(
            rows, target, weight, start, voxels, ls_c, ls_v, ts, geometry, ignore_index, C, MAIN, TAIL, TILES, BLOCK,
            PACK, ACTIVATION, FIRST_LABEL, DENSE, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, REAL)  # fmt: skip
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
                if CE == SMOOTHED:
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
            inverse = _divide(1.0 if OVERLAP == SQUARED else w, sum_others + sum_target)
            weighted = inverse
            if OVERLAP == SQUARED:
                weighted = inverse * w
            right, missed = sum_target * weighted, sum_others * weighted
            if OVERLAP == SQUARED:
                missed *= sum_others * inverse
            of_label = missed
            if CE > 0:
                of_label, log_sum = _label_cross_entropy(top - z_target, sum_target, sum_others, w, gamma, FOCAL, REAL)
            label = _again(label, sum_others)
            for i in tl.static_range(TILES):
                c = _classes(i * MAIN, MAIN if i == 0 else TAIL)
                tp = _of_target(right[None, :], c, label)
                fp = others[i] * weighted[None, :]
                if OVERLAP == SQUARED:
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
                if CE == SMOOTHED:
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
def all_classes_gradient_kernel(
    grad_loss, logits, target, weight, coefficients, out, voxels, ls, gs, ts, geometry, ignore_index,
    focal_gamma: tl.int64, programs, row_stride,
    C: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
    PACK: tl.constexpr, ACTIVATION: tl.constexpr, FIRST_LABEL: tl.constexpr, GRAD_CLASSES: tl.constexpr,
    KEPT: tl.constexpr,
    DENSE: tl.constexpr, RESAMPLED: tl.constexpr, OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr,
    GENERAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """dL/dlogits by tiles that hold all classes at once. row_stride: 0 where the batch shares one row, else 1."""
    ls_c, ls_v, gs_c, gs_v = ls.c, ls.v, gs.c, gs.v
    CLEAR: tl.constexpr = HAS_IGNORE or HAS_WEIGHT
    if INTERLEAVED:  # as in the count pass
        ls_v = C
        gs_v = C
    n, _program, begin, step, _last = _share(programs, voxels, BLOCK)
    rows, target, weight, out = logits + n * ls.n, target + n * ts.n, weight + n * ts.weight_n, out + n * gs.n
    gamma = _double(focal_gamma).to(REAL)
    coefficients_of = ()  # each tile
    for i in tl.static_range(TILES):
        coefficients_of += (
            _coefficients(coefficients, grad_loss, _classes(i * MAIN, MAIN if i == 0 else TAIL), n * row_stride, C,
                          GRAD_CLASSES, KEPT, OVERLAP, CE, REAL),
        )  # fmt: skip
    s_all = 0.0
    if CE == SMOOTHED:
        for i in tl.static_range(TILES):
            s_all += tl.sum(coefficients_of[i][3])
    for start in tl.range(begin, voxels, step):
        label, w, counts, dense, zs, top = _all_classes(
            rows, target, weight, start, voxels, ls_c, ls_v, ts, geometry, ignore_index, C, MAIN, TAIL, TILES, BLOCK,
            PACK, ACTIVATION, FIRST_LABEL, DENSE, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, REAL)  # fmt: skip
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
                if OVERLAP == SQUARED:
                    b_target += tl.sum(_of_target(background, c, label), 0)
                if CE > 0:
                    k_target += tl.sum(_of_target(ce, c, label), 0)
                if CE == SMOOTHED:
                    s_target += tl.sum(_of_target(smoothing, c, label), 0)
            inverse = _divide(1.0, sum_target + sum_others)
            if OVERLAP == SQUARED:
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
                if CE == SMOOTHED:
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
