"""Launches the Triton kernels: shapes, strides and block sizes. The operators' Triton implementations."""

from __future__ import annotations

import contextlib
import functools
import struct
from typing import NamedTuple

import torch
import triton

from .._layout import voxel_stride, walkable
from . import kernels

#: Up to this many classes a tile holds all of them.
ALL_CLASSES = 128
INTERPRETED = bool(triton.knobs.runtime.interpret)


class Plan(NamedTuple):
    """Block sizes of one pass. CHUNK: 0 where a tile holds all classes, as MAIN and TAIL (0: none) of them."""

    main: int
    tail: int
    chunk: int
    block: int
    pack: int
    num_warps: int
    programs: int  # that a multiprocessor holds at once


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def plan(
    classes: int,
    itemsize: int,
    heavy: bool = False,
    packed: bool = True,
    cross_entropy: bool = False,
    more_sums: bool = False,
) -> Plan:
    """Block sizes by the number of classes and the logits' size. A function, for autotuning needs a GPU.

    heavy: what takes about twice the registers, as a target of its own for every class. packed: the voxels lie one
    beside the other. more_sums: the cross-entropy has another sum for each class, as for label smoothing or squares.

    Few enough elements a thread that nothing spills (tests/triton_aot.py reads what the compiler says), and pieces of
    a class that are as long as that allows, of 32 bytes at least. Measured on an H100.
    """
    pack = (2 if itemsize == 8 else 4) if packed else 1
    if classes == 2 and not heavy:
        half = (2 if itemsize == 8 else 1) * (2 if cross_entropy else 1)
        return Plan(2, 0, 0, 1024 // half, 16 // itemsize, 4, 4 if itemsize == 8 else 6)
    elements = (8 if itemsize == 8 else 32) // (2 if heavy or not packed else 1)
    if classes > ALL_CLASSES:
        chunk = 32
        return Plan(0, 0, chunk, 32 * elements // chunk, pack, 1, 8)
    main, tail = next_power_of_two(classes), 0
    if classes > 4 and classes <= main // 4 * 3 and not (heavy and itemsize == 8):
        main //= 2
        tail = max(4, next_power_of_two(classes - main))
    least = (2 if itemsize == 8 else 8) if heavy else 32 // itemsize
    if cross_entropy and more_sums:
        least = min(least, 8)
    block = max(32 * elements // (main if tail <= main // 4 else 2 * main), least)
    if main + tail > 40 and itemsize < 8 and packed and not heavy and not (cross_entropy and more_sums):
        # Twice the elements a thread, and whole lines of each class: in smaller pieces memory comes at half its speed.
        block, num_warps = (32, 1 if main + tail <= 64 else 2) if itemsize == 4 or main + tail > 64 else (64, 2)
        return Plan(main, tail, 0, block, pack, num_warps, 8 // num_warps)
    many_registers = heavy or block * (main + tail) > 32 * 36 or (cross_entropy and (more_sums or tail > 0))
    return Plan(main, tail, 0, block, pack, 1, 8 if many_registers else 12)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


#: A program's sums are float32, and where all voxels are alike each addition rounds the same way: no more than these.
MOST_TURNS = 128


def programs_per_sample(logits: torch.Tensor, voxels: int, plan: Plan) -> int:
    """How many programs share the tiles of one sample: what the device holds at once, or a few times that."""
    tiles = max(1, -(-voxels // plan.block))
    together = 4 if logits.device.type == "cpu" else plan.programs * _multiprocessors(logits.device.index)
    at_once = min(tiles, max(1, together // max(1, logits.size(0))))
    return min(tiles, at_once * -(-tiles // (at_once * MOST_TURNS)))


def _walkable(x: torch.Tensor, first: int) -> tuple[torch.Tensor, int | None]:
    x = walkable(x, first)
    return x, voxel_stride(x, first)


def _device_of(x: torch.Tensor):
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _real(logits: torch.Tensor):
    return triton.language.float64 if logits.dtype == torch.float64 else triton.language.float32


class _Volume:
    """The arguments that the count and the gradient kernels have in common."""

    def __init__(
        self, logits, target, voxel_weight, activation, ignore_index, overlap, cross_entropy, focal_gamma,
        nearest_exact, check=0,
    ):  # fmt: skip
        self.logits, self.ls_v = _walkable(logits, 2)
        self.samples, self.classes = logits.shape[:2]
        self.voxels = logits[0, 0].numel() if self.samples else 0
        dense = target.dim() == logits.dim()
        first = 2 if dense else 1
        resampled = target.shape[first:] != logits.shape[2:]
        # A volume that is resampled is walked by all its strides.
        self.target, ts_v = (target, 1) if resampled else _walkable(target, first)
        self.weight, ws_n, ws_v = self.target, 1, 1  # not read
        if voxel_weight is not None:
            self.weight, ws_v = (voxel_weight, 1) if resampled else _walkable(voxel_weight, 1)
            ws_n = self.weight.stride(0)
        geometry = (1,) * 11 + (1.0,) * 3
        if resampled:
            geometry = _resampling(logits.shape[2:], target.shape[first:], self.target.stride()[first:],
                                   self.weight.stride()[-len(target.shape[first:]):])  # fmt: skip
        self.target, self.weight = (
            x.view(torch.uint8) if x.dtype == torch.bool else x for x in (self.target, self.weight)
        )
        self.cross_entropy = cross_entropy
        self.columns = 6 if cross_entropy else 3
        if overlap == 1 and not dense:
            overlap = 0  # for class indices these forms are the same
        focal = 0 if cross_entropy == 0 or focal_gamma == 0 else 2 if focal_gamma == 2 else 1
        chunked = self.classes > ALL_CLASSES
        general = (
            dense
            or (overlap == 2 and (activation != 0 or chunked))
            or (cross_entropy > 0 and activation != 0)
            or (cross_entropy == 2 and (focal > 0 or overlap == 2 or chunked))
        )
        self.plan = plan(
            self.classes,
            logits.element_size(),
            general or resampled,
            self.ls_v == 1,
            cross_entropy > 0,
            overlap == 2 or cross_entropy == 2,
        )
        if (
            INTERPRETED and self.plan.num_warps == 1
        ):  # an operation takes as long there for a small block as for a large one
            self.plan = self.plan._replace(block=self.plan.block * 8)
        self.programs = programs_per_sample(self.logits, self.voxels, self.plan)
        ignorable = ignore_index is not None
        if ignorable and not target.dtype.is_floating_point:
            limits = torch.iinfo(self.target.dtype)
            ignorable = limits.min <= ignore_index <= limits.max
        self.two = self.classes == 2 and activation == 0 and not general
        target_strides = (self.target.stride(0), self.target.stride(1) if dense else 1, ts_v)
        self.strides = (*target_strides, ws_n, ws_v, *geometry)
        self.tail = (ignore_index if ignorable else 0, _bits(focal_gamma), self.programs)
        self.flags = {
            "BLOCK": self.plan.block,
            "PACK": self.plan.pack,
            "DENSE": 0 if not dense else 2 if check else 1,
            "RESAMPLED": 0 if not resampled else 2 if nearest_exact else 1,
            "OVERLAP": overlap,
            "CE": cross_entropy,
            "FOCAL": focal,
            "GENERAL": general,
            "HAS_IGNORE": ignorable,
            "HAS_WEIGHT": voxel_weight is not None,
            "REAL": _real(logits),
        }
        if not self.two:
            self.flags.update(
                C=self.classes,
                ACTIVATION=activation,
                FIRST_LABEL=int(self.classes == 1 and activation != 0),
            )
            if self.plan.chunk:
                self.flags.update(CHUNK=self.plan.chunk)
            else:
                self.flags.update(MAIN=self.plan.main, TAIL=self.plan.tail, TILES=2 if self.plan.tail else 1)

    def interleaved(self, *tensors) -> dict:
        """For kernels whose tiles hold all classes: whether those of a voxel lie side by side in all of these."""
        if self.two or self.plan.chunk:
            return {}
        strides = {(x.stride(1), voxel_stride(x, 2)) for x in tensors}
        return {"INTERLEAVED": strides == {(1, self.classes)}}

    def kernel(self, kind: str):
        size = "two" if self.two else "many" if self.plan.chunk else "all"
        return getattr(kernels, f"{size}_classes_{kind}_kernel")[(self.samples * self.programs,)]


def _resampling(sizes, source_sizes, target_strides, weight_strides):
    # Three dimensions, the last one innermost; those that there are not have size 1. See csrc/views.h.
    missing = 3 - len(sizes)
    sizes, source_sizes = (1,) * missing + tuple(sizes), (1,) * missing + tuple(source_sizes)
    strides = ((0,) * missing + tuple(s) for s in (target_strides, weight_strides))
    scales = (torch.tensor(source_sizes, dtype=torch.float32) / torch.tensor(sizes, dtype=torch.float32)).tolist()
    return (*sizes[1:], *source_sizes, *(x for s in strides for x in s), *scales)


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def count_pass(logits, target, voxel_weight, *arguments):
    """The counts (N, C, 3 or 6) in float64; NaN in a sample with a label or weight out of range."""
    v = _Volume(logits, target, voxel_weight, *arguments)
    counts = torch.zeros(v.samples, v.classes, v.columns, dtype=torch.float64, device=logits.device)
    if v.samples == 0 or v.voxels == 0:
        return counts
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    partial = torch.empty(v.samples, v.programs, v.columns, v.classes, dtype=dtype, device=logits.device)
    z = v.logits
    with _device_of(logits):
        v.kernel("count")(
            z, v.target, v.weight, partial, v.voxels, z.stride(0), z.stride(1), v.ls_v, *v.strides, *v.tail,
            **v.flags, **v.interleaved(z), num_warps=v.plan.num_warps,
        )  # fmt: skip
        together = 8  # 32 bytes of a row
        kernels.sum_partial_kernel[(v.samples, -(-v.columns * v.classes // together))](
            partial, counts, v.programs, C=v.classes, COLUMNS=v.columns, ROWS=512, TOGETHER=together, num_warps=4
        )
    return counts


def table(
    counts, class_parameters, alpha, beta, gamma, smooth_nr, smooth_dr, include_background, batch, absent, reduction,
    tversky_weight, ce_weight, label_smoothing, ce_mean, dtype=torch.float64,
):  # fmt: skip
    """Loss and coefficients from counts (N, C, 3 or 6)."""
    samples, classes, columns = counts.shape
    first_class = 0 if include_background or classes == 1 else 1
    rows = 1 if batch else samples
    shape = [] if reduction != 0 else [classes - first_class] if batch else [rows, classes - first_class]
    loss = torch.empty(shape, dtype=dtype, device=counts.device)
    coefficients = torch.empty(rows, classes, 4 if columns == 6 else 2, dtype=torch.float64, device=counts.device)
    numbers = (alpha, beta, gamma, smooth_nr, smooth_dr, tversky_weight, ce_weight, label_smoothing)
    with _device_of(counts):
        kernels.table_kernel[(1,)](
            counts, counts if class_parameters is None else class_parameters, loss, coefficients, samples,
            *(_bits(x) for x in numbers),
            C=classes, CLASSES=next_power_of_two(classes), FIRST_CLASS=first_class, BATCH=batch, ABSENT=absent,
            REDUCTION=reduction, HAS_CLASS_PARAMETERS=class_parameters is not None, CE=columns == 6, CE_MEAN=ce_mean,
            num_warps=4,
        )  # fmt: skip
    return loss, coefficients


def tversky_loss(
    logits, target, voxel_weight, activation, ignore_index, overlap, cross_entropy, focal_gamma, nearest_exact, check,
    *arguments,
):  # fmt: skip
    """Count pass and table."""
    counts = count_pass(
        logits, target, voxel_weight, activation, ignore_index, overlap, cross_entropy, focal_gamma, nearest_exact,
        check,
    )  # fmt: skip
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return table(counts, *arguments, dtype=dtype)


def _write_gradient(out, grad_loss, coefficients, logits, target, voxel_weight, *arguments):
    v = _Volume(logits, target, voxel_weight, *arguments)
    if v.samples == 0 or v.voxels == 0:
        return
    z = v.logits
    row_stride = 0 if coefficients.size(0) == 1 else 1
    grad_classes = 0 if grad_loss.dim() == 0 else grad_loss.size(-1)
    with _device_of(logits):
        v.kernel("gradient")(
            grad_loss.contiguous(), z, v.target, v.weight, coefficients.contiguous(), out, v.voxels,
            z.stride(0), z.stride(1), v.ls_v, out.stride(0), out.stride(1), voxel_stride(out, 2),
            *v.strides, *v.tail, row_stride,
            **v.flags, **v.interleaved(z, out), GRAD_CLASSES=grad_classes, KEPT=next_power_of_two(max(grad_classes, 1)),
            num_warps=v.plan.num_warps,
        )  # fmt: skip


def gradient_pass(grad_loss, coefficients, logits, target, voxel_weight, *arguments):
    """dL/dlogits in a fresh tensor of the logits' layout."""
    logits, _ = _walkable(logits, 2)
    out = torch.empty_like(logits)
    if voxel_stride(out, 2) is None:
        out = out.contiguous()
    _write_gradient(out, grad_loss, coefficients, logits, target, voxel_weight, *arguments)
    return out


def gradient_pass_(logits, grad_loss, coefficients, target, voxel_weight, *arguments):
    """dL/dlogits over the logits."""
    _write_gradient(logits, grad_loss, coefficients, logits, target, voxel_weight, *arguments)
