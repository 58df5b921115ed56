"""The family "regions": voxels are counted in the rows of their regions, with any target and activation.

A tile holds all classes of its voxels. The count pass goes through the regions of a tile, mostly one or two, and adds
the sums of each to a table that belongs to the program alone, so that no two programs add to one number. The gradient
pass reads each voxel's coefficients by its region.
"""

import triton
import triton.language as tl

from .all_classes import _all_classes
from .mathematics import (
    SMOOTHED,
    SOFTMAX,
    SQUARED,
    _double,
    _general_channel_gradient,
    _general_counts,
    _general_gradient,
    _general_slopes,
    _general_sums,
    _sum_beyond_one,
)
from .voxels import _classes, _offsets, _share, _source, _store_gradient, _target_of

#: Larger than any region.
NONE = tl.constexpr(2**31 - 1)


@triton.jit
def _regions(ids, rs, start, voxels, geometry, num_regions, C: tl.constexpr, CLASSES: tl.constexpr,
             BY_CLASS: tl.constexpr, RESAMPLED: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr):  # fmt: skip
    # -> (CLASSES or 1, BLOCK) the regions, NONE for voxels in none; whether one of a voxel's is out of range
    offsets = _offsets(start, BLOCK, PACK)
    at = _source(offsets, rs.v, geometry, rs.s0, rs.s1, rs.s2, RESAMPLED)
    there = (offsets < voxels)[None, :]
    if BY_CLASS:
        c = _classes(0, CLASSES)
        there = there & (c < C)[:, None]
        found = tl.load(ids + c.to(tl.int64)[:, None] * rs.c + at[None, :], mask=there, other=0).to(tl.int64)
    else:
        found = tl.load(ids + at[None, :], mask=there, other=0).to(tl.int64)
    beyond = there & (found >= num_regions)
    region = tl.where(there & (found >= 0), tl.where(beyond, 0, found), NONE).to(tl.int32)
    return region, tl.max(beyond.to(tl.int32), 0) > 0


@triton.jit
def _read(rows, target, weight, ids, start, voxels, ls, ts, rs, geometry, ignore_index, num_regions, C: tl.constexpr,
          CLASSES: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr, ACTIVATION: tl.constexpr,
          FIRST_LABEL: tl.constexpr, BY_CLASS: tl.constexpr, DENSE: tl.constexpr, RESAMPLED: tl.constexpr,
          HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # -> regions, weights, targets, logits and their largest; what is in no region has logits and weight 0
    label, w, counts, dense, zs, top = _all_classes(
        rows, target, weight, start, voxels, ls.c, ls.v, ts, geometry, ignore_index, C, CLASSES, 0, 1, BLOCK, PACK,
        ACTIVATION, FIRST_LABEL, DENSE, RESAMPLED, HAS_IGNORE, HAS_WEIGHT, REAL)  # fmt: skip
    region, beyond = _regions(ids, rs, start, voxels, geometry, num_regions, C, CLASSES, BY_CLASS, RESAMPLED, BLOCK,
                              PACK)  # fmt: skip
    in_any = tl.min(region, 0) < NONE
    counts = counts & in_any
    w = tl.where(beyond, float("nan"), tl.where(in_any, w, 0.0))
    g = _target_of(dense[0], _classes(0, CLASSES), label, counts, FIRST_LABEL, DENSE, True, REAL)
    z = tl.where(in_any[None, :], zs[0], tl.where((_classes(0, CLASSES) < C)[:, None], 0.0, float("-inf")))
    top = tl.full([BLOCK], float("-inf"), REAL)
    if ACTIVATION == SOFTMAX:
        top = tl.max(z, 0)
    return region, w, g, z, top


@triton.jit
def _add_row(row, c, terms, here, C: tl.constexpr):
    # Adds the sums over the voxels of a region. A barrier between two regions' is not needed: each thread adds to what
    # it has stored itself.
    there = c < C
    sums = tl.sum(tl.where(here, terms, 0.0), 1).to(tl.float64)
    tl.store(row + c, tl.load(row + c, mask=there, other=0.0) + sums, mask=there)


@triton.jit(do_not_specialize=["focal_gamma", "num_regions"])
def region_count_kernel(
    logits, target, weight, ids, partial, voxels, ls, ts, rs, geometry, ignore_index, focal_gamma: tl.int64, programs,
    num_regions: tl.int64,
    C: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr, ACTIVATION: tl.constexpr,
    FIRST_LABEL: tl.constexpr, BY_CLASS: tl.constexpr, DENSE: tl.constexpr, RESAMPLED: tl.constexpr,
    OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """partial[n, program, region, column, C] in float64, zeros before; the last column: how many voxels count."""
    COLUMNS: tl.constexpr = 7 if CE > 0 else 4
    LABEL_WEIGHTS: tl.constexpr = OVERLAP == SQUARED and ACTIVATION == SOFTMAX and not DENSE
    n, program, begin, step, _last = _share(programs, voxels, BLOCK)
    rows, target, weight, ids = logits + n * ls.n, target + n * ts.n, weight + n * ts.weight_n, ids + n * rs.n
    gamma = _double(focal_gamma).to(REAL)
    c = _classes(0, CLASSES)
    table = partial + (n * programs + program) * num_regions * COLUMNS * C
    for start in tl.range(begin, voxels, step):
        region, w, g, z, top = _read(
            rows, target, weight, ids, start, voxels, ls, ts, rs, geometry, ignore_index, num_regions, C, CLASSES,
            BLOCK, PACK, ACTIVATION, FIRST_LABEL, BY_CLASS, DENSE, RESAMPLED, HAS_IGNORE, HAS_WEIGHT,
            REAL)  # fmt: skip
        beyond_one = tl.zeros([BLOCK], REAL)
        inverse = tl.zeros([BLOCK], REAL)
        if ACTIVATION == SOFTMAX:
            beyond_one, inverse = _sum_beyond_one((z,), top, 1, BLOCK, REAL)
        tp, fp, fn, ce, smoothing = _general_counts(
            z, g, w, top, beyond_one, inverse, gamma, ACTIVATION, OVERLAP, CE, FOCAL, not DENSE, REAL
        )
        nan = (tp + fp + fn) * 0.0
        members = tl.where(w == 0, 0.0, 1.0)[None, :] + tl.zeros([CLASSES, BLOCK], REAL)
        weights = w[None, :] + tl.zeros([CLASSES, BLOCK], REAL)
        if LABEL_WEIGHTS:
            weights = g * w[None, :]
        pending = region
        next_region = tl.min(tl.min(pending, 0), 0)
        while next_region < NONE:
            here = region == next_region
            row = table + next_region.to(tl.int64) * COLUMNS * C
            _add_row(row, c, tp + nan, here, C)
            _add_row(row + C, c, fp + nan, here, C)
            _add_row(row + 2 * C, c, fn + nan, here, C)
            if CE > 0:
                _add_row(row + 3 * C, c, ce, here, C)
                if CE == SMOOTHED:
                    _add_row(row + 4 * C, c, smoothing, here, C)
                _add_row(row + 5 * C, c, weights, here, C)
            _add_row(row + (COLUMNS - 1) * C, c, members, here, C)
            pending = tl.where(here, NONE, pending)
            next_region = tl.min(tl.min(pending, 0), 0)
        tl.debug_barrier()  # the rows' stores before the next tile's loads


@triton.jit
def _coefficient(table, region, c, column, C: tl.constexpr, COLUMNS: tl.constexpr):
    # (CLASSES, BLOCK) of each voxel's region; 0 where it is in none
    there = (c < C)[:, None] & (region < NONE)
    at = table + (tl.where(region < NONE, region, 0).to(tl.int64) * C + c[:, None]) * COLUMNS + column
    return tl.load(at, mask=there, other=0.0)


@triton.jit(do_not_specialize=["focal_gamma", "num_regions"])
def region_gradient_kernel(
    logits, target, weight, ids, coefficients, out, voxels, ls, gs, ts, rs, geometry, ignore_index,
    focal_gamma: tl.int64, programs, num_regions: tl.int64,
    C: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr, ACTIVATION: tl.constexpr,
    FIRST_LABEL: tl.constexpr, BY_CLASS: tl.constexpr, DENSE: tl.constexpr, RESAMPLED: tl.constexpr,
    OVERLAP: tl.constexpr, CE: tl.constexpr, FOCAL: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """dL/dlogits; coefficients[n, region, C, 2 or 4] in the type of the computation, with the upstream gradient."""
    COLUMNS: tl.constexpr = 4 if CE > 0 else 2
    n, _program, begin, step, _last = _share(programs, voxels, BLOCK)
    rows, target, weight, ids = logits + n * ls.n, target + n * ts.n, weight + n * ts.weight_n, ids + n * rs.n
    out += n * gs.n
    gamma = _double(focal_gamma).to(REAL)
    c = _classes(0, CLASSES)
    table = coefficients + n * num_regions * C * COLUMNS
    for start in tl.range(begin, voxels, step):
        region, w, g, z, top = _read(
            rows, target, weight, ids, start, voxels, ls, ts, rs, geometry, ignore_index, num_regions, C, CLASSES,
            BLOCK, PACK, ACTIVATION, FIRST_LABEL, BY_CLASS, DENSE, RESAMPLED, HAS_IGNORE, HAS_WEIGHT,
            REAL)  # fmt: skip
        background = _coefficient(table, region, c, 0, C, COLUMNS)
        foreground = _coefficient(table, region, c, 1, C, COLUMNS)
        ce, smoothing = background * 0.0, background * 0.0
        if CE > 0:
            ce = _coefficient(table, region, c, 2, C, COLUMNS)
        if CE == SMOOTHED:
            smoothing = _coefficient(table, region, c, 3, C, COLUMNS)
        if ACTIVATION == SOFTMAX:
            beyond_one, inverse = _sum_beyond_one((z,), top, 1, BLOCK, REAL)
            p, complement, u, b = _general_slopes(
                z, g, top, beyond_one, inverse, gamma, background, foreground, ce, smoothing, OVERLAP, CE, FOCAL, REAL
            )
            rest_u, top_u, b_all = _general_sums(z, top, p, u, b)
            dz = _general_gradient(p, complement, u, b, rest_u, top_u, b_all, beyond_one, inverse, w, CE)
        else:
            dz = _general_channel_gradient(z, g, w, gamma, background, foreground, ce, smoothing, ACTIVATION, OVERLAP,
                                           CE, FOCAL, not DENSE, REAL)  # fmt: skip
        _store_gradient(out, dz, 0, start, voxels, gs.c, gs.v, C, CLASSES, C == CLASSES, BLOCK, PACK)
