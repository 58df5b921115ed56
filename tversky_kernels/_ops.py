"""Registers the operators with torch.library: their schemas and fake kernels (the shapes of their results).

The compiled libraries only add implementations, so that the operators exist, and say what is missing, without them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import _linear
from ._options import REDUCTIONS, PassOptions, TableOptions, schema_of

NAMESPACE = "tversky_kernels"

# target: (N, *any) indices or (N, C, *any); where its spatial sizes are not the logits', its nearest voxels are taken.
_TARGET = "Tensor target, Tensor? voxel_weight"
# regions (N, 1 or C, *any): a voxel's region, in [0, num_regions); negative: it counts nowhere; None: all are in 0.
# merged (N, C) of bool: classes whose probability belongs to class 0; not for Triton's kernels.
_REGIONS = "Tensor? regions, Tensor? merged"
_LINEAR_REGIONS = "Tensor regions"
_VOXELS = f"{_TARGET}, {_LINEAR_REGIONS}"
_PASS = schema_of(PassOptions)
_TABLE = f"Tensor? class_parameters, {schema_of(TableOptions)}"
SCHEMAS = (
    # -> (N, C, 3) float64: tp, fp, fn; (N, C, 6) with a cross-entropy: its sum, that for smoothing, the voxels' weight
    f"count_pass(Tensor logits, {_TARGET}, {_PASS}, int check) -> Tensor",
    # -> loss (float64), coefficients (N or 1, C, 2): dL/dp where g = 0 and where g = 1; or (N or 1, C, 4): dL/dCE too
    f"table(Tensor counts, {_TABLE}) -> (Tensor, Tensor)",
    # both of them in one call
    f"tversky_loss(Tensor logits, {_TARGET}, {_PASS}, int check, {_TABLE}) -> (Tensor, Tensor)",
    f"gradient_pass(Tensor grad_loss, Tensor coefficients, Tensor logits, {_TARGET}, {_PASS}) -> Tensor",
    f"gradient_pass_(Tensor(a!) logits, Tensor grad_loss, Tensor coefficients, {_TARGET}, {_PASS}) -> ()",
    # -> (N, R, C, 4 or 7) float64: the counts of each region, and last its number of voxels
    f"region_count_pass(Tensor logits, {_TARGET}, {_REGIONS}, int num_regions, {_PASS}, int check) -> Tensor",
    # coefficients (N, R, C, 2 or 4), with the upstream gradient in them
    f"region_gradient_pass(Tensor coefficients, Tensor logits, {_TARGET}, {_REGIONS}, {_PASS}) -> Tensor",
    f"region_gradient_pass_(Tensor(a!) logits, Tensor coefficients, {_TARGET}, {_REGIONS}, {_PASS}) -> ()",
    # -> (N, 3, C) float64, of the CPU alone: voxels of class c predicted as c, predicted as c, of class c
    f"hard_count_pass(Tensor logits, {_TARGET}, int? ignore_index, bool raises) -> Tensor",
    "cpu_capability(int? force) -> int",
    # -> whether large gradients' memory is kept for the next ones; the bytes of it that gradients occupy, that wait
    "cpu_gradient_memory(bool? keep) -> (bool, int, int)",
)

#: The operators that every kernel backend implements.
NAMES = ("count_pass", "table", "tversky_loss", "gradient_pass", "gradient_pass_")
#: Those of losses with regions.
REGION_NAMES = ("region_count_pass", "region_gradient_pass", "region_gradient_pass_")

_HEAD = "Tensor weight, Tensor? bias"
#: The same passes with features (N, K, *spatial) and a head (C, K), (C) in the place of logits; of any device.
LINEAR_SCHEMAS = (
    f"linear_count_pass(Tensor features, {_HEAD}, {_TARGET}, {_PASS}, int check) -> Tensor",
    # -> the gradients of features (empty where it is not asked for), weight and bias
    f"linear_gradient_pass(Tensor grad_loss, Tensor coefficients, Tensor features, {_HEAD}, {_TARGET}, {_PASS}, "
    "bool to_features) -> (Tensor, Tensor, Tensor)",
    # the gradient of the features over the features -> those of weight and bias
    f"linear_gradient_pass_(Tensor(a!) features, Tensor grad_loss, Tensor coefficients, {_HEAD}, {_TARGET}, {_PASS}) "
    "-> (Tensor, Tensor)",
    # With regions, and coefficients that have the upstream gradient in them.
    f"linear_region_count_pass(Tensor features, {_HEAD}, {_VOXELS}, int num_regions, {_PASS}, int check) -> Tensor",
    f"linear_region_gradient_pass(Tensor coefficients, Tensor features, {_HEAD}, {_VOXELS}, {_PASS}, "
    "bool to_features) -> (Tensor, Tensor, Tensor)",
    f"linear_region_gradient_pass_(Tensor(a!) features, Tensor coefficients, {_HEAD}, {_VOXELS}, {_PASS}) "
    "-> (Tensor, Tensor)",
)
LINEAR_NAMES = (
    "linear_count_pass",
    "linear_gradient_pass",
    "linear_gradient_pass_",
    "linear_region_count_pass",
    "linear_region_gradient_pass",
    "linear_region_gradient_pass_",
)


def _define_namespace() -> torch.library.Library:
    reason = "a process registers the operators of tversky_kernels once; start a new one to load it again"
    if "_library" in globals():  # importlib.reload
        raise ImportError(reason)
    try:
        return torch.library.Library(NAMESPACE, "DEF")
    except RuntimeError as error:
        raise ImportError(reason) from error


_library = _define_namespace()
for _schema in (*SCHEMAS, *LINEAR_SCHEMAS):
    _library.define(_schema, tags=[torch.Tag.pt2_compliant_tag])
    if _schema.startswith((*NAMES, *REGION_NAMES, *LINEAR_NAMES)):
        _library.define(f"triton_{_schema}", tags=[torch.Tag.pt2_compliant_tag])


def _load(name: str) -> str | None:
    """Loads a compiled library of this package; returns why that failed, or None."""
    path = pathlib.Path(__file__).with_name(name)
    if not path.exists():
        return f"the package was built without these compiled kernels ({name} is not there)"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{name} does not load with torch {torch.__version__}: {error}"
    return None


class CudaLibrary(NamedTuple):
    """Facts about the library of the CUDA kernels."""

    code: tuple[str, ...]  # like ("sm_80", "sm_90", "compute_90")
    version: tuple[int, int]  # of the CUDA that compiled it
    of_driver: tuple[int, int]  # the newest that the driver here runs; 0 where it does not say


@functools.cache
def cuda_library() -> CudaLibrary:
    """The architectures and the CUDA version of the library; only where CUDA_MISSING is None."""
    library = ctypes.CDLL(str(pathlib.Path(__file__).with_name("_C_cuda.so")))
    library.tversky_kernels_cuda_code.restype = ctypes.c_char_p
    code = library.tversky_kernels_cuda_code().decode().split(".")
    own, drivers = ctypes.c_int(), ctypes.c_int()
    library.tversky_kernels_cuda_versions(ctypes.byref(own), ctypes.byref(drivers))
    version, of_driver = ((x.value // 1000, x.value % 1000 // 10) for x in (own, drivers))
    return CudaLibrary(tuple(code), version, of_driver)


def _register_triton() -> str | None:
    """Registers the Triton implementations; returns why that failed, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if torch.version.cuda is None and torch.version.hip is None and not interpreted:
        return f"torch {torch.__version__} is built without CUDA or ROCm"
    try:
        from .triton import launch
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    for name in (*NAMES, *REGION_NAMES):
        _library.impl(f"triton_{name}", getattr(launch, name), "CPU" if interpreted else "CUDA")
    return None


#: Why the kernels of a backend are missing; None where they are there.
CPU_MISSING = _load("_C.so")
CUDA_MISSING = _load("_C_cuda.so")
TRITON_MISSING = _register_triton()

ops = torch.ops.tversky_kernels


class Operators(NamedTuple):
    """One backend's operators."""

    count_pass: Callable
    table: Callable
    tversky_loss: Callable
    gradient_pass: Callable
    gradient_pass_: Callable
    region_count_pass: Callable
    region_gradient_pass: Callable
    region_gradient_pass_: Callable


_ALL = (*NAMES, *REGION_NAMES)
#: By backend. cpu and cuda share their operators: the dispatcher chooses by the tensors' device.
OPERATORS = {
    "cpu": Operators(*(getattr(ops, name).default for name in _ALL)),
    "cuda": Operators(*(getattr(ops, name).default for name in _ALL)),
    "triton": Operators(*(getattr(ops, f"triton_{name}").default for name in _ALL)),
}


class LinearOperators(NamedTuple):
    """One backend's operators of a loss with its head."""

    count_pass: Callable
    gradient_pass: Callable
    gradient_pass_: Callable
    region_count_pass: Callable
    region_gradient_pass: Callable
    region_gradient_pass_: Callable


def linear_passes(backend: str) -> LinearOperators:
    """The passes of `_linear` over one backend's operators, not registered."""

    def count_pass(*arguments):
        return _linear.count_pass(OPERATORS[backend], *arguments)

    def gradient_pass(grad_loss, coefficients, features, *arguments):
        *arguments, to_features = arguments
        out = torch.empty_like(features) if to_features else None
        of_head = _linear.gradient_pass(OPERATORS[backend], out, grad_loss, coefficients, features, *arguments)
        return (features.new_empty(0) if out is None else out, *of_head)

    def gradient_pass_(features, grad_loss, coefficients, *arguments):
        return _linear.gradient_pass(OPERATORS[backend], features, grad_loss, coefficients, features, *arguments)

    def region_count_pass(features, weight, bias, target, voxel_weight, regions, num_regions, *arguments):
        volumes = (features, weight, bias, target, voxel_weight)
        return _linear.count_pass(OPERATORS[backend], *volumes, *arguments, regions=regions, num_regions=num_regions)

    def region_gradient_pass(coefficients, features, weight, bias, target, voxel_weight, regions, *arguments):
        *arguments, to_features = arguments
        out = torch.empty_like(features) if to_features else None
        volumes = (features, weight, bias, target, voxel_weight)
        of_head = _linear.gradient_pass(
            OPERATORS[backend], out, None, coefficients, *volumes, *arguments, regions=regions
        )
        return (features.new_empty(0) if out is None else out, *of_head)

    def region_gradient_pass_(features, coefficients, weight, bias, target, voxel_weight, regions, *arguments):
        volumes = (features, weight, bias, target, voxel_weight)
        return _linear.gradient_pass(
            OPERATORS[backend], features, None, coefficients, *volumes, *arguments, regions=regions
        )

    return LinearOperators(
        count_pass, gradient_pass, gradient_pass_, region_count_pass, region_gradient_pass, region_gradient_pass_
    )


def _register_linear(prefix: str, backend: str) -> LinearOperators:
    for name, function in zip(LINEAR_NAMES, linear_passes(backend), strict=True):
        _library.impl(f"{prefix}{name}", function, "CompositeExplicitAutograd")
    return LinearOperators(*(getattr(ops, f"{prefix}{name}").default for name in LINEAR_NAMES))


_any_device = _register_linear("", "cpu")
LINEAR_OPERATORS = {"cpu": _any_device, "cuda": _any_device, "triton": _register_linear("triton_", "triton")}


def _loss_shape(samples, classes, table: TableOptions):
    if table.reduction != REDUCTIONS["none"]:
        return []
    kept = classes if table.include_background or classes == 1 else classes - 1
    return [kept] if table.batch else [samples, kept]


def _fake(name):
    """Registers the fake kernel of an operator and of its Triton twin."""

    def register(function):
        @functools.wraps(function)
        def checked(*arguments):
            # A meta tensor among others brings the call here, where nothing would be computed.
            devices = {x.device for x in arguments if isinstance(x, torch.Tensor)}
            if len(devices) > 1:
                raise ValueError(f"{name}: expected all tensors on one device, got {', '.join(map(str, devices))}")
            return function(*arguments)

        for prefix in ("", "triton_"):
            torch.library.register_fake(f"{NAMESPACE}::{prefix}{name}", checked)
        return function

    return register


@_fake("count_pass")
def _(logits, target, voxel_weight, *arguments):
    *of_pass, _check = arguments
    columns = 6 if PassOptions(*of_pass).cross_entropy else 3
    return logits.new_empty([logits.size(0), logits.size(1), columns], dtype=torch.float64)


@_fake("table")
def _(counts, class_parameters, *arguments):
    table = TableOptions(*arguments)
    samples, classes, columns = counts.shape
    loss = counts.new_empty(_loss_shape(samples, classes, table))
    return loss, counts.new_empty([1 if table.batch else samples, classes, 4 if columns == 6 else 2])


@_fake("tversky_loss")
def _(logits, target, voxel_weight, *arguments):
    of_pass = PassOptions(*arguments[: len(PassOptions._fields)])
    _check, _class_parameters, *of_table = arguments[len(PassOptions._fields) :]
    table = TableOptions(*of_table)
    samples, classes = logits.size(0), logits.size(1)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = logits.new_empty(_loss_shape(samples, classes, table), dtype=dtype)
    columns = 4 if of_pass.cross_entropy else 2
    return loss, logits.new_empty([1 if table.batch else samples, classes, columns], dtype=torch.float64)


@_fake("gradient_pass")
def _(grad_loss, coefficients, logits, *_):
    return torch.empty_like(logits)


@_fake("gradient_pass_")
def _(logits, *_):
    return None


@torch.library.register_fake(f"{NAMESPACE}::hard_count_pass")
def _(logits, *_):
    return logits.new_empty([logits.size(0), 3, logits.size(1)], dtype=torch.float64)


@_fake("region_count_pass")
def _(logits, target, voxel_weight, regions, merged, num_regions, *arguments):
    *of_pass, _check = arguments
    columns = 7 if PassOptions(*of_pass).cross_entropy else 4
    return logits.new_empty([logits.size(0), num_regions, logits.size(1), columns], dtype=torch.float64)


@_fake("region_gradient_pass")
def _(coefficients, logits, *_):
    return torch.empty_like(logits)


@_fake("region_gradient_pass_")
def _(logits, *_):
    return None


@_fake("linear_count_pass")
def _(features, weight, bias, target, voxel_weight, *arguments):
    *of_pass, _check = arguments
    columns = 6 if PassOptions(*of_pass).cross_entropy else 3
    return features.new_empty([features.size(0), weight.size(0), columns], dtype=torch.float64)


@_fake("linear_gradient_pass")
def _(grad_loss, coefficients, features, weight, *arguments):
    *_, to_features = arguments
    of_features = torch.empty_like(features) if to_features else features.new_empty(0)
    return of_features, torch.empty_like(weight), weight.new_empty(weight.size(0))


@_fake("linear_gradient_pass_")
def _(features, grad_loss, coefficients, weight, *_):
    return torch.empty_like(weight), weight.new_empty(weight.size(0))


@_fake("linear_region_count_pass")
def _(features, weight, bias, target, voxel_weight, regions, num_regions, *arguments):
    *of_pass, _check = arguments
    columns = 7 if PassOptions(*of_pass).cross_entropy else 4
    return features.new_empty([features.size(0), num_regions, weight.size(0), columns], dtype=torch.float64)


@_fake("linear_region_gradient_pass")
def _(coefficients, features, weight, *arguments):
    *_, to_features = arguments
    of_features = torch.empty_like(features) if to_features else features.new_empty(0)
    return of_features, torch.empty_like(weight), weight.new_empty(weight.size(0))


@_fake("linear_region_gradient_pass_")
def _(features, coefficients, weight, *_):
    return torch.empty_like(weight), weight.new_empty(weight.size(0))
