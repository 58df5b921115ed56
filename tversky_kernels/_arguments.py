"""Checks what users pass, before anything is launched, and brings it into one form."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ._options import (
    CHECKS,
    IN_TENSOR,
    SCALARS,
    Options,
    PassOptions,
    TableOptions,
    check_squared,
    checked,
    flag_or_none,
    is_used,
    number,
    region_count,
)

LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDEX_DTYPES = (torch.uint8, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool)
DENSE_DTYPES = (*INDEX_DTYPES, torch.float32, torch.float16, torch.bfloat16, torch.float64)
REGION_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
WEIGHT_DTYPES = (torch.float32, torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float64)


_NO_SCALARS: dict = {}
_STRIDED = torch.strided


class Volumes(NamedTuple):
    """The volumes, checked: the target as (N, *spatial) indices or, where dense, as (N, C, *spatial).

    Target and voxel_weight may be finer than the logits, if `check_arguments` was asked to allow it: then a voxel of
    the logits has the label and weight of its nearest voxel, as `torch.nn.functional.interpolate` finds it.
    """

    target: torch.Tensor
    voxel_weight: torch.Tensor | None
    dense: bool


class CheckedRegions(NamedTuple):
    """In which region each voxel is counted: ids (N, 1 or C, *spatial), in [0, number) or negative (in none)."""

    ids: torch.Tensor
    number: int


class Facts(NamedTuple):
    """A tensor's shape, dtype and device. Its values are checked later."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Layout(NamedTuple):
    """The form of target and voxel_weight: whether the target is dense, and which of them has a channel of 1."""

    dense: bool
    squeeze_target: bool
    squeeze_weight: bool


class Plan(NamedTuple):
    """All that a call needs to know beside the values of its tensors. of_pass, of_table: the operators' arguments."""

    options: Options
    layout: Layout
    of_pass: PassOptions
    of_table: TableOptions


class Checked(NamedTuple):
    """The result of `check_arguments`.

    class_parameters: (4, C) float64 or None, see `_class_parameters`. scalars: the options that tensors have, by name.
    annotated: (N, C) of bool, on the logits' device; None: all are. all_annotated: known to be all
    True. check_target: as it was given.
    """

    volumes: Volumes
    plan: Plan
    class_parameters: torch.Tensor | None
    scalars: dict[str, Any]  # of tensors
    regions: CheckedRegions | None = None
    annotated: torch.Tensor | None = None
    all_annotated: bool = False
    check_target: bool | None = None

    @property
    def options(self) -> Options:
        """The options, with the tensors that have some of them."""
        return self.plan.options._replace(**self.scalars) if self.scalars else self.plan.options

    @property
    def needs_torch_table(self) -> bool:
        """Whether the loss is to be made of the counts by torch's own operators, because the kernels' table reads
        numbers and gives them no gradient, and knows one row a sample."""
        parameters = self.class_parameters
        wants_gradient = parameters is not None and parameters.requires_grad and torch.is_grad_enabled()
        return bool(self.scalars) or wants_gradient or self.has_members

    def of_one_process(self) -> Checked:
        """Without `annotated` where all are; over several ranks others may have some that are not."""
        return self._replace(annotated=None) if self.all_annotated else self

    @property
    def has_members(self) -> bool:
        """Whether the table has a column for how much is in a row."""
        return self.regions is not None or self.annotated is not None

    @property
    def columns(self) -> int:
        """Columns of the counts table."""
        return (6 if is_used(self.plan.options.ce_weight) else 3) + (self.regions is not None)


def _shape(x) -> str:
    sizes = x.shape if isinstance(x, (torch.Tensor, Facts)) else x
    return f"({', '.join(str(s) for s in sizes)})"


def check_mode(check_target: bool | None, on_host: bool) -> int:
    """How the count pass treats values out of range, as the operators' number.

    on_host: the kernels can raise, and None asks them to.
    """
    if check_target is False:
        return CHECKS["ignore"]
    return CHECKS["raise"] if on_host else CHECKS["poison"]


def with_defaults(function: str, defaults: dict, options: dict) -> dict:
    """The options, completed; a TypeError that names the function where it takes no such argument."""
    for name in options:
        if name not in defaults:
            raise TypeError(f"{function}: unexpected argument {name!r}")
    return {**defaults, **options}


def check_head(features, weight, bias) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Checks features and head. Returns them in autocast's type where autocast is on, weight as (C, K)."""
    facts = _facts("features", features)
    if facts.dtype not in LOGITS_DTYPES:
        raise TypeError(f"features: expected float16, bfloat16, float32 or float64, got {facts.dtype}")
    if len(facts.shape) < 2 or facts.shape[1] == 0:
        raise ValueError(f"features: expected the shape (N, K, *spatial), got {_shape(features)}")
    channels = facts.shape[1]
    _facts("weight", weight)
    if weight.dim() < 2 or weight.size(0) == 0 or weight.shape[1:] != (channels, *(1,) * (weight.dim() - 2)):
        raise ValueError(
            f"weight: for features {_shape(features)} expected (C, {channels}), or with further dimensions of size 1 "
            f"as a convolution has it, got {_shape(weight)}"
        )
    weight = weight.reshape(-1, channels)
    if bias is not None and _facts("bias", bias).shape != weight.shape[:1]:
        raise ValueError(f"bias: expected {weight.size(0)} values, one a class, got the shape {_shape(bias)}")
    head = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    device = facts.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and facts.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        features, head = features.to(dtype), {name: x.to(dtype) for name, x in head.items()}
    for name, x in head.items():
        if x.dtype != features.dtype:
            raise TypeError(f"{name}: expected the features' dtype {features.dtype}, got {x.dtype}")
        if x.device != features.device:
            raise ValueError(f"{name}: expected it on the features' device {features.device}, got {x.device}")
    return features, head["weight"], head.get("bias")


def check_arguments(
    logits,
    target,
    voxel_weight=None,
    *,
    alpha=0.5,
    beta=0.5,
    class_weight=None,
    gamma=1.0,
    smooth_nr=0.0,
    smooth_dr=0.0,
    activation="softmax",
    include_background=True,
    ignore_index=None,
    batch=False,
    absent="keep",
    soft_label=False,
    squared=False,
    reduction="none",
    check_target=None,
    tversky_weight=1.0,
    ce_weight=0.0,
    ce_class_weight=None,
    label_smoothing=0.0,
    focal_gamma=0.0,
    resample=None,
    regions=None,
    num_regions=None,
    annotated=None,
) -> Checked:
    """Checks every argument that describes the loss; the labels' range is left to whoever reads the labels.

    What is not given has no effect: the counts alone need none of it. resample: target and voxel_weight may have
    other spatial sizes than the logits, and are read so; see `Volumes`.
    """
    if check_target is not None:
        flag_or_none("check_target", check_target)
    if not (type(alpha) is type(beta) is float and class_weight is None and ce_class_weight is None):
        alpha, beta, class_weight, ce_class_weight = map(_plain, (alpha, beta, class_weight, ce_class_weight))
        alpha, beta = _host_scalar("alpha", alpha), _host_scalar("beta", beta)
    scalars = _NO_SCALARS
    if not (
        type(gamma) is type(smooth_nr) is type(smooth_dr) is float
        and type(tversky_weight) is type(ce_weight) is type(label_smoothing) is float
    ):
        given, scalars = _split_scalars((gamma, smooth_nr, smooth_dr, tversky_weight, ce_weight, label_smoothing))
        gamma, smooth_nr, smooth_dr, tversky_weight, ce_weight, label_smoothing = given
    if type(focal_gamma) is not float and isinstance(focal_gamma, torch.Tensor):
        focal_gamma = number("focal_gamma", focal_gamma)
    unknown_label = None
    if ignore_index is not None and type(ignore_index) is not int:
        ignore_index = _plain(ignore_index)
        if isinstance(ignore_index, torch.Tensor) and torch.compiler.is_compiling():
            ignore_index, unknown_label = None, ignore_index
    if squared:
        check_squared(alpha, beta)
    in_table = not (
        class_weight is None
        and ce_class_weight is None
        and isinstance(alpha, (int, float))
        and isinstance(beta, (int, float))
    )
    if not (
        isinstance(logits, torch.Tensor)
        and isinstance(target, torch.Tensor)
        and logits.layout is target.layout is _STRIDED
        and not (logits.is_nested or target.is_nested)
    ):  # one of these raises
        _facts("logits", logits)
        _facts("target", target)
    if type(logits) is not torch.Tensor or type(target) is not torch.Tensor:
        _refuse_distributed("logits", logits)
        _refuse_distributed("target", target)
    what = (
        # Plain tuples: making Facts takes longer than the lookup.
        (logits.shape, logits.dtype, logits.device),
        (target.shape, target.dtype, target.device),
        None if voxel_weight is None else _facts("voxel_weight", voxel_weight),
        None if in_table else alpha, None if in_table else beta,
        gamma, smooth_nr, smooth_dr, activation, include_background, ignore_index, batch, absent, soft_label, squared,
        reduction, tversky_weight, ce_weight, label_smoothing, focal_gamma, resample,
    )  # fmt: skip
    try:
        # The same at every step of a training, and a third of the time of a call on a small volume.
        plan = (_check_facts if torch.compiler.is_compiling() else _check_facts_once)(*what)
    except TypeError:  # also where one cannot be hashed
        plan = _check_facts(*what)
    layout = plan.layout
    class_parameters = None
    if in_table:
        class_parameters = _class_parameters(alpha, beta, class_weight, ce_class_weight, logits)
    if layout.squeeze_target:
        target = target.squeeze(1)
    if voxel_weight is not None:
        if voxel_weight.requires_grad:
            raise ValueError("voxel_weight: expected constants, got a tensor that requires a gradient")
        if layout.squeeze_weight:
            voxel_weight = voxel_weight.squeeze(1)
    if unknown_label is not None:
        target, voxel_weight = _mask_ignored(target, voxel_weight, layout.dense, unknown_label)
    if regions is not None or num_regions is not None:
        regions = _check_regions(regions, num_regions, logits, target, layout.dense, resample is not None)
    all_annotated = False
    if annotated is not None:
        annotated, all_annotated = _check_annotated(annotated, logits, activation, check_target)
    volumes = Volumes(target, voxel_weight, layout.dense)
    return Checked(volumes, plan, class_parameters, scalars, regions, annotated, all_annotated, check_target)


def _check_regions(regions, num_regions, logits, target, dense: bool, any_resolution: bool) -> CheckedRegions:
    if regions is None:
        raise ValueError(f"num_regions: expected None without regions, got {num_regions!r}")
    facts = _facts("regions", regions)
    if facts.dtype not in REGION_DTYPES:
        raise TypeError(f"regions: expected uint8, int8, int16, int32 or int64, got {facts.dtype}")
    if facts.device != logits.device:
        raise ValueError(f"regions: expected it on the logits' device {logits.device}, got {facts.device}")
    samples, classes = logits.shape[:2]
    spatial = target.shape[2 if dense else 1 :] if any_resolution else logits.shape[2:]
    shapes = {(samples, *spatial): True, (samples, 1, *spatial): False, (samples, classes, *spatial): False}
    if tuple(facts.shape) not in shapes:
        expected = [_shape(x) for x in dict.fromkeys(shapes)]
        raise ValueError(
            f"regions: for logits {_shape(logits)} expected {', '.join(expected[:-1])} or {expected[-1]}, got "
            f"{_shape(regions)}"
        )
    ids = regions.unsqueeze(1) if shapes[tuple(facts.shape)] else regions
    if num_regions is None:
        if not _is_readable(regions):
            raise ValueError(
                f"num_regions: expected how many regions there are, because the largest of them is not read from "
                f"{'a compiled graph' if regions.is_cpu else regions.device}; got None"
            )
        num_regions = max(1, int(regions.max()) + 1) if regions.numel() else 1
    return CheckedRegions(ids, region_count("num_regions", num_regions))


def _check_annotated(annotated, logits, activation: str, check_target: bool | None) -> tuple[torch.Tensor, bool]:
    facts = _facts("annotated", annotated)
    if facts.dtype != torch.bool:
        raise TypeError(f"annotated: expected bool, got {facts.dtype}")
    if tuple(facts.shape) != tuple(logits.shape[:2]):
        raise ValueError(f"annotated: expected (N, C), here {_shape(logits.shape[:2])}, got {_shape(annotated)}")
    if annotated.device not in (logits.device, torch.device("cpu")):
        raise ValueError(f"annotated: expected it on the logits' device {logits.device}, got {annotated.device}")
    readable = _is_readable(annotated) or (check_target is True and not _tensors_are_for_now(annotated))
    if readable:
        if bool(annotated.all()):
            return annotated.to(logits.device, non_blocking=True), True
        if activation == "softmax" and not bool(annotated[:, 0].all()):
            sample = int((~annotated[:, 0]).nonzero()[0])
            raise ValueError(
                f"annotated: with softmax expected class 0, to which all that was not annotated belongs, to be "
                f"annotated in every sample; it is not in sample {sample}"
            )
    annotated = annotated.to(logits.device, non_blocking=True)
    if activation == "softmax" and not readable:
        annotated = torch.cat([torch.ones_like(annotated[:, :1]), annotated[:, 1:]], 1)
    return annotated, False


def _host_scalar(name: str, value):
    # A tensor of one value on the host that wants no gradient is a number, as long as it can be read.
    if isinstance(value, torch.Tensor) and value.dim() == 0 and _is_readable(value) and not value.requires_grad:
        return number(name, value)
    return value


def _is_readable(value: torch.Tensor) -> bool:
    return value.is_cpu and not torch.compiler.is_compiling() and not _tensors_are_for_now(value)


def _split_scalars(given: tuple) -> tuple[list, dict[str, torch.Tensor]]:
    # The values of SCALARS, IN_TENSOR where only a tensor has one, and those tensors.
    values, scalars = [], {}
    for name, value in zip(SCALARS, given, strict=True):
        value = _host_scalar(name, _plain(value))
        if isinstance(value, torch.Tensor):
            if value.dim() > 0 or value.dtype.is_complex or value.dtype == torch.bool:
                raise TypeError(f"{name}: expected a number or a 0-d tensor of one, got a tensor {_shape(value)}")
            scalars[name], value = value, IN_TENSOR
        values.append(value)
    return values, scalars


def _plain(value):
    # numpy's numbers and arrays as Python's numbers and lists; while a graph is compiled, which knows no values of
    # theirs, as tensors.
    if isinstance(value, (torch.Tensor, int, float, list, tuple)) or not hasattr(value, "tolist"):
        return value
    return torch.as_tensor(value) if torch.compiler.is_compiling() else value.tolist()


def _mask_ignored(target, voxel_weight, dense: bool, ignore_index: torch.Tensor):
    # Where a compiled graph does not know the ignored label: weights of 0 for it, and labels that are good.
    ignored = (target if target.is_floating_point() else target.long()) == ignore_index
    ignored = ignored.all(1) if dense else ignored
    target = torch.where(ignored.unsqueeze(1) if dense else ignored, torch.zeros_like(target), target)
    return target, ~ignored if voxel_weight is None else torch.where(
        ignored, torch.zeros_like(voxel_weight), voxel_weight
    )


def _facts(name: str, x) -> Facts:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    check_strided(name, x)
    return Facts(x.shape, x.dtype, x.device)


def _refuse_distributed(name: str, x: torch.Tensor) -> None:
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor; give x.to_local() of logits and target, and the group of "
            "its mesh as process_group (where it is sharded over voxels, or over a batch with batch=True) or as "
            "sample_group (where it is sharded over samples)"
        )


def check_strided(name: str, x: torch.Tensor) -> None:
    """Raises for tensors whose elements do not lie in memory at strides: nested, sparse and MKL-DNN's."""
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").strip("_")
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one; convert it first, for example to_dense()")


def _check_facts(logits, target, weight: Facts | None, alpha, beta, *values) -> Plan:
    # Every check that reads no values of tensors. alpha and beta are None where a table has them.
    logits, target = Facts(*logits), Facts(*target)
    options = checked(Options(alpha, beta, *values))
    _check_logits(logits, options.activation)
    layout = _check_volumes(logits, target, weight, options.resample is not None)
    return Plan(options, layout, options.pass_options(), options.table_options(layout.dense))


_check_facts_once = functools.lru_cache(maxsize=256, typed=True)(_check_facts)  # typed: True is not 1.0


def _numbers(name: str, value, classes: int) -> tuple[float, ...]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (number(name, value),) * classes
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a number or one number a class, got {type(value).__name__}")
    values = tuple(number(f"{name}[{i}]", v) for i, v in enumerate(value))
    _check_length(name, (len(values),), classes)
    return values


def _check_length(name: str, shape: tuple, classes: int) -> None:
    if shape != (classes,):
        raise ValueError(f"{name}: expected a number or {classes} numbers, one a class, got the shape {_shape(shape)}")


def _values(name: str, value: torch.Tensor, classes: int, device: torch.device, readable: bool = True) -> torch.Tensor:
    if value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected real numbers, got a tensor of {value.dtype}")
    values = value.to(device=device, dtype=torch.float64)
    if values.dim() == 0:
        values = values.expand(classes)
    _check_length(name, values.shape, classes)
    # Values on an accelerator are not read back, for that would wait for it; and traced or fake ones cannot be read.
    if readable and value.is_cpu and not isinstance(value, FakeTensor):
        bad = ~(torch.isfinite(values) & (values >= 0))
        if bool(bad.any()):
            raise ValueError(f"{name}: expected finite numbers >= 0, got {values[bad][0].item()}")
    return values


def _class_parameters(alpha, beta, class_weight, ce_class_weight, logits: torch.Tensor) -> torch.Tensor:
    # A (4, C) table of alpha, beta, class_weight and ce_class_weight.
    classes, device = logits.size(1), logits.device
    given: Sequence[tuple[str, Any]] = (
        ("alpha", alpha),
        ("beta", beta),
        ("class_weight", 1.0 if class_weight is None else class_weight),
        ("ce_class_weight", 1.0 if ce_class_weight is None else ce_class_weight),
    )
    for_now = _tensors_are_for_now(logits)
    rows = _rows if for_now else _remembered_rows
    if not for_now and device.type != "cpu":
        given = [(name, _on_host(name, value, classes, device)) for name, value in given]
    if not any(isinstance(value, torch.Tensor) for _, value in given):
        return rows(given, classes, device)
    return torch.stack(
        [
            _values(name, value, classes, device, not for_now)
            if isinstance(value, torch.Tensor)
            else rows(((name, value),), classes, device)[0]
            for name, value in given
        ]
    )


def _rows(given, classes: int, device: torch.device) -> torch.Tensor:
    values = [_numbers(name, value, classes) for name, value in given]
    return torch.tensor(values, dtype=torch.float64, device=device)


def _on_host(name: str, value, classes: int, device: torch.device):
    # The numbers of a tensor that is not where it is needed.
    if isinstance(value, torch.Tensor) and value.is_cpu and not value.requires_grad:
        return _values(name, value, classes, value.device).tolist()
    return value


def _remembered_rows(given, classes: int, device: torch.device) -> torch.Tensor:
    # They go to an accelerator once, not at every step: the host would wait for the copy, and a graph cannot hold it.
    values = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in given)
    types = tuple(tuple(map(type, x)) if isinstance(x, tuple) else type(x) for _, x in values)  # True is not 1.0
    try:
        hash(values)
    except TypeError:  # as no number is
        return _rows(given, classes, device)
    return _rows_once(values, types, classes, device)


@functools.lru_cache(maxsize=64)
def _rows_once(given: tuple, types: tuple, classes: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # autograd keeps it for backward, if not in this call
        return _rows(given, classes, device)


def _tensors_are_for_now(logits: torch.Tensor) -> bool:
    # Whether a tensor that is made now may be of use only for now: traced, without data, or of a transform.
    return (
        torch.compiler.is_compiling()
        or type(logits).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def _check_logits(logits: Facts, activation: str) -> None:
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"logits: expected float16, bfloat16, float32 or float64, got {logits.dtype}")
    if len(logits.shape) < 2:
        raise ValueError(f"logits: expected the shape (N, C, *spatial), got {_shape(logits)}")
    if logits.shape[1] == 0:
        raise ValueError(f"logits: expected at least one class in dimension 1, got the shape {_shape(logits)}")
    if logits.shape[1] == 1 and activation == "softmax":
        raise ValueError(
            "logits: softmax over one class is 1 everywhere; for a binary problem expected two classes, or one with "
            f"activation='sigmoid', got the shape {_shape(logits)}"
        )


def _fits(x: Facts, shape: tuple, any_resolution: bool) -> bool:
    # Whether x has this shape, its spatial sizes apart where these are free: 1 to 3 of them, of one voxel at least.
    if not any_resolution:
        return x.shape == shape
    spatial = x.shape[len(shape) :]
    return 1 <= len(spatial) <= 3 and x.shape[: len(shape)] == shape and 0 not in spatial


def _check_volumes(logits: Facts, target: Facts, weight: Facts | None, any_resolution: bool) -> Layout:
    if target.device != logits.device:
        raise ValueError(f"target: expected it on the logits' device {logits.device}, got {target.device}")
    samples, classes = logits.shape[:2]
    any_resolution = any_resolution and 0 not in logits.shape[2:]  # of no voxels nothing is read
    spatial = () if any_resolution else logits.shape[2:]
    index_shape, channel_shape = (samples, *spatial), (samples, 1, *spatial)
    dimensions, target_dimensions = len(logits.shape), len(target.shape)
    if any_resolution and not 3 <= dimensions <= 5:
        raise ValueError(f"logits: expected 1 to 3 spatial dimensions here, got the shape {_shape(logits)}")
    integral = not (target.dtype.is_floating_point or target.dtype.is_complex)
    has_channels = target_dimensions == dimensions
    is_index = target_dimensions == dimensions - 1 and _fits(target, index_shape, any_resolution)
    if has_channels and (integral or classes > 1):
        is_index = _fits(target, channel_shape, any_resolution)
    if is_index:
        if target.dtype not in INDEX_DTYPES:
            raise TypeError(
                f"target: class indices of shape {_shape(target)} are expected as bool, uint8, int8, int16, int32 or "
                f"int64, got {target.dtype}; convert them, for example with target.long()"
            )
    elif has_channels and _fits(target, (samples, classes, *spatial), any_resolution):
        if target.dtype not in DENSE_DTYPES:
            raise TypeError(f"target: expected bool, integers or floating numbers, got {target.dtype}")
    else:
        shown = ("*any",) if any_resolution else spatial
        raise ValueError(
            f"target: for logits {_shape(logits)} expected class indices {_shape((samples, *shown))} or "
            f"{_shape((samples, 1, *shown))}, or a dense target {_shape((samples, classes, *shown))}, got "
            f"{_shape(target)}"
        )
    weight_has_channels = False
    if weight is not None:
        weight_has_channels = _check_voxel_weight(weight, logits, index_shape, channel_shape, any_resolution)
        weight_spatial, target_spatial = weight.shape[1 + weight_has_channels :], target.shape[1 + has_channels :]
        if any_resolution and weight_spatial != target_spatial:
            raise ValueError(
                f"voxel_weight: expected the target's spatial sizes, got {_shape(weight)} for {_shape(target)}"
            )
    return Layout(not is_index, is_index and has_channels, weight_has_channels)


def _check_voxel_weight(weight: Facts, logits: Facts, index_shape, channel_shape, any_resolution: bool) -> bool:
    # Whether it has a channel too many.
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"voxel_weight: expected bool, uint8 or a floating type, got {weight.dtype}")
    if weight.device != logits.device:
        raise ValueError(f"voxel_weight: expected it on the logits' device {logits.device}, got {weight.device}")
    missing = len(logits.shape) - len(weight.shape)
    if missing == 0 and _fits(weight, channel_shape, any_resolution):
        return True
    if missing != 1 or not _fits(weight, index_shape, any_resolution):
        raise ValueError(
            f"voxel_weight: for logits {_shape(logits)} expected {_shape(index_shape)} or "
            f"{_shape(channel_shape)}, got {_shape(weight)}"
        )
    return False


def label_count(logits: torch.Tensor) -> int:
    """How many labels an index target may have: C, or 2 where one channel stands for the foreground."""
    return 2 if logits.size(1) == 1 else logits.size(1)


def compute_dtype(logits: torch.Tensor) -> torch.dtype:
    """The type of the computation and of the loss."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def is_ignored(target: torch.Tensor, ignore_index: int | None) -> torch.Tensor | bool:
    """Where a target holds the ignored label: nowhere, if its type does not have it."""
    if ignore_index is None:
        return False
    if not target.dtype.is_floating_point:
        if target.dtype == torch.bool:
            target = target.view(torch.uint8)
        limits = torch.iinfo(target.dtype)
        if not limits.min <= ignore_index <= limits.max:
            return False
    return target == ignore_index


def is_counted(volumes: Volumes, dtype: torch.dtype, ignore_index: int | None) -> torch.Tensor | bool:
    """Which voxels of the target's size have a weight and are not ignored; True: all. dtype: of the computation."""
    target, weight, dense = volumes
    ignored = is_ignored(target, ignore_index)
    if isinstance(ignored, bool):
        counted: torch.Tensor | bool = True
    else:
        counted = ~(ignored.all(1) if dense else ignored)
    return counted if weight is None else counted & ~(weight.to(dtype).abs() < torch.finfo(dtype).tiny)


def outside_of_unit(target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | bool:
    """Where the values of a dense target are not in [0, 1]; False: nowhere."""
    if target.dtype == torch.bool:
        return False
    values = target.to(dtype)
    return ~((values >= 0) & (values <= 1))


def raise_for_bad_values(
    logits: torch.Tensor, volumes: Volumes, ignore_index: int | None, regions: CheckedRegions | None = None
) -> None:
    """Reads labels, dense targets, voxel weights and regions and raises where one is out of range. Waits for the
    device."""
    target, weight, dense = volumes
    if regions is not None and bool((regions.ids.long() >= regions.number).any()):
        found = regions.ids[regions.ids.long() >= regions.number][0].item()
        raise ValueError(f"regions: expected values below num_regions = {regions.number}, got {found}")
    if weight is not None and weight.dtype.is_floating_point and weight.numel() and not bool((weight >= 0).all()):
        raise ValueError(f"voxel_weight: expected values >= 0, got {weight[~(weight >= 0)][0].item()}")
    if target.dtype == torch.bool or target.numel() == 0:
        return
    if dense:
        dtype = compute_dtype(logits)
        outside, counted = outside_of_unit(target, dtype), is_counted(volumes, dtype, ignore_index)
        if not isinstance(counted, bool):
            outside = outside & counted.unsqueeze(1)
        if not isinstance(outside, bool) and bool(outside.any()):
            raise ValueError(
                f"target: expected values of a dense target in [0, 1], got {target[outside][0].item():g}"
                "; check_target=False takes any"
            )
        return
    labels = label_count(logits)
    unknown = (target < 0) | (target.to(torch.int64) >= labels)
    if ignore_index is not None:
        unknown &= target.to(torch.int64) != ignore_index
    if bool(unknown.any()):
        ignored = "" if ignore_index is None else f" or the ignore_index {ignore_index}"
        raise ValueError(f"target: expected labels in [0, {labels}){ignored}, got {target[unknown][0].item()}")
