"""The functions that users call: they check the arguments, choose a backend and run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import _arguments, _backends, autograd, reference
from ._layout import walkable
from .distributed import sum_over_group

__all__ = [
    "OverlapCounts",
    "deep_supervision_loss",
    "dice_loss",
    "focal_tversky_loss",
    "generalized_dice_loss",
    "jaccard_loss",
    "linear_tversky_loss",
    "overlap_counts",
    "tversky_ce_loss",
    "tversky_loss",
]


#: How a loss is run.
RUN_DEFAULTS = {"check_target": None, "inplace_backward": False, "process_group": None, "backend": "auto"}


class OverlapCounts(NamedTuple):
    """True positives, false positives and false negatives: (N, C) each."""

    tp: torch.Tensor
    fp: torch.Tensor
    fn: torch.Tensor


def _on_backend(logits, checked, function, how, check_target, inplace_backward, backend):
    # function(chosen backend, check, logits, checked, inplace_backward, *how), or None: the reference is to compute it.
    volumes, plan, _ = checked
    if not isinstance(inplace_backward, bool):
        raise TypeError(f"inplace_backward: expected True or False, got {inplace_backward!r}")
    differentiable_target = volumes.target.requires_grad and torch.is_grad_enabled()
    unsupported = "the gradient of a target" if differentiable_target else None
    triton_first = _backends.faster_by_triton(logits, plan.options, volumes.dense)
    chosen = _backends.choose(backend, logits.device, unsupported, triton_first, _backends.beyond_cuda(logits))
    if chosen == "reference":
        return None
    compiling = torch.compiler.is_compiling()
    check = logits.is_cpu if check_target is None else check_target
    if check and chosen != "cpu" and not compiling:  # the CPU kernels check while they read
        _arguments.raise_for_bad_values(logits, volumes, plan.options.ignore_index)
    if compiling:
        return function(chosen, check, logits, checked, inplace_backward, *how)
    # What cannot be walked is copied here, once for both passes.
    walked, target, voxel_weight, dense = logits, *volumes
    if not (logits.is_contiguous() and target.is_contiguous() and voxel_weight is None):
        spatial = 2 if dense else 1
        walked = walkable(logits, 2)
        if target.shape[spatial:] == logits.shape[2:]:
            target = walkable(target, spatial)
            voxel_weight = None if voxel_weight is None else walkable(voxel_weight, 1)
        checked = checked._replace(volumes=_arguments.Volumes(target, voxel_weight, dense))
    try:
        return function(chosen, check, walked, checked, inplace_backward, *how)
    except RuntimeError:
        # The kernel found a bad label or weight. Say it as an error of the argument; anything else is passed on.
        _arguments.raise_for_bad_values(logits, volumes, plan.options.ignore_index)
        raise


def _apply_loss(chosen, check, logits, checked, inplace_backward, process_group):
    (target, voxel_weight, _), plan, class_parameters = checked
    volumes = (logits, target, voxel_weight, class_parameters)
    return autograd.apply(autograd.TverskyLoss, *volumes, plan, check, inplace_backward, process_group, chosen)[0]


def _loss(logits, checked, check_target, inplace_backward, process_group, backend):
    loss = _on_backend(logits, checked, _apply_loss, (process_group,), check_target, inplace_backward, backend)
    return reference.checked_loss(logits, checked, process_group, check_target) if loss is None else loss


def _apply_linear(chosen, check, logits, checked, inplace_backward, head, process_group):
    (target, voxel_weight, _), plan, class_parameters = checked
    features, weight, bias = head
    if not torch.compiler.is_compiling():
        features = walkable(features, 2)
    volumes = (features, weight, bias, target, voxel_weight, class_parameters)
    how = (plan, check, inplace_backward, process_group, chosen)
    return autograd.apply(autograd.LinearTverskyLoss, *volumes, *how)[0]


def _apply_counts(chosen, check, logits, checked, inplace_backward):
    (target, voxel_weight, _), plan, _ = checked
    volumes = (logits, target, voxel_weight)
    return autograd.apply(autograd.OverlapCounts, *volumes, plan, check, inplace_backward, chosen)


def tversky_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    alpha=0.3,
    beta=0.7,
    gamma: float = 1.0,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    activation: str = "softmax",
    class_weight=None,
    include_background: bool = True,
    ignore_index: int | None = None,
    voxel_weight: torch.Tensor | None = None,
    batch: bool = False,
    absent: str = "keep",
    soft_label: bool = False,
    squared: bool = False,
    reduction: str = "mean",
    process_group=None,
    inplace_backward: bool = False,
    check_target: bool | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Tversky loss of a softmax, fused: nothing of the volume's size is made but the gradient.

    Per sample n and class c, over the voxels that count, with p = softmax(logits) and g the target::

        TP = sum p g      FP = sum p (1 - g)      FN = sum (1 - p) g
        loss[n, c] = class_weight[c] * (1 - (TP + smooth_nr) / (TP + alpha FP + beta FN + smooth_dr)) ** gamma

    (Salehi, Erdogmus, Gholipour 2017, arXiv:1706.05721, eq. 3; gamma: Abraham and Khan 2018, arXiv:1810.07842, whose
    4/3 is gamma = 0.75 here.) alpha = beta = 0.5 is the Dice loss, alpha = beta = 1 the Jaccard or Tanimoto loss.

    Args:
        logits: (N, C, *spatial), any number of spatial dimensions; float16, bfloat16, float32 or float64. Contiguous
            and channels_last(_3d) tensors, and slices of the classes or the batch, are read where they are; other
            layouts are copied once.
        target: Class indices (N, *spatial) or (N, 1, *spatial) of bool, uint8, int8, int16, int32 or int64, read in
            their own type; or a dense target (N, C, *spatial), one-hot or soft, of one of these or of a floating type.
            A dense target that requires a gradient takes the reference path, which gives it one.
        alpha: Weight of the false positives, >= 0: a number, or one a class (a list, tensor or array).
        beta: Weight of the false negatives, >= 0: a number, or one a class.
        gamma: Exponent, > 0. Where 1 - TI is 0 and gamma < 1 the gradient is 0, not infinite.
        smooth_nr: Added to the numerator, >= 0.
        smooth_dr: Added to the denominator, >= 0. Where the denominator is still 0, the loss is 0.
        activation: "softmax"; "sigmoid", every channel by itself (C = 1 with labels {0, 1} is the binary case);
            "none", for logits that are probabilities already.
        class_weight: One factor a class, >= 0. It multiplies and is not renormalised.
        include_background: False leaves channel 0 out of the result (without effect at C = 1).
        ignore_index: Voxels with this label count nowhere, and their gradient is exactly 0. Any integer. In a dense
            target these are the voxels that hold it in every channel.
        voxel_weight: (N, *spatial) or (N, 1, *spatial), bool, uint8 or floating, >= 0: multiplies the voxel's part in
            all sums.
        batch: True sums the counts over the batch first, and gives one index a class.
        absent: What becomes of a class that the target lacks, in that sample or in the batch: "keep" it as the formula
            says, "zero" its loss, or "skip" it in the mean.
        soft_label: True measures a soft target by its L1 distance (Wang et al. 2023, arXiv:2303.16296).
        squared: True measures errors by their squares, FP + FN = sum (p - g)^2: with alpha = beta = 0.5 that is V-Net's
            Dice loss, 1 - 2 sum p g / (sum p^2 + sum g^2) (Milletari et al. 2016, arXiv:1606.04797). alpha and beta
            are then one number.
        reduction: "mean", "sum", or "none": (N, C'), or (C') with ``batch``, where C' is C without the background if
            that is left out.
        process_group: A `torch.distributed` group whose ranks hold parts of one batch (``batch=True``) or of one
            volume: the counts are summed over it. The gradient is that of this rank's part.
        inplace_backward: True writes the gradient over the logits, which are lost: no memory of their size is needed.
            Whoever uses them afterwards gets autograd's error. Without effect under torch.compile, with
            create_graph=True, and for logits that are not dense.
        check_target: None: a label outside [0, C) raises on the CPU and makes the loss NaN elsewhere, where reading it
            would stall the device. True: always raise. False: never raise; the loss is NaN.
        backend: "auto", or "cpu", "cuda", "triton", "reference". One that is named never falls back.

    Returns:
        The loss in float32, or float64 for float64 logits. Its gradient has the logits' dtype and layout. The same
        input gives the same bits, for any number of threads.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: A wrong shape, device, range or option, a label outside [0, C), or a backend that is not available.

    Second derivatives work and are computed by the reference.

    Example:
        >>> loss = tk.tversky_loss(model(image), label, alpha=0.3, beta=0.7)
        >>> loss.backward()
    """
    checked = _arguments.check_arguments(
        logits,
        target,
        voxel_weight,
        alpha=alpha,
        beta=beta,
        class_weight=class_weight,
        gamma=gamma,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        activation=activation,
        include_background=include_background,
        ignore_index=ignore_index,
        batch=batch,
        absent=absent,
        soft_label=soft_label,
        squared=squared,
        reduction=reduction,
        check_target=check_target,
    )
    return _loss(logits, checked, check_target, inplace_backward, process_group, backend)


def tversky_ce_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    tversky_weight: float = 1.0,
    ce_weight: float = 1.0,
    ce_class_weight=None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    alpha=0.3,
    beta=0.7,
    gamma: float = 1.0,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    activation: str = "softmax",
    class_weight=None,
    include_background: bool = True,
    ignore_index: int | None = None,
    voxel_weight: torch.Tensor | None = None,
    batch: bool = False,
    absent: str = "keep",
    soft_label: bool = False,
    squared: bool = False,
    reduction: str = "mean",
    process_group=None,
    inplace_backward: bool = False,
    check_target: bool | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Tversky loss plus cross-entropy, in the same two passes over the volume.

    ``tversky_weight * tversky_loss(...) + ce_weight * CE`` with, over the voxels that count, each with its weight w,
    class weights b, q = (1 - label_smoothing) g + label_smoothing / K, and f = focal_gamma::

        softmax (K = C)    CE = sum w sum_c b_c q_c (1 - p_c)^f (-log p_c)
        sigmoid (K = 2)    CE = sum w sum_c b_c (q_c (1 - p_c)^f (-log p_c) + (1 - q_c) p_c^f (-log(1 - p_c)))

    Its mean is torch's: for class indices it is divided by sum w b_label, as `torch.nn.functional.cross_entropy` does;
    for a dense target by sum w; with a sigmoid by C sum w, as `binary_cross_entropy_with_logits` does. alpha = beta =
    0.5 is the Dice + CE of MONAI and nnU-Net. Log-probabilities are exact at logits of any size.

    Args:
        logits: See `tversky_loss`, as for all arguments that are not named here.
        target: Class indices or a dense target, for both parts.
        tversky_weight: Factor of the Tversky part, >= 0.
        ce_weight: Factor of the cross-entropy, >= 0.
        ce_class_weight: Class weights b of the cross-entropy, >= 0; `class_weight` is the Tversky part's.
        label_smoothing: In [0, 1]; of the cross-entropy alone.
        focal_gamma: Focal exponent of the cross-entropy, >= 0 (Lin et al. 2017, arXiv:1708.02002).
        ignore_index: For both parts, as voxel_weight.
        include_background: Of the Tversky part alone, as alpha to absent.
        reduction: "mean", the sum of both parts' means; "sum"; or "none": the Tversky part (N, C') or, with ``batch``,
            (C'), to each of which the mean cross-entropy of its sample, or of the batch, is added.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: As `tversky_loss`; also activation="none", from which no cross-entropy is made.

    Example:
        >>> loss = tk.tversky_ce_loss(model(image), label, alpha=0.5, beta=0.5, batch=True, include_background=False)
    """
    checked = _arguments.check_arguments(
        logits,
        target,
        voxel_weight,
        tversky_weight=tversky_weight,
        ce_weight=ce_weight,
        ce_class_weight=ce_class_weight,
        label_smoothing=label_smoothing,
        focal_gamma=focal_gamma,
        alpha=alpha,
        beta=beta,
        class_weight=class_weight,
        gamma=gamma,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        activation=activation,
        include_background=include_background,
        ignore_index=ignore_index,
        batch=batch,
        absent=absent,
        soft_label=soft_label,
        squared=squared,
        reduction=reduction,
        check_target=check_target,
    )
    return _loss(logits, checked, check_target, inplace_backward, process_group, backend)


def overlap_counts(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    activation: str = "softmax",
    ignore_index: int | None = None,
    voxel_weight: torch.Tensor | None = None,
    soft_label: bool = False,
    process_group=None,
    inplace_backward: bool = False,
    check_target: bool | None = None,
    backend: str = "auto",
) -> OverlapCounts:
    """The sums that every overlap loss is made of, differentiable: build your own loss from them in a few lines.

    Per sample and class, over the voxels that count: tp = sum p g, fp = sum p (1 - g), fn = sum (1 - p) g. So sum p is
    tp + fp, and sum g is tp + fn. The arguments are those of `tversky_loss`. What you compute from the counts is
    small; the passes over the volume, forward and backward, are fused as they are there. With process_group each rank
    holds a part of the same samples' volumes, and gets the counts of the whole.

    Returns:
        OverlapCounts(tp, fp, fn), each (N, C) in float32, or float64 for float64 logits.

    Example:
        >>> tp, fp, fn = tk.overlap_counts(model(image), label)
        >>> dice = 2 * tp / (2 * tp + fp + fn)
        >>> dice.cosh().log().mean().backward()
    """
    checked = _arguments.check_arguments(
        logits,
        target,
        voxel_weight,
        activation=activation,
        ignore_index=ignore_index,
        soft_label=soft_label,
        check_target=check_target,
    )
    counts = _on_backend(logits, checked, _apply_counts, (), check_target, inplace_backward, backend)
    if counts is None:
        counts = reference.checked_counts(logits, checked, check_target)
    if process_group is not None:
        counts = sum_over_group(counts, process_group)
    return OverlapCounts(*counts.unbind(-1))


GENERALIZED_WEIGHTS = ("square", "simple", "uniform")


def generalized_dice_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: str = "square",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    include_background: bool = True,
    batch: bool = False,
    reduction: str = "mean",
    **options,
) -> torch.Tensor:
    """Generalised Dice loss (Sudre et al. 2017, arXiv:1707.03237): all classes in one quotient.

    ``1 - (2 sum_c w_c TP_c + smooth_nr) / (sum_c w_c (P_c + G_c) + smooth_dr)`` for P = TP + FP and G = TP + FN.

    Args:
        logits: See `tversky_loss`.
        target: See `tversky_loss`.
        weight: w_c: "square" 1 / G_c^2, "simple" 1 / G_c, or "uniform" 1. A class that the target lacks gets the
            largest weight that any other has.
        smooth_nr: Added to the numerator, >= 0.
        smooth_dr: Added to the denominator, >= 0. Where the denominator is still 0, the loss is 0.
        include_background: False leaves channel 0 out (without effect at C = 1).
        batch: True sums the counts over the batch first.
        reduction: "mean" or "sum" over the samples, or "none": (N), or (1) with ``batch``.
        **options: The other arguments of `overlap_counts`.
    """
    _arguments.one_of("weight", weight, GENERALIZED_WEIGHTS)
    _arguments.one_of("reduction", reduction, ("mean", "sum", "none"))
    smooth_nr, smooth_dr = _arguments.number("smooth_nr", smooth_nr), _arguments.number("smooth_dr", smooth_dr)
    counts = overlap_counts(logits, target, **options)
    if _arguments.flag("batch", batch):
        counts = [x.sum(0, keepdim=True) for x in counts]
    if not _arguments.flag("include_background", include_background) and logits.size(1) > 1:
        counts = [x[:, 1:] for x in counts]
    tp, fp, fn = counts
    volume = (tp + fn).detach()
    w = 1 / volume ** {"square": 2, "simple": 1, "uniform": 0}[weight]
    infinite = torch.isinf(w)
    w = torch.where(infinite, 0.0, w)
    w = torch.where(infinite, w.amax(1, keepdim=True), w)
    # 1 - Dice without cancellation: the numerator is what the denominator has more.
    error = (w * (fp + fn)).sum(1) + (smooth_dr - smooth_nr)
    denominator = (w * (2 * tp + fp + fn)).sum(1) + smooth_dr
    some = denominator != 0
    loss = torch.where(some, error, 0.0 * error) / torch.where(some, denominator, 1.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" or loss.numel() == 0 else loss.mean()


def _split_options(function: str, loss: str, options: dict) -> tuple[dict, dict]:
    # The arguments of a loss that a function calls by its name, completed: what it is, and how it is run.
    _arguments.one_of("loss", loss, _arguments.LOSSES)
    defaults = {**_arguments.TVERSKY_DEFAULTS, **(_arguments.CE_DEFAULTS if loss == "tversky_ce" else {})}
    all_options = _arguments.with_defaults(f"{function} with loss={loss!r}", {**defaults, **RUN_DEFAULTS}, options)
    return {name: all_options[name] for name in defaults}, {name: all_options[name] for name in RUN_DEFAULTS}


def deep_supervision_loss(
    logits: Sequence[torch.Tensor],
    target: torch.Tensor,
    weights: Sequence[float] | None = None,
    *,
    loss: str = "tversky",
    **options,
) -> torch.Tensor:
    """The weighted sum of a loss over the outputs of several resolutions, all against one full-resolution target.

    No resampled target is made: each voxel of a coarser output reads its label, and its voxel_weight, where
    `torch.nn.functional.interpolate(mode="nearest")` would take them, for any ratio of the sizes.

    Args:
        logits: One (N, C, *spatial) tensor a level, of 1 to 3 spatial dimensions, the finest first.
        target: Class indices (N, *any) or (N, 1, *any), or dense (N, C, *any), see `tversky_loss`.
        weights: One factor a level, >= 0; None: 1, 1/2, 1/4, ... divided by their sum. (nnU-Net's trainer sets the
            last of these to 0.) A level of weight 0 is not computed.
        loss: "tversky", for `tversky_loss`, or "tversky_ce", for `tversky_ce_loss`.
        **options: The arguments of that loss. voxel_weight has the target's spatial sizes.

    Example:
        >>> full, half, quarter = model(image)
        >>> loss = tk.deep_supervision_loss([full, half, quarter], label, batch=True)
    """
    if isinstance(logits, torch.Tensor) or not isinstance(logits, Sequence):
        raise TypeError(f"logits: expected a list of tensors, one a level, got {type(logits).__name__}")
    if len(logits) == 0:
        raise ValueError("logits: expected at least one level, got none")
    if weights is None:
        weights = [0.5**i for i in range(len(logits))]
        weights = [w / sum(weights) for w in weights]
    if len(weights) != len(logits):
        raise ValueError(f"weights: expected {len(logits)} numbers, one a level, got {len(weights)}")
    weights = [_arguments.number(f"weights[{i}]", w) for i, w in enumerate(weights)]
    options, run = _split_options("deep_supervision_loss", loss, options)
    total = None
    for level, w in zip(logits, weights, strict=True):
        checked = _arguments.check_arguments(
            level, target, check_target=run["check_target"], any_resolution=True, **options
        )
        if w > 0:
            part = w * _loss(level, checked, **run)
            total = part if total is None else total + part
    return sum(0.0 * level.sum() for level in logits) if total is None else total


def linear_tversky_loss(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    loss: str = "tversky",
    **options,
) -> torch.Tensor:
    """A loss together with the network's last layer, a 1x1x1 convolution: the logits never exist as a tensor.

    It is ``tversky_loss(conv(features), target)`` for the logits ``weight @ features + bias``, which are made a block
    of voxels at a time, once forward and once more backward. With many classes they, and their gradient, are what
    takes the most memory of a training step: here neither is allocated.

    Args:
        features: (N, K, *spatial), the input of the last layer; float16, bfloat16, float32 or float64. Under autocast
            it is converted as a convolution's input would be, and so are weight and bias.
        weight: (C, K), or (C, K, 1, 1, 1) as a convolution has it, of the features' dtype.
        bias: (C), or None.
        target: See `tversky_loss`.
        loss: "tversky", for `tversky_loss`, or "tversky_ce", for `tversky_ce_loss`.
        **options: The arguments of that loss. inplace_backward writes the gradient of the features over them: only
            where the layer that made them does not need them for its own gradient (else autograd's error says so).

    Returns:
        The loss in float32, or float64 for float64 features, differentiable with respect to features, weight and bias
        any number of times. The same input gives the same bits where torch's matrix product does.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: As `tversky_loss`.

    Example:
        >>> head = torch.nn.Conv3d(32, 118, 1)
        >>> loss = tk.linear_tversky_loss(body(image), head.weight, head.bias, label)
    """
    options, run = _split_options("linear_tversky_loss", loss, options)
    head = features, weight, _ = _arguments.check_head(features, weight, bias)
    # Stands for the logits wherever their shape, type and device are asked for, and has one element.
    logits = features.new_empty(()).expand(features.size(0), weight.size(0), *features.shape[2:])
    checked = _arguments.check_arguments(logits, target, check_target=run["check_target"], **options)
    check_target, inplace_backward, process_group, backend = run.values()
    how = (head, process_group)
    result = _on_backend(logits, checked, _apply_linear, how, check_target, inplace_backward, backend)
    if result is None:
        return reference.checked_loss(reference.linear_logits(*head), checked, process_group, check_target)
    return result


def dice_loss(logits: torch.Tensor, target: torch.Tensor, **options) -> torch.Tensor:
    """Dice loss: `tversky_loss` with alpha = beta = 0.5; takes its other arguments.

    With smoothing s it equals a Dice loss (2 TP + 2 s) / (2 TP + FP + FN + 2 s).
    """
    return tversky_loss(logits, target, alpha=0.5, beta=0.5, **options)


def jaccard_loss(logits: torch.Tensor, target: torch.Tensor, **options) -> torch.Tensor:
    """Jaccard (IoU, Tanimoto) loss: `tversky_loss` with alpha = beta = 1; takes its other arguments."""
    return tversky_loss(logits, target, alpha=1.0, beta=1.0, **options)


def focal_tversky_loss(logits: torch.Tensor, target: torch.Tensor, *, gamma: float = 0.75, **options) -> torch.Tensor:
    """Focal Tversky loss (Abraham and Khan 2018, arXiv:1810.07842): `tversky_loss` with gamma = 0.75.

    The paper writes (1 - TI)^(1/γ) with γ = 4/3: gamma here is that exponent, 1/γ.
    """
    return tversky_loss(logits, target, gamma=gamma, **options)
