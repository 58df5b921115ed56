"""The losses as modules: they store the arguments and call the functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import _options, functional, lesions
from ._backends import check_name
from .distributed import is_initialised

__all__ = [
    "BlobLoss",
    "CCLoss",
    "DeepSupervisionLoss",
    "DiceLoss",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "JaccardLoss",
    "TverskyCELoss",
    "TverskyHead",
    "TverskyLoss",
]


#: Arguments that are no options: they come with each batch.
_OF_A_CALL = ("voxel_weight", "regions", "annotated")
#: These may come with a batch too, and count more there than the option.
_ALSO_OF_A_CALL = ("num_regions",)


class _Loss(torch.nn.Module):
    """Has every option of a function of `functional` as an attribute, which takes effect whenever it is set.

    Tensors among them are buffers: they move with the module and are in its state_dict. Parameters are parameters.
    """

    _function: Callable[..., torch.Tensor] = staticmethod(functional.tversky_loss)
    _takes: tuple[Callable[..., torch.Tensor], ...] = (functional.tversky_loss,)
    _fixed: frozenset[str] = frozenset()
    _none_before_init: frozenset[str] = frozenset()
    _options: dict[str, object]  # with their defaults

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        parameters = {}
        for function in reversed(cls._takes):
            parameters |= inspect.signature(function).parameters
        left_out = {"logits", "target", *_OF_A_CALL, "options", *cls._fixed}
        options = {name: p for name, p in parameters.items() if name not in left_out}
        cls._options = {name: p.default for name, p in options.items()}
        own = [p for p in inspect.signature(cls.__init__).parameters.values() if p.name not in ("self", "options")]
        keyword = inspect.Parameter.KEYWORD_ONLY
        cls.__signature__ = inspect.Signature([*own, *(p.replace(kind=keyword) for p in options.values())])

    def __init__(self, **options):
        super().__init__()
        self._given = ()  # the names of the options that have been set
        self.__dict__.update(self._options)
        for name, value in options.items():
            if name not in self._options:
                raise TypeError(f"{type(self).__name__}: unexpected argument {name!r}")
            setattr(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        # Options that exclude each other. When an option is set later, the call checks it.
        values = {name: getattr(self, name) for name in _options.Options._fields if name in self._options}
        if getattr(self, "loss", None) == "tversky":
            values["ce_weight"] = 0.0
        defaults = {k: v for k, v in _options.TVERSKY_DEFAULTS.items() if k in _options.Options._fields}
        options = _options.Options(**{**defaults, **values})
        _options.check_together(options)
        if options.squared and {"alpha", "beta"} <= set(self._options):
            _options.check_squared(options.alpha, options.beta)

    def __setattr__(self, name, value):
        if name in self._options:
            if hasattr(value, "tolist") and not isinstance(value, torch.Tensor):
                value = value.tolist()  # numpy's: a compiled graph would take it for a tensor
            if name == "backend":
                check_name(value)
            elif not torch.compiler.is_compiling():
                _options.check_value(name, value)
            if name not in self._given:
                self._given += (name,)
            if name in ("process_group", "sample_group"):
                # torch.distributed.group.WORLD is None until then, and a local loss would be computed for ever after.
                early = self._none_before_init - {name}
                early |= {name} if value is None and not is_initialised() else set()
                super().__setattr__("_none_before_init", early)
            for kept in (self.__dict__, self._buffers, self._parameters):
                kept.pop(name, None)
            if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
                return self.register_buffer(name, value)
        return super().__setattr__(name, value)

    def _given_options(self) -> dict:
        if self._none_before_init and is_initialised() and torch.distributed.get_world_size() > 1:
            raise ValueError(
                f"{min(self._none_before_init)}: it was set to None before torch.distributed.init_process_group, when "
                "torch.distributed.group.WORLD is None too; expected True for the default group, or nothing for a loss "
                "of this rank alone"
            )
        return {name: getattr(self, name) for name in self._given}

    def forward(self, logits, target: torch.Tensor, voxel_weight: torch.Tensor | None = None, **of_call: Any):
        """The loss of logits and a target, as the function takes them; voxel_weight, regions and annotated as in
        `tversky_loss`."""
        return self._function(logits, target, voxel_weight=voxel_weight, **self._options_of(of_call))

    def _options_of(self, of_call: dict) -> dict:
        # With what belongs to one call.
        for name in of_call:
            if name not in _OF_A_CALL and not (name in _ALSO_OF_A_CALL and name in self._options):
                raise TypeError(f"{type(self).__name__}: unexpected argument {name!r} of a call")
        options = self._given_options()
        if of_call.get("regions") is None and options.get("num_regions") is not None:
            options["num_regions"] = None  # for calls that have regions
        return {**options, **of_call}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_shown(getattr(self, name))}" for name in self._given)


def _shown(value) -> str:
    # Short: a class count is not a line's length.
    if isinstance(value, torch.Tensor) and value.dim() > 0:
        return f"tensor of {value.numel()}"
    if isinstance(value, (list, tuple)) and len(value) > 6:
        return f"[{', '.join(map(repr, value[:3]))}, ...{len(value)}]"
    return repr(value)


class TverskyLoss(_Loss):
    """`tversky_kernels.tversky_loss` as a module: takes its keyword arguments, but for voxel_weight.

    Examples:
        >>> criterion = tk.TverskyLoss(alpha=0.3, beta=0.7)
        >>> criterion(model(image), label).backward()
    """


class DiceLoss(_Loss):
    """`tversky_kernels.dice_loss` as a module."""

    _function = staticmethod(functional.dice_loss)
    _fixed = frozenset({"alpha", "beta"})


class JaccardLoss(_Loss):
    """`tversky_kernels.jaccard_loss` as a module."""

    _function = staticmethod(functional.jaccard_loss)
    _fixed = frozenset({"alpha", "beta"})


class FocalTverskyLoss(_Loss):
    """`tversky_kernels.focal_tversky_loss` as a module: gamma = 0.75 unless given."""

    _function = staticmethod(functional.focal_tversky_loss)
    _takes = (functional.focal_tversky_loss, functional.tversky_loss)


class TverskyCELoss(_Loss):
    """`tversky_kernels.tversky_ce_loss` as a module."""

    _function = staticmethod(functional.tversky_ce_loss)
    _takes = (functional.tversky_ce_loss,)


class GeneralizedDiceLoss(_Loss):
    """`tversky_kernels.generalized_dice_loss` as a module."""

    _function = staticmethod(functional.generalized_dice_loss)
    _takes = (functional.generalized_dice_loss,)


class BlobLoss(_Loss):
    """`tversky_kernels.blob_loss` as a module; regions come with each call.

    Examples:
        >>> criterion = tk.BlobLoss()
        >>> criterion(model(image), label, regions=regions, num_regions=num_regions).backward()
    """

    _function = staticmethod(lesions.blob_loss)
    _takes = (lesions.blob_loss,)


class CCLoss(_Loss):
    """`tversky_kernels.cc_loss` as a module; regions come with each call."""

    _function = staticmethod(lesions.cc_loss)
    _takes = (lesions.cc_loss,)


class DeepSupervisionLoss(_Loss):
    """`tversky_kernels.deep_supervision_loss` as a module: takes its keyword arguments, weights and loss among them.

    Examples:
        >>> criterion = tk.DeepSupervisionLoss(loss="tversky_ce", alpha=0.5, beta=0.5, batch=True)
        >>> criterion([full, half, quarter], label).backward()
    """

    _function = staticmethod(functional.deep_supervision_loss)
    _takes = (functional.deep_supervision_loss, functional.tversky_ce_loss)


class TverskyHead(_Loss):
    """A network's last layer and its loss in one, `tversky_kernels.linear_tversky_loss`: the logits never exist.

    Its parameters are those of ``torch.nn.Conv3d(in_channels, classes, 1)`` (Conv2d, Conv1d for other dimensions), by
    their names and shapes, so that such a layer's state_dict fits. (Options that are tensors are in the state_dict too;
    lists of numbers are not.)

    Args:
        in_channels: Channels of the features.
        classes: Classes, or channels of the output.
        bias: Whether there is one.
        dimensions: Spatial dimensions, 1 to 3.
        device: Of the parameters.
        dtype: Of the parameters.
        **options: loss, and that loss's keyword arguments but for voxel_weight; see `linear_tversky_loss`.

    Examples:
        >>> head = tk.TverskyHead(32, 118, alpha=0.3, beta=0.7)
        >>> head(features, label).backward()  # in training
        >>> logits = head(features)  # in inference
    """

    _function = staticmethod(functional.linear_tversky_loss)
    _takes = (functional.linear_tversky_loss, functional.tversky_ce_loss)
    _fixed = frozenset({"features", "weight", "bias"})

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        bias: bool = True,
        dimensions: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        convolutions = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}
        if dimensions not in convolutions:
            raise ValueError(f"dimensions: expected 1, 2 or 3, got {dimensions!r}")
        layer = convolutions[dimensions](in_channels, classes, 1, bias=bias, device=device, dtype=dtype)
        self.weight, self.bias = layer.weight, layer.bias
        self._convolution = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[dimensions]

    def forward(  # type: ignore[override] # of features
        self,
        features,
        target: torch.Tensor | None = None,
        voxel_weight: torch.Tensor | None = None,
        **of_call: Any,
    ):
        """The loss of features (N, in_channels, *spatial) and a target; without a target, the logits. regions and
        annotated as in `tversky_loss`."""
        if target is None:
            return self._convolution(features, self.weight, self.bias)
        options = self._options_of(of_call)
        return self._function(features, self.weight, self.bias, target, voxel_weight=voxel_weight, **options)

    def extra_repr(self) -> str:
        """The layer, then the options of the loss."""
        classes, in_channels = self.weight.shape[:2]
        options = super().extra_repr()
        return f"{in_channels}, {classes}, bias={self.bias is not None}" + (f", {options}" if options else "")
