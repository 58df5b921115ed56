"""nnU-Net v2's Dice losses and compounds by their names, and trainers that use these kernels.

The trainers need nnunetv2 and are made when they are asked for, see `nnunet_trainers`. nnU-Net finds them in a folder
that its variable nnUNet_extTrainer names; ``python -m tversky_kernels.compat.nnunet --install DIR`` writes what has to
be there, ``--list`` names them.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
from collections.abc import Callable, Sequence

import torch

from .. import functional
from .._arguments import compute_dtype
from .._options import number
from ._attributes import attributes_of
from ._targets import as_dense, as_indices

__all__ = ["DC_and_BCE_loss", "DC_and_CE_loss", "LevelsLoss", "MemoryEfficientSoftDiceLoss", "SoftDiceLoss"]

LEAST_DENOMINATOR = 1e-8


class _SumOverRanks(torch.autograd.Function):
    # As nnU-Net gathers: the gradient is summed over the ranks too, for DDP will average it.
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
        return grad


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _activation(nonlinearity) -> str | None:
    # Which activation of the kernels a function is; None: another one.
    if nonlinearity is None:
        return "none"
    if nonlinearity in (torch.sigmoid, torch.nn.functional.sigmoid) or isinstance(nonlinearity, torch.nn.Sigmoid):
        return "sigmoid"
    is_softmax = isinstance(nonlinearity, torch.nn.Softmax) and nonlinearity.dim == 1
    if is_softmax or getattr(nonlinearity, "__name__", "") == "softmax_helper_dim1":
        return "softmax"
    return None


class MemoryEfficientSoftDiceLoss(torch.nn.Module):
    """nnU-Net's Dice loss, -Dice: between -1 and 0.

    Args:
        apply_nonlin: nnU-Net's ``softmax_helper_dim1``, `torch.nn.Softmax` (1) or `torch.sigmoid` are fused; None: the
            input holds probabilities; another callable is applied before.
        batch_dice: Sum over the batch (and, with ``ddp``, over the ranks) first.
        do_bg: False leaves channel 0 out.
        smooth: Added to numerator and denominator.
        ddp: Where torch.distributed is initialised and batch_dice is set, sum over its ranks.
        inplace_backward: As in `tversky_kernels.tversky_loss`.
        backend: As in `tversky_kernels.tversky_loss`.
    """

    def __init__(
        self,
        apply_nonlin: Callable | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.apply_nonlin, self.batch_dice, self.do_bg, self.ddp = apply_nonlin, batch_dice, do_bg, ddp
        self.smooth = number("smooth", smooth)
        self.inplace_backward, self.backend = inplace_backward, backend
        self.clip_tp: float | None = None

    def forward(self, x: torch.Tensor, y: torch.Tensor, loss_mask: torch.Tensor | None = None) -> torch.Tensor:
        """-Dice of (B, C, *spatial) and labels (B, *spatial), (B, 1, *spatial), or a one-hot target."""
        activation = _activation(self.apply_nonlin)
        if activation is None:
            x, activation = self.apply_nonlin(x), "none"  # type: ignore[misc] # None has an activation
        target, options = _target(x, y), {"activation": activation}
        how = (_check_of(x, target), self.inplace_backward, None, self.backend)
        counts = functional.exact_counts(x, target, _mask(loss_mask), options, *how)
        return self.of_counts(counts.movedim(-1, 0)).to(compute_dtype(x))

    def of_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """-Dice from (3, B, C) tp, fp and fn."""
        if not self.do_bg:
            counts = counts[:, :, 1:]
        if self.batch_dice:
            counts = counts.sum(1, keepdim=True)
            if self.ddp and _is_distributed():
                counts = _SumOverRanks.apply(counts)
        tp, fp, fn = counts
        tp = tp if self.clip_tp is None else tp.clamp_min(self.clip_tp)
        return -((2 * tp + self.smooth) / (2 * tp + fp + fn + self.smooth).clamp_min(LEAST_DENOMINATOR)).mean()


class SoftDiceLoss(MemoryEfficientSoftDiceLoss):
    """nnU-Net's Dice loss with its bound on tp.

    Args:
        apply_nonlin: As in `MemoryEfficientSoftDiceLoss`, as all that is not named here.
        batch_dice: Sum over the batch first.
        do_bg: False leaves channel 0 out.
        smooth: Added to numerator and denominator.
        ddp: Sum over the ranks.
        clip_tp: The least tp; None: none.
        inplace_backward: As in `tversky_kernels.tversky_loss`.
        backend: As in `tversky_kernels.tversky_loss`.
    """

    def __init__(
        self,
        apply_nonlin: Callable | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
        clip_tp: float | None = None,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            apply_nonlin, batch_dice, do_bg, smooth, ddp, inplace_backward=inplace_backward, backend=backend
        )
        self.clip_tp = None if clip_tp is None else float(clip_tp)


def _target(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return as_dense(y) if y.shape == x.shape else as_indices(y)


def _check_of(x: torch.Tensor, target: torch.Tensor) -> bool | None:
    # check_target: as there, a dense target may hold anything.
    return False if target.shape == x.shape else None


def _mask(loss_mask: torch.Tensor | None) -> torch.Tensor | None:
    if loss_mask is None or loss_mask.dtype == torch.bool or loss_mask.is_floating_point():
        return loss_mask
    return loss_mask.bool()


@attributes_of("dc", "inplace_backward", "backend")
class _Compound(torch.nn.Module):
    """Dice and a cross-entropy of the same activation: one loss where their sums are this rank's alone."""

    def __init__(self, activation, dice_kwargs, weight_ce, weight_dice, run):
        super().__init__()
        self.activation = activation
        self.weight_ce, self.weight_dice = number("weight_ce", weight_ce), number("weight_dice", weight_dice)
        nonlinearity = torch.nn.Softmax(1) if activation == "softmax" else torch.sigmoid
        self.dc = MemoryEfficientSoftDiceLoss(nonlinearity, **dice_kwargs, **run)

    def _loss(self, net_output, target, options, ce_factor=1.0):
        dc = self.dc
        options = {**options, "activation": self.activation, "ce_weight": ce_factor * self.weight_ce}
        options["check_target"] = _check_of(net_output, target)
        fused = dc.smooth >= LEAST_DENOMINATOR and not (dc.batch_dice and dc.ddp and _is_distributed())
        if fused:
            # 1 - Dice as a Tversky loss, with half of nnU-Net's smoothing.
            loss = functional.tversky_ce_loss(
                net_output, target, alpha=0.5, beta=0.5, smooth_nr=dc.smooth / 2, smooth_dr=dc.smooth / 2,
                include_background=dc.do_bg, batch=dc.batch_dice, tversky_weight=self.weight_dice, **options,
                inplace_backward=self.inplace_backward, backend=self.backend,
            )  # fmt: skip
            return loss - self.weight_dice
        # The first of two losses must not overwrite what the second reads.
        mask = {name: options.pop(name) for name in ("ignore_index", "voxel_weight") if name in options}
        ce = functional.tversky_ce_loss(net_output, target, tversky_weight=0.0, **mask, **options, backend=dc.backend)
        voxel_weight, of_counts = mask.pop("voxel_weight", None), {"activation": self.activation, **mask}
        how = (options["check_target"], False, None, dc.backend)
        counts = functional.exact_counts(net_output, target, voxel_weight, of_counts, *how)
        return ce + self.weight_dice * dc.of_counts(counts.movedim(-1, 0)).to(ce.dtype)


class DC_and_CE_loss(_Compound):
    """nnU-Net's Dice + cross-entropy of a softmax.

    Args:
        soft_dice_kwargs: batch_dice, do_bg, smooth, ddp of `MemoryEfficientSoftDiceLoss`.
        ce_kwargs: weight and label_smoothing of `torch.nn.CrossEntropyLoss`.
        weight_ce: Factor of the cross-entropy.
        weight_dice: Factor of the Dice part.
        ignore_label: Voxels with this label do not count.
        dice_class: As in nnU-Net; the numbers are the same for its classes, so it matters only if it is `SoftDiceLoss`
            and soft_dice_kwargs has a clip_tp.
        inplace_backward: As in `tversky_kernels.tversky_loss`.
        backend: As in `tversky_kernels.tversky_loss`.
    """

    def __init__(
        self,
        soft_dice_kwargs: dict,
        ce_kwargs: dict,
        weight_ce: float = 1,
        weight_dice: float = 1,
        ignore_label: int | None = None,
        dice_class: type | None = None,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        run = {"inplace_backward": inplace_backward, "backend": backend}
        super().__init__("softmax", soft_dice_kwargs, weight_ce, weight_dice, run)
        ce_kwargs = dict(ce_kwargs)
        ce_kwargs.pop("ignore_index", None)  # nnU-Net replaces it by ignore_label
        weight = ce_kwargs.pop("weight", None)
        self.register_buffer("class_weight", None if weight is None else torch.as_tensor(weight))
        self.label_smoothing = number("label_smoothing", ce_kwargs.pop("label_smoothing", 0.0), most=1.0)
        if ce_kwargs:
            raise TypeError(f"ce_kwargs: expected weight and label_smoothing, got {', '.join(map(repr, ce_kwargs))}")
        self.ignore_label = ignore_label

    def forward(self, net_output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (B, C, *spatial) and labels (B, 1, *spatial)."""
        options = {
            "ignore_index": self.ignore_label,
            "ce_class_weight": self.class_weight,
            "label_smoothing": self.label_smoothing,
        }
        return self._loss(net_output, as_indices(target), options)


class DC_and_BCE_loss(_Compound):
    """nnU-Net's Dice + binary cross-entropy of a sigmoid, for regions: a one-hot target of the output's shape.

    Args:
        bce_kwargs: Nothing but its default is fused.
        soft_dice_kwargs: batch_dice, do_bg, smooth, ddp of `MemoryEfficientSoftDiceLoss`.
        weight_ce: Factor of the cross-entropy.
        weight_dice: Factor of the Dice part.
        use_ignore_label: The target has one more channel, 1 where a voxel does not count.
        dice_class: As in nnU-Net; it does not matter.
        inplace_backward: As in `tversky_kernels.tversky_loss`.
        backend: As in `tversky_kernels.tversky_loss`.
    """

    def __init__(
        self,
        bce_kwargs: dict,
        soft_dice_kwargs: dict,
        weight_ce: float = 1,
        weight_dice: float = 1,
        use_ignore_label: bool = False,
        dice_class: type | None = None,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        if bce_kwargs:
            raise TypeError(f"bce_kwargs: expected none, got {', '.join(map(repr, bce_kwargs))}")
        run = {"inplace_backward": inplace_backward, "backend": backend}
        super().__init__("sigmoid", soft_dice_kwargs, weight_ce, weight_dice, run)
        self.use_ignore_label = use_ignore_label

    def forward(self, net_output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (B, C, *spatial) and (B, C, *spatial), or (B, C + 1, *spatial) with ignored voxels."""
        if not self.use_ignore_label:
            return self._loss(net_output, as_dense(target), {})
        counted, regions = target[:, -1] == 0, as_dense(target[:, :-1])
        # With a mask nnU-Net sums over the channels where without it averages.
        return self._loss(net_output, regions, {"voxel_weight": counted}, ce_factor=net_output.size(1))


class LevelsLoss(torch.nn.Module):
    """A Tversky loss, with or without a cross-entropy, of nnU-Net's outputs and targets: of one or of all levels.

    Args:
        options: Of `tversky_kernels.tversky_ce_loss`; ce_weight is 0 unless it is given.
        regions: The targets are regions: dense, for a sigmoid.
        ignore_label: Voxels with this label do not count. Of regions, not None: the target's last channel says which.
        weights: One factor a level, of which those with 0 are not computed; None: the output is one tensor.
        head: The last layer of the first level, a convolution of size 1. While it is in training mode, the first output
            is its input, and the loss is computed together with it (`tversky_kernels.linear_tversky_loss`).
        offset: Is added at every level.
    """

    def __init__(
        self,
        options: dict,
        regions: bool = False,
        ignore_label: int | None = None,
        weights: Sequence[float] | None = None,
        head: torch.nn.Module | None = None,
        offset: float = 0.0,
    ):
        super().__init__()
        self.options = {"ce_weight": 0.0, "activation": "sigmoid" if regions else "softmax", **options}
        self.regions, self.ignore_label, self.offset = regions, ignore_label, offset
        self.weights = None if weights is None else tuple(float(w) for w in weights)
        # Not a part of this module: the network has it.
        self._head = (head,)

    def forward(self, output, target) -> torch.Tensor:
        """The loss of (B, C, *spatial) and (B, 1 or C or C + 1, *spatial), or of lists of these."""
        if self.weights is None:
            return self._level(output, target, self._head[0])
        if not len(output) == len(target) == len(self.weights):
            raise ValueError(
                f"output: expected {len(self.weights)} levels, got {len(output)} and {len(target)} targets"
            )
        levels = enumerate(zip(self.weights, output, target, strict=True))
        return sum(w * self._level(z, t, None if i else self._head[0]) for i, (w, z, t) in levels if w != 0.0)

    def _level(self, output, target, head):
        options = {**self.options, "check_target": False if self.regions else None}
        if not self.regions:
            target, options["ignore_index"] = as_indices(target), self.ignore_label
        elif self.ignore_label is None:
            target = as_dense(target)
        else:
            target, options["voxel_weight"] = as_dense(target[:, :-1]), target[:, -1] == 0
        if head is not None and head.training:
            options["loss"] = "tversky_ce"
            loss = functional.linear_tversky_loss(output, head.weight, head.bias, target, **options)
        else:
            loss = functional.tversky_ce_loss(output, target, **options)
        return loss + self.offset if self.offset else loss


def __getattr__(name: str):
    if not name.startswith("nnUNetTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import nnunet_trainers

    return getattr(nnunet_trainers, name)


#: What nnU-Net imports, looking for a trainer by its name.
_FOUND_BY_NNUNET = '''"""The trainers of tversky_kernels, for nnU-Net, which asks this file for a class by its name."""

from tversky_kernels.compat.nnunet_trainers import __getattr__  # noqa: F401
'''


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the file that nnU-Net looks for, or lists the trainers."""
    parser = argparse.ArgumentParser(prog="python -m tversky_kernels.compat.nnunet", description=main.__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--install", metavar="DIR", type=pathlib.Path, help="the folder that nnUNet_extTrainer names")
    what.add_argument("--list", action="store_true", help="the trainers' names")
    given = parser.parse_args(arguments)
    if given.list:
        from ._trainer_names import FAMILY

        print("\n".join(FAMILY))
        return
    path = given.install / "tversky_kernels_trainers.py"
    if path.exists() and path.read_text() != _FOUND_BY_NNUNET:
        parser.error(f"--install: {path} is there and was not written by this command")
    given.install.mkdir(parents=True, exist_ok=True)
    path.write_text(_FOUND_BY_NNUNET)
    print(f"wrote {path}\nexport nnUNet_extTrainer={given.install.resolve()}")
    print("nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerTverskyKernels   # or another of --list")
    if importlib.util.find_spec("nnunetv2") is None:
        print("nnunetv2 is not installed here: the trainers need it.")


if __name__ == "__main__":
    main()
