r"""The definition of the loss in plain PyTorch: what is right, and what to fall back to.

With the probabilities p = softmax(z) or sigmoid(z) and the target g, one-hot or soft, per sample n and class c over the
voxels v that count, each with its weight w (1 where none is given):

    TP = sum_v w p g          FP = sum_v w p (1 - g)          FN = sum_v w (1 - p) g
    TI = (TP + smooth_nr) / (TP + alpha FP + beta FN + smooth_dr)
    loss[n, c] = class_weight[c] (1 - TI)^gamma

TI is eq. 3 of Salehi, Erdogmus, Gholipour, *Tversky loss function for image segmentation using 3D fully convolutional
deep networks*, MLMI 2017, arXiv:1706.05721: alpha weighs false positives, beta false negatives; the smoothing, the
average over classes and gamma (Abraham and Khan, arXiv:1810.07842) came later. With ``soft_label`` TP is
(P + G - sum_v w |p - g|) / 2 for P = sum_v w p and G = sum_v w g, FP = P - TP and FN = G - TP (Wang et al.,
arXiv:2303.16296), which for a one-hot g is the same and for a soft g is least at p = g.

Nothing here is fused, and every product is a tensor. Half precision is computed in float32, float64 in float64.
"""

from __future__ import annotations

import torch

from . import _arguments
from ._arguments import Options, Volumes
from .distributed import sum_over_group

__all__ = ["tversky_loss"]


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
    reduction: str = "mean",
    process_group=None,
    check_target: bool | None = None,
) -> torch.Tensor:
    """The same arguments, result and errors as `tversky_kernels.tversky_loss`, differentiable any number of times."""
    volumes, options, class_parameters = _arguments.check_arguments(
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
        reduction=reduction,
        check_target=check_target,
    )
    return checked_loss(logits, volumes, options, class_parameters, process_group, check_target)


def checked_loss(
    logits: torch.Tensor,
    volumes: Volumes,
    options: Options,
    class_parameters: torch.Tensor | None = None,
    process_group=None,
    check_target: bool | None = None,
) -> torch.Tensor:
    """The loss of arguments that have been checked, but for the labels' range."""
    check = logits.device.type == "cpu" if check_target is None else check_target
    if check and not torch.compiler.is_compiling():
        _arguments.raise_for_bad_values(logits, volumes, options.ignore_index)
    tp, fp, fn = overlap_counts(logits, volumes, options)
    if options.batch:
        tp, fp, fn = (x.sum(0, keepdim=True) for x in (tp, fp, fn))
    if process_group is not None:
        tp, fp, fn = sum_over_group(torch.stack((tp, fp, fn)), process_group)
    return loss_of_counts(tp, fp, fn, options, class_parameters)


def overlap_counts(
    logits: torch.Tensor, volumes: Volumes, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """TP, FP and FN, each (N, C). NaN where a label or voxel weight is out of range."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    target, weight, dense = volumes
    if dense:
        g = target.to(z.dtype)
        counts = torch.ones_like(z[:, 0], dtype=torch.bool)
        bad = torch.zeros((), dtype=torch.bool, device=z.device)
        if options.ignore_index is not None:
            # A dense target has no label to ignore but in a voxel that is filled with it.
            counts = ~(target == options.ignore_index).all(1)
    else:
        label = target.long()
        labels = _arguments.label_count(logits)
        known = (label >= 0) & (label < labels)
        ignored = torch.zeros_like(known) if options.ignore_index is None else label == options.ignore_index
        bad = (~known & ~ignored).any()
        counts = known & ~ignored
        g = torch.nn.functional.one_hot(label.clamp(0, labels - 1), labels).movedim(-1, 1)[:, labels - z.size(1) :]
        g = g.to(z.dtype)
    w = counts.to(z.dtype)
    if weight is not None:
        bad = bad | ~(weight >= 0).all() if weight.dtype.is_floating_point else bad
        counts = counts & (weight != 0)
        w = w * weight.to(z.dtype)
    # What does not count is replaced, not multiplied by 0: a NaN there must not count either.
    w, counts = w.unsqueeze(1), counts.unsqueeze(1)
    z = torch.where(counts, z, torch.zeros_like(z))
    g = torch.where(counts, g, torch.zeros_like(g))
    w = torch.where(counts, w, torch.zeros_like(w))
    p = {"softmax": lambda: z.softmax(1), "sigmoid": z.sigmoid, "none": lambda: z}[options.activation]()
    p, g, w = (x.flatten(2) if x.dim() > 2 else x.unsqueeze(2) for x in (p, g, w))
    if options.soft_label:
        predicted, wanted = (w * p).sum(-1), (w * g).sum(-1)
        tp = (predicted + wanted - (w * (p - g).abs()).sum(-1)) / 2
        fp, fn = predicted - tp, wanted - tp
    else:
        tp, fp, fn = (w * p * g).sum(-1), (w * p * (1 - g)).sum(-1), (w * (1 - p) * g).sum(-1)
    poison = torch.where(bad, torch.nan, 0.0).to(z.dtype)
    return tp + poison, fp + poison, fn + poison


def loss_of_counts(
    tp: torch.Tensor,
    fp: torch.Tensor,
    fn: torch.Tensor,
    options: Options,
    class_parameters: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reduced loss of (rows, C) counts; rows is N, or 1 where the batch was summed."""
    alpha, beta, class_weight = options.alpha, options.beta, None
    if class_parameters is not None:
        alpha, beta, class_weight = class_parameters.to(tp.dtype)
    is_absent = tp + fn == 0
    error = alpha * fp + beta * fn + (options.smooth_dr - options.smooth_nr)
    denominator = tp + alpha * fp + beta * fn + options.smooth_dr
    # Nothing predicted, nothing there and no smoothing: nothing is wrong.
    empty = denominator == 0
    one_minus_ti = torch.where(empty, 0.0, error) / torch.where(empty, 1.0, denominator)
    if options.gamma != 1:
        # At 0 the power's slope is taken as 0, also where it is infinite (gamma < 1).
        positive = ~(one_minus_ti <= 0)
        one_minus_ti = torch.where(positive, torch.where(positive, one_minus_ti, 1.0) ** options.gamma, 0.0)
    loss = one_minus_ti if class_weight is None else class_weight * one_minus_ti
    if options.absent != "keep":
        loss = torch.where(is_absent, 0.0, loss)
    if not options.include_background and loss.size(1) > 1:
        loss, is_absent = loss[:, 1:], is_absent[:, 1:]
    if options.reduction == "none":
        return loss.squeeze(0) if options.batch else loss
    total = loss.sum()
    if options.reduction == "sum":
        return total
    averaged = (~is_absent).sum() if options.absent == "skip" else loss.numel()
    if isinstance(averaged, torch.Tensor):
        return torch.where(averaged > 0, total / averaged.clamp(min=1), 0.0 * total)
    return total / averaged if averaged else total
