"""Launches the Triton kernels: shapes, strides and block sizes. The operators' Triton implementations."""

from __future__ import annotations

import contextlib
import functools
import struct
from typing import NamedTuple

import torch
import triton

from . import kernels

#: Up to this many classes a tile of all of them stays in registers.
FEW_CLASSES = 16
INTERPRETED = bool(triton.knobs.runtime.interpret)


class Plan(NamedTuple):
    """Block sizes of one pass. CHUNK and TAIL: 0 where all classes are in one tile of CLASSES."""

    classes: int
    chunk: int
    tail: int
    block: int
    num_warps: int


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def plan(classes: int, itemsize: int) -> Plan:
    """Block sizes by the number of classes and the logits' size. A function, for autotuning needs a GPU.

    Few enough elements a thread that nothing spills (tests/triton_aot.py reads what the compiler says), and rows of at
    least 64 voxels, for whole 16-byte loads.
    """
    half = 2 if itemsize == 8 else 1  # registers of float64 count twice
    if classes == 2:
        return Plan(2, 0, 0, 1024 // half, 4)
    if classes <= FEW_CLASSES:
        padded = next_power_of_two(classes)
        return Plan(padded, 0, 0, max(2048 // half // padded, 64), 4)
    chunk = 8
    tail = classes % chunk
    return Plan(0, chunk, next_power_of_two(tail) if tail else 0, 128 // half, 4)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs_per_sample(logits: torch.Tensor, voxels: int, block: int) -> int:
    """How many programs share the tiles of one sample: enough to fill the device a few times, not more than tiles."""
    tiles = max(1, -(-voxels // block))
    together = 4 if logits.device.type == "cpu" else 8 * _multiprocessors(logits.device.index)
    return min(tiles, max(1, together // max(1, logits.size(0))))


def _voxel_stride(x: torch.Tensor, first: int) -> int | None:
    stride, voxels = 1, 1
    for size, step in zip(reversed(x.shape[first:]), reversed(x.stride()[first:]), strict=True):
        if size == 1:
            continue
        if voxels == 1:
            stride = step
        elif step != stride * voxels:
            return None
        voxels *= size
    return stride


def _walkable(x: torch.Tensor, first: int) -> tuple[torch.Tensor, int]:
    # The tensor itself where its voxels lie one stride apart, else a contiguous copy; and that stride.
    stride = _voxel_stride(x, first)
    return (x, stride) if stride is not None else (x.contiguous(), 1)


def _device_of(x: torch.Tensor):
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _real(logits: torch.Tensor):
    return triton.language.float64 if logits.dtype == torch.float64 else triton.language.float32


class _Volume:
    """The arguments that the count and the gradient kernels have in common."""

    def __init__(self, logits, target, voxel_weight, activation, ignore_index):
        self.logits, self.ls_v = _walkable(logits, 2)
        self.target, self.ts_v = _walkable(target, 1)
        if target.dtype == torch.bool:
            self.target = self.target.view(torch.uint8)
        self.weight, self.ws_n, self.ws_v = self.target, 0, 0  # not read
        if voxel_weight is not None:
            self.weight, self.ws_v = _walkable(voxel_weight, 1)
            self.ws_n = self.weight.stride(0)
        if self.weight.dtype == torch.bool:
            self.weight = self.weight.view(torch.uint8)
        self.samples, self.classes = logits.shape[:2]
        self.voxels = logits[0, 0].numel() if self.samples else 0
        self.plan = plan(self.classes, logits.element_size())
        self.programs = programs_per_sample(self.logits, self.voxels, self.plan.block)
        limits = torch.iinfo(self.target.dtype)
        ignorable = ignore_index is not None and limits.min <= ignore_index <= limits.max
        self.two = self.classes == 2 and activation == 0
        self.strides = (self.target.stride(0), self.ts_v, self.ws_n, self.ws_v)
        self.tail = (ignore_index if ignorable else 0, self.programs)
        self.flags = {
            "BLOCK": self.plan.block,
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
                self.flags.update(CHUNK=self.plan.chunk, TAIL=self.plan.tail)
            else:
                self.flags.update(CLASSES=self.plan.classes)

    def kernel(self, kind: str):
        size = "two" if self.two else "many" if self.plan.chunk else "few"
        return getattr(kernels, f"{size}_classes_{kind}_kernel")[(self.samples * self.programs,)]


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def count_pass(logits, target, voxel_weight, activation, ignore_index, raise_bad_input):
    """The overlap counts (N, C, 3) in float64; NaN in a sample with a label or weight out of range."""
    v = _Volume(logits, target, voxel_weight, activation, ignore_index)
    counts = torch.zeros(v.samples, v.classes, 3, dtype=torch.float64, device=logits.device)
    if v.samples == 0 or v.voxels == 0:
        return counts
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    partial = torch.empty(v.samples, v.programs, 3, v.classes, dtype=dtype, device=logits.device)
    z = v.logits
    with _device_of(logits):
        v.kernel("count")(
            z, v.target, v.weight, partial, v.voxels, z.stride(0), z.stride(1), v.ls_v, *v.strides, *v.tail,
            **v.flags, num_warps=v.plan.num_warps,
        )  # fmt: skip
        columns = 32
        kernels.sum_partial_kernel[(v.samples, -(-3 * v.classes // columns))](
            partial, counts, v.programs, C=v.classes, ROWS=64, COLUMNS=columns, num_warps=4
        )
    return counts


def table(
    counts, class_parameters, alpha, beta, gamma, smooth_nr, smooth_dr, include_background, batch, absent, reduction,
    dtype=torch.float64,
):  # fmt: skip
    """Loss and coefficients from counts (N, C, 3)."""
    samples, classes = counts.shape[:2]
    first_class = 0 if include_background or classes == 1 else 1
    rows = 1 if batch else samples
    shape = [] if reduction != 0 else [classes - first_class] if batch else [rows, classes - first_class]
    loss = torch.empty(shape, dtype=dtype, device=counts.device)
    coefficients = torch.empty(rows, classes, 2, dtype=torch.float64, device=counts.device)
    with _device_of(counts):
        kernels.table_kernel[(1,)](
            counts, counts if class_parameters is None else class_parameters, loss, coefficients, samples,
            *(_bits(x) for x in (alpha, beta, gamma, smooth_nr, smooth_dr)),
            C=classes, CLASSES=next_power_of_two(classes), FIRST_CLASS=first_class, BATCH=batch, ABSENT=absent,
            REDUCTION=reduction, HAS_CLASS_PARAMETERS=class_parameters is not None, num_warps=4,
        )  # fmt: skip
    return loss, coefficients


def tversky_loss(logits, target, voxel_weight, activation, ignore_index, raise_bad_input, *arguments):
    """Count pass and table."""
    counts = count_pass(logits, target, voxel_weight, activation, ignore_index, raise_bad_input)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return table(counts, *arguments, dtype=dtype)


def _write_gradient(out, grad_loss, logits, target, voxel_weight, coefficients, activation, ignore_index):
    v = _Volume(logits, target, voxel_weight, activation, ignore_index)
    if v.samples == 0 or v.voxels == 0:
        return
    z = v.logits
    row_stride = 0 if coefficients.size(0) == 1 else 1
    grad_classes = 0 if grad_loss.dim() == 0 else grad_loss.size(-1)
    with _device_of(logits):
        v.kernel("gradient")(
            grad_loss.contiguous(), z, v.target, v.weight, coefficients, out, v.voxels,
            z.stride(0), z.stride(1), v.ls_v, out.stride(0), out.stride(1), _voxel_stride(out, 2),
            *v.strides, *v.tail, row_stride,
            **v.flags, GRAD_CLASSES=grad_classes, num_warps=v.plan.num_warps,
        )  # fmt: skip


def gradient_pass(grad_loss, logits, target, voxel_weight, coefficients, activation, ignore_index):
    """dL/dlogits in a fresh tensor of the logits' layout."""
    logits, _ = _walkable(logits, 2)
    out = torch.empty_like(logits)
    if _voxel_stride(out, 2) is None:
        out = out.contiguous()
    _write_gradient(out, grad_loss, logits, target, voxel_weight, coefficients, activation, ignore_index)
    return out


def gradient_pass_(logits, grad_loss, target, voxel_weight, coefficients, activation, ignore_index):
    """dL/dlogits over the logits."""
    _write_gradient(logits, grad_loss, logits, target, voxel_weight, coefficients, activation, ignore_index)
