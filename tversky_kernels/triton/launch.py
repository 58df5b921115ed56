"""Launches the Triton kernels: shapes, strides and block sizes. The operators' Triton implementations."""

from __future__ import annotations

import contextlib
import struct
from typing import NamedTuple

import torch
import triton

from .._layout import voxel_stride, walkable
from .._options import ACTIVATIONS, OVERLAPS, REDUCTIONS, PassOptions, TableOptions
from . import all_classes, many_classes, two_classes
from . import regions as by_regions
from . import table as tables
from .plan import (
    REGION_ELEMENTS,
    SMOOTHED,
    family_of,
    is_general,
    next_power_of_two,
    plan,
    programs_per_sample,
    region_programs,
)

INTERPRETED = bool(triton.knobs.runtime.interpret)
#: By name; the only place from which kernels are launched.
KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        two_classes.two_classes_count_kernel,
        two_classes.two_classes_gradient_kernel,
        all_classes.all_classes_count_kernel,
        all_classes.all_classes_gradient_kernel,
        many_classes.many_classes_count_kernel,
        many_classes.many_classes_gradient_kernel,
        by_regions.region_count_kernel,
        by_regions.region_gradient_kernel,
        tables.sum_partial_kernel,
        tables.table_kernel,
    )
}


class Strides(NamedTuple):
    """In elements: of samples, classes and voxels."""

    n: int
    c: int
    v: int | None


class TargetStrides(NamedTuple):
    """The same of the target and of the voxel_weight."""

    n: int
    c: int
    v: int | None
    weight_n: int
    weight_v: int | None


class Geometry(NamedTuple):
    """Of a target and weight of another size: the two inner sizes of the logits' volume, the sizes of the one that is
    read, its strides in the target (t) and in the weight (w), and their sizes over the logits' (f)."""

    sy: int = 1
    sx: int = 1
    n0: int = 1
    n1: int = 1
    n2: int = 1
    t0: int = 1
    t1: int = 1
    t2: int = 1
    w0: int = 1
    w1: int = 1
    w2: int = 1
    f0: float = 1.0
    f1: float = 1.0
    f2: float = 1.0


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
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        voxel_weight: torch.Tensor | None,
        options: PassOptions,
        check: int = 0,
    ):
        self.logits, self.ls_v = _walkable(logits, 2)
        self.samples, self.classes = logits.shape[:2]
        self.voxels = logits[0, 0].numel() if self.samples else 0
        dense = target.dim() == logits.dim()
        first = 2 if dense else 1
        resampled = target.shape[first:] != logits.shape[2:]
        # A volume that is resampled is walked by all its strides.
        self.target, ts_v = (target, 1) if resampled else _walkable(target, first)
        ws_v: int | None
        self.weight, ws_n, ws_v = self.target, 1, 1  # not read
        if voxel_weight is not None:
            self.weight, ws_v = (voxel_weight, 1) if resampled else _walkable(voxel_weight, 1)
            ws_n = self.weight.stride(0)
        geometry = Geometry()
        if resampled:
            geometry = _resampling(logits.shape[2:], target.shape[first:], self.target.stride()[first:],
                                   self.weight.stride()[-len(target.shape[first:]):])  # fmt: skip
        self.target, self.weight = (
            x.view(torch.uint8) if x.dtype == torch.bool else x for x in (self.target, self.weight)
        )
        if options.overlap == OVERLAPS["absolute"] and not dense:
            options = options._replace(overlap=OVERLAPS["product"])  # for class indices these forms are the same
        if options.cross_entropy == 0:
            options = options._replace(focal_gamma=0.0)  # not read
        cross_entropy, squared = options.cross_entropy, options.overlap == OVERLAPS["squared"]
        softmax = options.activation == ACTIVATIONS["softmax"]
        self.columns = 6 if cross_entropy else 3
        general = is_general(options, dense, self.classes)
        self.family = family_of(self.classes, softmax, general)
        more_sums = squared or cross_entropy == SMOOTHED
        kind = (general or resampled, self.ls_v == 1, cross_entropy > 0, more_sums)
        self.plan = plan(self.classes, logits.element_size(), *kind)
        if INTERPRETED and self.plan.num_warps == 1:
            # An operation takes as long there for a small block as for a large one.
            self.plan = self.plan._replace(block=self.plan.block * 8)
        self.programs = programs_per_sample(self.logits, self.voxels, self.plan)
        ignore_index = options.ignore_index
        ignorable = ignore_index is not None
        if ignore_index is not None and not target.dtype.is_floating_point:
            limits = torch.iinfo(self.target.dtype)
            ignorable = limits.min <= ignore_index <= limits.max
        target_strides = (self.target.stride(0), self.target.stride(1) if dense else 1, ts_v)
        self.strides = (TargetStrides(*target_strides, ws_n, ws_v), geometry)
        self.tail = (ignore_index if ignorable else 0, _bits(options.focal_gamma), self.programs)
        self.flags = {
            "BLOCK": self.plan.block,
            "PACK": self.plan.pack,
            "DENSE": 0 if not dense else 2 if check else 1,
            "RESAMPLED": 0 if not resampled else 2 if options.nearest_exact else 1,
            "OVERLAP": options.overlap,
            "CE": cross_entropy,
            "FOCAL": 0 if options.focal_gamma == 0 else 2 if options.focal_gamma == 2 else 1,
            "GENERAL": general,
            "HAS_IGNORE": ignorable,
            "HAS_WEIGHT": voxel_weight is not None,
            "REAL": _real(logits),
        }
        if self.family != "two_classes":
            first_label = int(self.classes == 1 and not softmax)
            self.flags.update(C=self.classes, ACTIVATION=options.activation, FIRST_LABEL=first_label)
        if self.family == "all_classes":
            self.flags.update(MAIN=self.plan.main, TAIL=self.plan.tail, TILES=2 if self.plan.tail else 1)
        elif self.family == "many_classes":
            self.flags.update(CHUNK=self.plan.chunk)

    def interleaved(self, *tensors) -> dict:
        """For kernels whose tiles hold all classes: whether those of a voxel lie side by side in all of these."""
        if self.family != "all_classes":
            return {}
        strides = {(x.stride(1), voxel_stride(x, 2)) for x in tensors}
        return {"INTERLEAVED": strides == {(1, self.classes)}}

    def kernel(self, kind: str):
        """The family's kernel of a pass, "count" or "gradient", on its grid."""
        return KERNELS[f"{self.family}_{kind}_kernel"][(self.samples * self.programs,)]


def _resampling(sizes, source_sizes, target_strides, weight_strides):
    # Three dimensions, the last one innermost; those that there are not have size 1. See csrc/common/views.h.
    missing = 3 - len(sizes)
    sizes, source_sizes = (1,) * missing + tuple(sizes), (1,) * missing + tuple(source_sizes)
    strides = ((0,) * missing + tuple(s) for s in (target_strides, weight_strides))
    scales = (torch.tensor(source_sizes, dtype=torch.float32) / torch.tensor(sizes, dtype=torch.float32)).tolist()
    return Geometry(*sizes[1:], *source_sizes, *(x for s in strides for x in s), *scales)


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def count_pass(logits, target, voxel_weight, *arguments):
    """The counts (N, C, 3 or 6) in float64; NaN in a sample with a label or weight out of range."""
    *options, check = arguments
    v = _Volume(logits, target, voxel_weight, PassOptions(*options), check)
    counts = torch.zeros(v.samples, v.classes, v.columns, dtype=torch.float64, device=logits.device)
    if v.samples == 0 or v.voxels == 0:
        return counts
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    partial = torch.empty(v.samples, v.programs, v.columns, v.classes, dtype=dtype, device=logits.device)
    z = v.logits
    with _device_of(logits):
        v.kernel("count")(
            z, v.target, v.weight, partial, v.voxels, Strides(z.stride(0), z.stride(1), v.ls_v), *v.strides, *v.tail,
            **v.flags, **v.interleaved(z), num_warps=v.plan.num_warps,
        )  # fmt: skip
        together = 8  # 32 bytes of a row
        KERNELS["sum_partial_kernel"][(v.samples, -(-v.columns * v.classes // together))](
            partial, counts, v.programs, C=v.classes, COLUMNS=v.columns, ROWS=512, TOGETHER=together, num_warps=4
        )
    return counts


def table(counts, class_parameters, *arguments, dtype=torch.float64):
    """Loss and coefficients from counts (N, C, 3 or 6)."""
    options = TableOptions(*arguments)
    samples, classes, columns = counts.shape
    first_class = 0 if options.include_background or classes == 1 else 1
    rows = 1 if options.batch else samples
    shape = [] if options.reduction != REDUCTIONS["none"] else [rows, classes - first_class][options.batch :]
    loss = torch.empty(shape, dtype=dtype, device=counts.device)
    coefficients = torch.empty(rows, classes, 4 if columns == 6 else 2, dtype=torch.float64, device=counts.device)
    numbers = (options.alpha, options.beta, options.gamma, options.smooth_nr, options.smooth_dr,
               options.tversky_weight, options.ce_weight, options.label_smoothing)  # fmt: skip
    with _device_of(counts):
        KERNELS["table_kernel"][(1,)](
            counts, counts if class_parameters is None else class_parameters, loss, coefficients, samples,
            *(_bits(x) for x in numbers),
            C=classes, CLASSES=next_power_of_two(classes), FIRST_CLASS=first_class, BATCH=options.batch,
            ABSENT=options.absent, REDUCTION=options.reduction, HAS_CLASS_PARAMETERS=class_parameters is not None,
            CE=columns == 6, CE_MEAN=options.ce_mean, num_warps=4,
        )  # fmt: skip
    return loss, coefficients


def tversky_loss(logits, target, voxel_weight, *arguments):
    """Count pass and table."""
    of_pass = len(PassOptions._fields) + 1  # and check
    counts = count_pass(logits, target, voxel_weight, *arguments[:of_pass])
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return table(counts, *arguments[of_pass:], dtype=dtype)


def _write_gradient(out, grad_loss, coefficients, logits, target, voxel_weight, *arguments):
    v = _Volume(logits, target, voxel_weight, PassOptions(*arguments))
    if v.samples == 0 or v.voxels == 0:
        return
    z = v.logits
    row_stride = 0 if coefficients.size(0) == 1 else 1
    grad_classes = 0 if grad_loss.dim() == 0 else grad_loss.size(-1)
    with _device_of(logits):
        v.kernel("gradient")(
            grad_loss.contiguous(), z, v.target, v.weight, coefficients.contiguous(), out, v.voxels,
            Strides(z.stride(0), z.stride(1), v.ls_v), Strides(out.stride(0), out.stride(1), voxel_stride(out, 2)),
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


class RegionStrides(NamedTuple):
    """In elements: of samples, classes and voxels; of the three dimensions of a volume of another size."""

    n: int
    c: int
    v: int | None
    s0: int = 1
    s1: int = 1
    s2: int = 1


class _RegionVolume(_Volume):
    """The same with regions: (N, 1 or C, *spatial), of the target's sizes."""

    def __init__(self, logits, target, voxel_weight, regions, num_regions: int, options: PassOptions, check: int = 0):
        super().__init__(logits, target, voxel_weight, options, check)
        resampled = bool(self.flags["RESAMPLED"])
        self.ids: torch.Tensor
        rs_v: int | None
        self.ids, rs_v = (regions, 1) if resampled else _walkable(regions, 2)
        self.by_class = self.ids.size(1) > 1
        self.region_strides = RegionStrides(self.ids.stride(0), self.ids.stride(1) if self.by_class else 0, rs_v)
        if resampled:
            of_space = (0,) * (5 - self.ids.dim()) + self.ids.stride()[2:]
            self.region_strides = RegionStrides(*self.region_strides[:3], *of_space)
        classes = next_power_of_two(self.classes)
        block = max(8, REGION_ELEMENTS // (2 if logits.dtype == torch.float64 else 1) // classes)
        block *= 8 if INTERPRETED else 1
        self.region_programs = region_programs(self.logits, self.voxels, block, num_regions, self.columns + 1)
        keep = ("DENSE", "RESAMPLED", "OVERLAP", "CE", "FOCAL", "HAS_IGNORE", "HAS_WEIGHT", "REAL")
        softmax = options.activation == ACTIVATIONS["softmax"]
        self.region_flags = {
            **{name: self.flags[name] for name in keep},
            "C": self.classes,
            "CLASSES": classes,
            "BLOCK": block,
            "PACK": 1 if self.ls_v != 1 else min(block, 2 if logits.dtype == torch.float64 else 4),
            "ACTIVATION": options.activation,
            "FIRST_LABEL": int(self.classes == 1 and not softmax),
            "BY_CLASS": self.by_class,
            "num_warps": 4,
        }
        self.region_tail = (*self.tail[:2], self.region_programs, num_regions)


def region_count_pass(logits, target, voxel_weight, regions, _merged, num_regions, *arguments):
    """The counts (N, R, C, 4 or 7) in float64; NaN in a row with a label, weight or region out of range."""
    *options, check = arguments
    v = _RegionVolume(logits, target, voxel_weight, regions, num_regions, PassOptions(*options), check)
    columns = v.columns + 1
    shape = (v.samples, v.region_programs, num_regions, columns, v.classes)
    if v.samples == 0 or v.voxels == 0:
        return torch.zeros(v.samples, num_regions, v.classes, columns, dtype=torch.float64, device=logits.device)
    partial = torch.zeros(shape, dtype=torch.float64, device=logits.device)
    z, (target_strides, geometry) = v.logits, v.strides
    with _device_of(logits):
        KERNELS["region_count_kernel"][(v.samples * v.region_programs,)](
            z, v.target, v.weight, v.ids, partial, v.voxels, Strides(z.stride(0), z.stride(1), v.ls_v),
            target_strides, v.region_strides, geometry, *v.region_tail, **v.region_flags,
        )  # fmt: skip
    return partial.sum(1).transpose(2, 3).contiguous()


def _write_region_gradient(out, coefficients, logits, target, voxel_weight, regions, _merged, *arguments):
    options = PassOptions(*arguments)
    num_regions = coefficients.size(1)
    v = _RegionVolume(logits, target, voxel_weight, regions, num_regions, options)
    if v.samples == 0 or v.voxels == 0:
        return
    if options.overlap == OVERLAPS["squared"]:  # dL/dTP where g = 1: see foreground_coefficient
        coefficients = torch.cat(
            [coefficients[..., :1], coefficients[..., :1] + coefficients[..., 1:2], coefficients[..., 2:]], -1
        )
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z, (target_strides, geometry) = v.logits, v.strides
    with _device_of(logits):
        KERNELS["region_gradient_kernel"][(v.samples * v.region_programs,)](
            z, v.target, v.weight, v.ids, coefficients.to(dtype).contiguous(), out, v.voxels,
            Strides(z.stride(0), z.stride(1), v.ls_v), Strides(out.stride(0), out.stride(1), voxel_stride(out, 2)),
            target_strides, v.region_strides, geometry, *v.region_tail, **v.region_flags,
        )  # fmt: skip


def region_gradient_pass(coefficients, logits, *volumes_and_arguments):
    """dL/dlogits in a fresh tensor of the logits' layout."""
    logits, _ = _walkable(logits, 2)
    out = torch.empty_like(logits)
    if voxel_stride(out, 2) is None:
        out = out.contiguous()
    _write_region_gradient(out, coefficients, logits, *volumes_and_arguments)
    return out


def region_gradient_pass_(logits, coefficients, *volumes_and_arguments):
    """dL/dlogits over the logits."""
    _write_region_gradient(logits, coefficients, logits, *volumes_and_arguments)
