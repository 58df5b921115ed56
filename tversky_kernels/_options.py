"""The options of the losses: their defaults, and what each of them may be. One definition for functions and modules."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import NamedTuple, get_type_hints

import torch

#: The arguments that define a loss, with their defaults: the Tversky loss, and what the compound loss adds.
TVERSKY_DEFAULTS = {
    "alpha": 0.3,
    "beta": 0.7,
    "gamma": 1.0,
    "smooth_nr": 1e-5,
    "smooth_dr": 1e-5,
    "activation": "softmax",
    "class_weight": None,
    "include_background": True,
    "ignore_index": None,
    "voxel_weight": None,
    "regions": None,
    "num_regions": None,
    "annotated": None,
    "batch": False,
    "absent": "keep",
    "soft_label": False,
    "squared": False,
    "reduction": "mean",
}
CE_DEFAULTS = {
    "tversky_weight": 1.0,
    "ce_weight": 1.0,
    "ce_class_weight": None,
    "label_smoothing": 0.0,
    "focal_gamma": 0.0,
}

#: The names of the losses where a function offers several.
LOSSES = ("tversky", "tversky_ce")

#: Where a target of another resolution is read: at a voxel's corner or at its centre, as `interpolate`'s modes do.
RESAMPLE = ("nearest", "nearest-exact")

#: How a loss is run.
RUN_DEFAULTS = {
    "check_target": None,
    "inplace_backward": False,
    "process_group": None,
    "sample_group": None,
    "grad_reduction": "mean",
    "backend": "auto",
}
GRAD_REDUCTIONS = ("mean", "sum")
GENERALIZED_WEIGHTS = ("square", "simple", "uniform")

#: Options that may be 0-d tensors. Their values are never read on the host (focal_gamma's is).
SCALARS = ("gamma", "smooth_nr", "smooth_dr", "tversky_weight", "ce_weight", "label_smoothing")


#: The operators' numbers for the values, as in csrc/common/mathematics.h.
ACTIVATIONS = {"softmax": 0, "sigmoid": 1, "none": 2}
ABSENT = {"keep": 0, "zero": 1, "skip": 2}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
OVERLAPS = {"product": 0, "absolute": 1, "squared": 2}
CE_MEANS = {"class weights": 0, "voxels": 1, "channels": 2, "labels": 3}
CHECKS = {"ignore": 0, "poison": 1, "raise": 2}


class PassOptions(NamedTuple):
    """The options of a pass over the volume: the operators' arguments, in their order.

    cross_entropy: 0 none, 1 its sums too, 2 and those for label smoothing. nearest_exact: where a target's spatial
    sizes are not the logits', its voxels are found by the centres of the logits' voxels, not by their corners.
    """

    activation: int
    ignore_index: int | None
    overlap: int
    cross_entropy: int
    focal_gamma: float
    nearest_exact: bool


class TableOptions(NamedTuple):
    """The options of the table: the operators' arguments, in their order."""

    alpha: float
    beta: float
    gamma: float
    smooth_nr: float
    smooth_dr: float
    include_background: bool
    batch: bool
    absent: int
    reduction: int
    tversky_weight: float
    ce_weight: float
    label_smoothing: float
    ce_mean: int


def schema_of(record: type) -> str:
    """A record's fields as an operator's schema has them: "int activation, int? ignore_index, ..."."""
    kinds = {int: "int", float: "float", bool: "bool", int | None: "int?"}
    return ", ".join(f"{kinds[kind]} {name}" for name, kind in get_type_hints(record).items())


class InTensor:
    """Stands for an option that is a tensor: its value is not known on the host."""

    def __repr__(self):
        return "IN_TENSOR"


IN_TENSOR = InTensor()


class Options(NamedTuple):
    """The arguments of the loss that are not volumes, checked."""

    alpha: float
    beta: float
    gamma: float
    smooth_nr: float
    smooth_dr: float
    activation: str
    include_background: bool
    ignore_index: int | None
    batch: bool
    absent: str
    soft_label: bool
    squared: bool
    reduction: str
    tversky_weight: float = 1.0
    ce_weight: float = 0.0
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    resample: str | None = None

    @property
    def overlap(self) -> str:
        """How a voxel's part of the counts is measured."""
        return "squared" if self.squared else "absolute" if self.soft_label else "product"

    def pass_options(self) -> PassOptions:
        """As the passes take them."""
        cross_entropy = 0 if not is_used(self.ce_weight) else 2 if is_used(self.label_smoothing) else 1
        return PassOptions(
            activation=ACTIVATIONS[self.activation],
            ignore_index=self.ignore_index,
            overlap=OVERLAPS[self.overlap],
            cross_entropy=cross_entropy,
            focal_gamma=self.focal_gamma,
            nearest_exact=self.resample == "nearest-exact",
        )

    def table_options(self, dense: bool) -> TableOptions:
        """As the table takes them, where no tensor has one of the numbers."""
        of_labels = "labels" if self.squared else "class weights"
        mean = "channels" if self.activation == "sigmoid" else "voxels" if dense else of_labels
        return TableOptions(
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            smooth_nr=self.smooth_nr,
            smooth_dr=self.smooth_dr,
            include_background=self.include_background,
            batch=self.batch,
            absent=ABSENT[self.absent],
            reduction=REDUCTIONS[self.reduction],
            tversky_weight=self.tversky_weight,
            ce_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            ce_mean=CE_MEANS[mean],
        )


def number(name: str, value, *, positive: bool = False, most: float = math.inf) -> float:
    """The value as a float; an error that names the argument where it is out of range."""
    if isinstance(value, torch.Tensor):
        value = _one_value(name, value)
    bound = "> 0" if positive else ">= 0"
    if most < math.inf:
        bound = f"in {'(' if positive else '['}0, {most:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):  # numpy's among them
        raise TypeError(f"{name}: expected a number {bound}, got {type(value).__name__}")
    # NaN fails too. (mypy knows no order of numbers.Real.)
    if not 0 <= value <= most or value == math.inf or (positive and value == 0):  # type: ignore[operator]
        raise ValueError(f"{name}: expected a finite number {bound}, got {value}")
    return float(value)


def _one_value(name: str, value: torch.Tensor):
    if value.numel() != 1 or value.dim() > 0 or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(
            f"{name}: expected a number or a 0-d tensor of one, got a tensor {tuple(value.shape)} {value.dtype}"
        )
    return value.item()


def one_of(name: str, value, allowed) -> str:
    """The value, if it is allowed; a ValueError that lists the allowed values otherwise."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def flag(name: str, value) -> bool:
    """The value, if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def is_used(value) -> bool:
    """Whether a factor is not 0, as far as is known."""
    return value is IN_TENSOR or isinstance(value, torch.Tensor) or value != 0


# Functions, not closures over their bounds: torch.compile would take a closure's number for a variable.
def _number(name: str, value):
    return value if value is IN_TENSOR else number(name, value)


def _positive(name: str, value):
    return value if value is IN_TENSOR else number(name, value, positive=True)


def _share(name: str, value):
    return value if value is IN_TENSOR else number(name, value, most=1.0)


def _choice(allowed) -> Callable:
    return lambda name, value: one_of(name, value, allowed)


def _or_none(check: Callable) -> Callable:
    return lambda name, value: None if value is None else check(name, value)


def _per_class(name: str, value):
    if isinstance(value, (list, tuple)):
        return tuple(number(f"{name}[{i}]", x) for i, x in enumerate(value))
    return number(name, value)


def _integer(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer or None, got {value!r}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name}: expected a 64-bit integer, got {value}")
    return int(value)


def region_count(name: str, value) -> int:
    """The value as an int, if it is one in [1, 2^31)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer or None, got {value!r}")
    if not 1 <= int(value) < 2**31:
        raise ValueError(f"{name}: expected an integer in [1, 2^31), got {value}")
    return int(value)


def flag_or_none(name: str, value) -> bool | None:
    """The value, if it is None, True or False."""
    if value not in (None, True, False):
        raise TypeError(f"{name}: expected None, True or False, got {value!r}")
    return value


#: A check for each option: a function of its name and a value. It returns the value in one form, or raises.
ALLOWED: dict[str, Callable] = {
    "alpha": _per_class,
    "beta": _per_class,
    "class_weight": _or_none(_per_class),
    "ce_class_weight": _or_none(_per_class),
    "gamma": _positive,
    "smooth_nr": _number,
    "smooth_dr": _number,
    "tversky_weight": _number,
    "ce_weight": _number,
    "label_smoothing": _share,
    "focal_gamma": _number,
    "activation": _choice(ACTIVATIONS),
    "include_background": flag,
    "ignore_index": _or_none(_integer),
    "batch": flag,
    "absent": _choice(ABSENT),
    "soft_label": flag,
    "squared": flag,
    "reduction": _choice(REDUCTIONS),
    "resample": _or_none(_choice(RESAMPLE)),
    "loss": _choice(LOSSES),
    "weight": _choice(GENERALIZED_WEIGHTS),
    "weights": _or_none(_per_class),
    "check_target": flag_or_none,
    "inplace_backward": flag,
    "grad_reduction": _choice(GRAD_REDUCTIONS),
    "num_regions": _or_none(region_count),
}
#: Options that may be tensors of one number a class.
PER_CLASS = ("alpha", "beta", "class_weight", "ce_class_weight", "weights")


def checked(given: Options) -> Options:
    """All of them in one form, or an error that names the first that is not allowed. alpha is None where a table has it
    and beta."""
    if given.alpha is None:
        given = given._replace(alpha=0.0, beta=0.0)  # not NaN: it must fit into a compiled package's JSON
    options = Options(*[ALLOWED[name](name, value) for name, value in zip(Options._fields, given, strict=True)])
    check_together(options)
    return options


def check_together(options: Options) -> None:
    """Raises where two of them exclude each other."""
    if options.squared and options.soft_label:
        raise ValueError("squared: expected False with soft_label=True; its squares are right for soft targets already")
    if is_used(options.ce_weight) and options.activation == "none":
        raise ValueError("activation: expected 'softmax' or 'sigmoid' for a cross-entropy of logits, got 'none'")


def check_squared(alpha, beta) -> None:
    """Raises where squared errors would need more than one weight."""
    if not (isinstance(alpha, (int, float)) and isinstance(beta, (int, float)) and alpha == beta):
        raise ValueError(f"squared: expected alpha and beta to be one number, got {alpha!r} and {beta!r}")


def check_value(name: str, value) -> None:
    """Raises where an option may not have a value, as far as is known before there are logits.

    What a tensor holds is read where that waits for no device and loses no gradient.
    """
    if name not in ALLOWED:
        return
    if not isinstance(value, torch.Tensor) or name not in (*SCALARS, *PER_CLASS, "focal_gamma", "ignore_index"):
        ALLOWED[name](name, value)
    elif value.dim() > (name in PER_CLASS) or value.dtype.is_complex or value.dtype == torch.bool:
        wanted = "a number, or one a class" if name in PER_CLASS else "a number or a 0-d tensor of one"
        raise TypeError(f"{name}: expected {wanted}, got a tensor {tuple(value.shape)} {value.dtype}")
    elif type(value) is torch.Tensor and value.device.type == "cpu" and not value.requires_grad:
        ALLOWED[name](name, value.tolist())
