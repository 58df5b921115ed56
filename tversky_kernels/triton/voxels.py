"""What a program reads and writes: its share of a volume, labels, weights, targets and logits; sums and gradients."""

import triton
import triton.language as tl

from .mathematics import CENTRES, SQUARED


@triton.jit
def _offsets(start, BLOCK: tl.constexpr, PACK: tl.constexpr):
    # PACK neighbouring ones in a thread for every type, so that values need not move between threads. The compiler is
    # told nothing about where rows begin: else it would take unaligned rows for aligned.
    return start + tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), PACK), PACK)


@triton.jit
def _place(x, scale, RESAMPLED: tl.constexpr):
    # Rounded as torch rounds: once after the product and the first shift.
    return ((x + 0.5).to(tl.float64) * scale - 0.5).to(tl.float32) + 0.5 if RESAMPLED == CENTRES else x * scale


@triton.jit
def _source(offsets, stride, g, s0, s1, s2, RESAMPLED: tl.constexpr):
    # Where the voxels are found: one stride apart, or where torch's interpolate takes them from, with the mode
    # "nearest" (1) or "nearest-exact" (CENTRES). g: launch.Geometry; s0, s1, s2: strides of the volume that is read.
    if RESAMPLED:
        row = offsets // g.sx
        z, y, x = row // g.sy, row % g.sy, offsets % g.sx
        z = tl.minimum(_place(z.to(tl.float32), g.f0, RESAMPLED).to(tl.int64), g.n0 - 1)
        y = tl.minimum(_place(y.to(tl.float32), g.f1, RESAMPLED).to(tl.int64), g.n1 - 1)
        x = tl.minimum(_place(x.to(tl.float32), g.f2, RESAMPLED).to(tl.int64), g.n2 - 1)
        at = z * s0 + y * s1 + x * s2
    else:
        at = offsets * stride
    return at


@triton.jit
def _voxels(target, weight, start, voxels, ts, geometry,
            ignore_index, LABELS, DENSE: tl.constexpr, RESAMPLED: tl.constexpr, HAS_IGNORE: tl.constexpr,
            HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    # -> label (0 of a dense target); weight: 0 where the voxel does not count, NaN where label or weight are out of
    # range; whether it counts; the voxels' offsets in the target
    offsets = _offsets(start, BLOCK, PACK)
    inside = offsets < voxels
    at = _source(offsets, ts.v, geometry, geometry.t0, geometry.t1, geometry.t2, RESAMPLED)
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
        w_at = _source(offsets, ts.weight_v, geometry, geometry.w0, geometry.w1, geometry.w2, RESAMPLED)
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
    if OVERLAP == SQUARED:
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
