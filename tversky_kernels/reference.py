r"""The definition of the loss in plain PyTorch. It says which numbers are right, and computes where no kernel can.

With the probabilities p = softmax(z) or sigmoid(z) and the target g, one-hot or soft, per sample n and class c over the
voxels v that count, each with its weight w (1 where none is given):

    TP = sum_v w p g          FP = sum_v w p (1 - g)          FN = sum_v w (1 - p) g
    TI = (TP + smooth_nr) / (TP + alpha FP + beta FN + smooth_dr)
    loss[n, c] = class_weight[c] (1 - TI)^gamma

TI is eq. 3 of Salehi, Erdogmus, Gholipour, *Tversky loss function for image segmentation using 3D fully convolutional
deep networks*, MLMI 2017, arXiv:1706.05721: alpha weighs false positives, beta false negatives; the smoothing, the
average over classes and gamma (Abraham and Khan, arXiv:1810.07842) came later. With ``soft_label`` TP is
(P + G - sum_v w |p - g|) / 2 for P = sum_v w p and G = sum_v w g, FP = P - TP and FN = G - TP (Wang et al.,
arXiv:2303.16296), which for a one-hot g is the same and for a soft g is least at p = g. With ``squared``, and alpha =
beta, FP is sum_v w (p - g)^2 where p > g and FN the same where p < g: their sum is P + G - 2 TP for P = sum_v w p^2 and
G = sum_v w g^2, as in V-Net's Dice loss (Milletari et al., arXiv:1606.04797).

The cross-entropy of the compound loss, with class weights b, label smoothing s, focal exponent f and
q = (1 - s) g + s / K:

    softmax (K = C)    CE = sum_v w sum_c b_c q_c (1 - p_c)^f (-log p_c)
    sigmoid (K = 2)    CE = sum_v w sum_c b_c [q_c (1 - p_c)^f (-log p_c) + (1 - q_c) p_c^f (-log(1 - p_c))]

Its mean is that of `torch.nn.functional.cross_entropy` (divided by sum_v w b_label for class indices, by sum_v w for a
dense target) or of `binary_cross_entropy_with_logits` (by C sum_v w). f is the exponent of Lin et al.,
arXiv:1708.02002.

Nothing here is fused, and every product is a tensor. Half precision is computed in float32, float64 in float64.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from . import _arguments, _options
from ._arguments import Checked, CheckedRegions, Volumes
from ._options import Options
from ._transforms import VMAP, active_transforms
from .distributed import Ranks, ranks_of

__all__ = ["linear_tversky_loss", "tversky_ce_loss", "tversky_loss"]


class Counts(NamedTuple):
    """Sums over the voxels of each sample, (N, C) each. The last three belong to the cross-entropy (None without it).

    cross_entropy is the sum with q = g and no class weights, smoothing that with q = 1 (sigmoid: with both terms
    whole), voxels the sum of the voxels' weights (the same for every class; for class indices of a softmax with
    ``squared`` that of the label's voxels).
    """

    tp: torch.Tensor
    fp: torch.Tensor
    fn: torch.Tensor
    cross_entropy: torch.Tensor | None = None
    smoothing: torch.Tensor | None = None
    voxels: torch.Tensor | None = None


def tversky_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    process_group=None,
    sample_group=None,
    grad_reduction: str = "mean",
    check_target: bool | None = None,
    **options,
) -> torch.Tensor:
    """The same arguments, result and errors as `tversky_kernels.tversky_loss`, differentiable any number of times.

    It takes neither ``backend`` nor ``inplace_backward``.
    """
    options = _arguments.with_defaults("tversky_loss", _options.TVERSKY_DEFAULTS, options)
    checked = _arguments.check_arguments(logits, target, check_target=check_target, **options)
    return checked_loss(logits, checked, ranks_of(process_group, sample_group, grad_reduction), check_target)


def tversky_ce_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    process_group=None,
    sample_group=None,
    grad_reduction: str = "mean",
    check_target: bool | None = None,
    **options,
) -> torch.Tensor:
    """The same arguments, result and errors as `tversky_kernels.tversky_ce_loss`; see `tversky_loss`."""
    defaults = {**_options.TVERSKY_DEFAULTS, **_options.CE_DEFAULTS}
    options = _arguments.with_defaults("tversky_ce_loss", defaults, options)
    checked = _arguments.check_arguments(logits, target, check_target=check_target, **options)
    return checked_loss(logits, checked, ranks_of(process_group, sample_group, grad_reduction), check_target)


def linear_tversky_loss(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    loss="tversky",
    **options,
) -> torch.Tensor:
    """The same arguments, result and errors as `tversky_kernels.linear_tversky_loss`; see `tversky_loss`."""
    _options.one_of("loss", loss, _options.LOSSES)
    logits = linear_logits(*_arguments.check_head(features, weight, bias))
    return {"tversky": tversky_loss, "tversky_ce": tversky_ce_loss}[loss](logits, target, **options)


def linear_logits(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The logits (N, C, *spatial) of a head: weight (C, K) and bias (C) on the channels of (N, K, *spatial)."""
    return torch.nn.functional.linear(features.movedim(1, -1), weight, bias).movedim(-1, 1)


def checked_loss(
    logits: torch.Tensor, checked: Checked, ranks: Ranks | None = None, check_target: bool | None = None
) -> torch.Tensor:
    """The loss of arguments that have been checked, but for the labels' range."""
    if ranks is not None:
        from . import _joint  # which is made of this module's arithmetic

        _joint.check_ranks(ranks, checked.plan.options)
        part = _joint.Part(lambda: checked_counts(logits, checked, check_target), checked, logits)
        return _joint.losses([part], ranks, check_target)[0]
    checked = checked.of_one_process()
    counts = checked_counts(logits, checked, check_target)
    return reduced(terms_of_table(rows_of(counts, checked), checked), checked.options)


def checked_counts(logits: torch.Tensor, checked: Checked, check_target: bool | None = None) -> torch.Tensor:
    """tp, fp and fn and, with a cross-entropy, its sums: (N, C, 3 or 6), of arguments that have been checked, but for
    the values of the target. With regions (N, R, C, 4 or 7), the last for the number of voxels that count."""
    volumes, options = checked.volumes, checked.plan.options
    check = logits.device.type == "cpu" if check_target is None else check_target
    # Under torch.func.vmap, as in a compiled graph, no value can be read.
    if check and not torch.compiler.is_compiling() and VMAP not in active_transforms():
        _arguments.raise_for_bad_values(logits, volumes, options.ignore_index, checked.regions)
    if checked.annotated is not None and marginalises(checked):
        logits = marginal_logits(logits, checked.annotated)
    # NaN where a label or voxel weight is out of range, or a dense target if that is asked.
    of_counts, bad = sums(logits, volumes, options, check_target is not False, checked.regions)
    poison = torch.where(bad, torch.nan, 0.0).to(of_counts[0].dtype)
    return torch.stack([x + poison for x in of_counts], -1)


def marginalises(checked: Checked) -> bool:
    """Whether classes that were not annotated are added to the background."""
    return checked.annotated is not None and not checked.all_annotated and checked.plan.options.activation == "softmax"


def marginal_logits(logits: torch.Tensor, annotated: torch.Tensor) -> torch.Tensor:
    """Logits whose softmax has the probabilities of all classes that were not annotated in that of class 0.

    log(sum exp) over class 0 and these classes in channel 0, and -inf in theirs (Fidon et al., arXiv:2107.03846). Half
    precision is computed, and returned, in float32.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    shape = (*annotated.shape, *(1,) * (z.dim() - 2))
    merged = ~annotated.view(shape)
    background = torch.zeros_like(merged)
    background[:, 0] = True
    # Where only class 0 is left its logit is taken as it is, so that no rounding changes it.
    together = torch.where(merged | background, z, -torch.inf).logsumexp(1, keepdim=True)
    together = torch.where(merged.any(1, keepdim=True), together, z[:, :1])
    return torch.where(background, together, torch.where(merged, -torch.inf, z))


def nearest_voxels(x: torch.Tensor, first: int, spatial, resample: str | None) -> torch.Tensor:
    """x at the voxels that torch's interpolation takes for these spatial sizes, which begin at dimension ``first``."""
    # Rounded as there, to float32.
    for d, size in enumerate(spatial, first):
        if x.size(d) != size:
            shift = 0.5 if resample == "nearest-exact" else 0.0
            at = torch.arange(size, dtype=torch.float64, device=x.device) + shift
            scale = torch.full((), x.size(d), dtype=torch.float32, device=x.device) / size
            at = (at * scale.double() - shift).float() + shift
            x = x.index_select(d, at.long().clamp(max=x.size(d) - 1))
    return x


def sums(
    logits: torch.Tensor,
    volumes: Volumes,
    options: Options,
    checks_targets: bool,
    regions: CheckedRegions | None = None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """tp, fp and fn and, with a cross-entropy, its sums, (N, C) each; and whether a label, voxel weight or region is
    out of range, or a dense target if that is asked. With regions (N, R, C) each, and last the number of voxels."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    target, weight, dense = volumes
    target = nearest_voxels(target, 2 if dense else 1, logits.shape[2:], options.resample)
    weight = None if weight is None else nearest_voxels(weight, 1, logits.shape[2:], options.resample)
    volumes = Volumes(target, weight, dense)
    counts = torch.ones_like(z[:, 0], dtype=torch.bool) & _arguments.is_counted(volumes, z.dtype, options.ignore_index)
    bad = torch.zeros((), dtype=torch.bool, device=z.device)
    if dense:
        g = target.to(z.dtype)
        if checks_targets:
            bad = (_arguments.outside_of_unit(target, z.dtype) & counts.unsqueeze(1)).any()
    else:
        label, labels = target.long(), _arguments.label_count(logits)
        known = (label >= 0) & (label < labels)
        bad = (~known & ~torch.as_tensor(_arguments.is_ignored(target, options.ignore_index), device=z.device)).any()
        counts = counts & known
        classes = torch.arange(labels - z.size(1), labels, device=z.device).view(-1, *(1,) * (label.dim() - 1))
        g = (label.unsqueeze(1) == classes).to(z.dtype)
    w = counts.to(z.dtype)
    if weight is not None:
        bad = bad | ~(weight >= 0).all() if weight.dtype.is_floating_point else bad
        w = w * weight.to(z.dtype)
    total = _total
    if regions is not None:
        ids, in_any, beyond = _region_ids(regions, logits.shape, options.resample)
        bad, counts = bad | beyond, counts & in_any
        total = functools.partial(_total_of_regions, ids, regions.number)
    # Voxels that do not count are replaced, not multiplied by 0: 0 times NaN is NaN.
    w, counts = w.unsqueeze(1), counts.unsqueeze(1)
    z = torch.where(counts, z, torch.zeros_like(z))
    g = torch.where(counts, g, torch.zeros_like(g))
    w = torch.where(counts, w, torch.zeros_like(w))
    z, g, w = (x.flatten(2) if x.dim() > 2 else x.unsqueeze(2) for x in (z, g, w))
    p = _probabilities(z, options.activation)
    if options.squared:
        tp = total(w * p * g)
        fp, fn = (total(w * (sign * (p - g)).clamp(min=0) ** 2) for sign in (1, -1))
    elif options.soft_label:
        predicted, wanted = total(w * p), total(w * g)
        tp = (predicted + wanted - total(w * (p - g).abs())) / 2
        fp, fn = predicted - tp, wanted - tp
    else:
        tp, fp, fn = total(w * p * g), total(w * p * (1 - g)), total(w * (1 - p) * g)
    found: tuple[torch.Tensor, ...] = (tp, fp, fn)
    if _options.is_used(options.ce_weight):
        # Terms of g = 1 and, for the sigmoid, of g = 0: (1 - p)^f (-log p) and p^f (-log(1 - p)).
        if options.activation == "softmax":
            of_one, of_zero = _focal(z.log_softmax(1), options.focal_gamma), torch.zeros_like(z)
        else:
            of_one, of_zero = (_focal(torch.nn.functional.logsigmoid(x), options.focal_gamma) for x in (z, -z))
        # Without g a term may be infinite, and is not wanted.
        cross_entropy = torch.where(g != 0, g * of_one, 0.0) + torch.where(g != 1, (1 - g) * of_zero, 0.0)
        smoothing = of_one + of_zero if _options.is_used(options.label_smoothing) else torch.zeros_like(z)
        # tp + fn is the weight of a label, but not where errors are squared.
        voxels = total(w * g) if _of_labels(options, dense) else total(w.expand_as(p))
        found += (total(w * cross_entropy), total(w * smoothing), voxels)
    if regions is not None:
        found += (total((w != 0).to(w.dtype).expand_as(p)),)
    return found, bad


def _total(x: torch.Tensor) -> torch.Tensor:
    # Over the voxels: (N, C).
    return x.sum(-1)


def _total_of_regions(ids: torch.Tensor, count: int, x: torch.Tensor) -> torch.Tensor:
    # Over the voxels of each region: (N, R, C). Voxels of the last, additional one count nowhere.
    of_all = x.new_zeros(*x.shape[:2], count + 1).scatter_add(2, ids.expand_as(x), x)
    return of_all[..., :count].movedim(2, 1)


def _region_ids(
    regions: CheckedRegions, shape: torch.Size, resample: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # (N, 1 or C, voxels) in [0, R], R for voxels that count nowhere; which voxels (N, *spatial) are in any region;
    # whether an id is out of range.
    ids = nearest_voxels(regions.ids, 2, shape[2:], resample).long()
    outside = ids >= regions.number
    ids = torch.where((ids < 0) | outside, regions.number, ids)
    return ids.flatten(2) if ids.dim() > 2 else ids.unsqueeze(2), (ids < regions.number).any(1), outside.any()


def _probabilities(z: torch.Tensor, activation: str) -> torch.Tensor:
    # An exponential below the smallest normal number is 0: processors and cards differ in what they make of one.
    least = math.log(torch.finfo(z.dtype).tiny)
    if activation == "none":
        return z
    if activation == "sigmoid":
        return torch.where(z < least, 0.0, z.sigmoid())
    return torch.where(z - z.detach().amax(1, keepdim=True) < least, 0.0, z.softmax(1))


def _of_labels(options: Options, dense: bool) -> bool:
    return options.squared and options.activation == "softmax" and not dense


def _focal(log_p: torch.Tensor, focal_gamma: float) -> torch.Tensor:
    # (1 - p)^f (-log p); at p = 1 it is 0 and so is its slope, also where the power's is infinite.
    if focal_gamma == 0:
        return -log_p
    complement = -torch.expm1(log_p)
    positive = complement > 0
    factor = torch.where(positive, torch.where(positive, complement, 1.0) ** focal_gamma, 0.0)
    # At p = 0, where a class is excluded, the factor is 1 and its slope none, whatever infinity that meets.
    possible = log_p > -torch.inf
    return torch.where(possible, factor * -torch.where(possible, log_p, 0.0), -log_p)


class Terms(NamedTuple):
    """A loss before its reduction. With a cross-entropy: its weighted sum and the divisor of its mean, (rows, 1).

    loss: (rows, C') with its class weights; of regions, for their mean, (N), the mean of each sample. kept: how many of
    these are in a mean.
    """

    loss: torch.Tensor
    kept: torch.Tensor | int
    cross_entropy: torch.Tensor | None = None
    divisor: torch.Tensor | None = None


def rows_of(counts: torch.Tensor, checked: Checked) -> torch.Tensor:
    """The rows that the loss is made of: the counts, summed over the batch where that is asked for.

    Classes that were not annotated are 0, and a last column says how many annotated samples (or, with regions, voxels)
    are in a row: (N or 1, C, 4 or 7). A label of such a class raises, or gives NaN where that would have to be read.
    """
    options, annotated = checked.options, checked.annotated
    if annotated is not None:
        regional = checked.regions is not None
        in_rows = (annotated.unsqueeze(1) if regional else annotated).unsqueeze(-1)
        if options.activation == "softmax" or not checked.volumes.dense:
            found = (~in_rows & ((counts[..., :1] + counts[..., 2:3]) > 0)).flatten(0, -3).any(0)[..., 0]
            counts = _refuse_unannotated(counts, found, checked.check_target)
        if options.activation == "softmax" and counts.size(-1) >= 6:
            # q = (1 - s) g + s / K for the K annotated classes of a sample. The loss divides by C, not by K.
            of_smoothing = torch.arange(counts.size(-1), device=counts.device) == 4
            share = counts.size(-2) / annotated.sum(1).to(counts.dtype).view(-1, *(1,) * (counts.dim() - 1))
            counts = torch.where(of_smoothing, torch.where(in_rows, counts, 0.0) * share, counts)
        counts = torch.where(in_rows, counts, 0.0)
        if not regional:
            counts = torch.cat([counts, in_rows.to(counts.dtype)], -1)
    return counts.sum(0, keepdim=True) if options.batch else counts


def terms_of_table(rows: torch.Tensor, checked: Checked, flat_below: float = 0.0) -> Terms:
    """The terms of the loss of `rows_of`, before they are reduced."""
    options, regional = checked.options, checked.regions is not None
    dense = checked.volumes.dense
    if not regional and checked.annotated is None:
        return terms_of_counts(Counts(*rows.unbind(-1)), options, checked.class_parameters, dense, flat_below)
    *columns, members = rows.flatten(0, -3).unbind(-1)
    counts = Counts(*columns)
    loss, is_absent = row_losses(counts, options, checked.class_parameters, flat_below)
    kept = ~(members[:, -loss.size(1) :] <= 0)  # NaN, of bad values, is kept
    if options.absent == "skip":
        kept = kept & ~is_absent
    loss = torch.where(kept, loss, 0.0)
    shape = (*rows.shape[:-2], loss.size(1))
    how_many: torch.Tensor | int = kept.sum()
    if regional and options.reduction == "mean":
        of_sample = kept.view(shape).flatten(1).sum(1)
        loss = _ratio(loss.view(shape).flatten(1).sum(1), of_sample)
        how_many = (of_sample > 0).sum()
    else:
        loss = loss.view(shape)
    if not _is_not(options.ce_weight, 0):
        return Terms(loss, how_many)
    ce_class_weight = None if checked.class_parameters is None else checked.class_parameters[3].to(rows.dtype)
    of_ce = (x.view(*rows.shape[:-2], 1) for x in _cross_entropy(counts, options, ce_class_weight, dense, True))
    return Terms(loss, how_many, *of_ce)


def _refuse_unannotated(counts: torch.Tensor, found: torch.Tensor, check_target: bool | None) -> torch.Tensor:
    # found: (C), the classes that are labels where they were not annotated.
    reads = (found.is_cpu if check_target is None else check_target) and not (
        torch.compiler.is_compiling() or active_transforms()
    )
    if reads and bool(found.any()):
        label = int(found.nonzero()[0]) + (found.numel() == 1)  # the one channel is that of label 1
        raise ValueError(
            f"target: expected labels that were annotated in their sample, got {label}; "
            "the background, or what nobody drew, is 0"
        )
    return counts + torch.where(found.any(), torch.nan, 0.0).to(counts.dtype)


def terms_of_counts(
    counts: Counts,
    options: Options,
    class_parameters: torch.Tensor | None = None,
    dense: bool = False,
    flat_below: float = 0.0,
) -> Terms:
    """The terms of the loss of (rows, C) counts, before they are reduced.

    flat_below: Where 1 - TI is no more than this, a power of it is flat.
    """
    loss, is_absent = row_losses(counts, options, class_parameters, flat_below)
    kept = (~is_absent).sum() if options.absent == "skip" else loss.numel()
    if not _is_not(options.ce_weight, 0):
        return Terms(loss, kept)
    ce_class_weight = None if class_parameters is None else class_parameters[3].to(counts.tp.dtype)
    return Terms(loss, kept, *_cross_entropy(counts, options, ce_class_weight, dense))


def flat_below(dtype: torch.dtype) -> float:
    """The value of 1 - TI below which gamma < 1 would make slopes larger than the kernels' type, which the kernels' own
    table bounds."""
    return 1e-290 if dtype == torch.float64 else 1e-30


def row_losses(
    counts: Counts, options: Options, class_parameters: torch.Tensor | None, flat_below: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, C') each: the loss, and whether the target lacks the class."""
    tp, fp, fn = counts[:3]
    alpha, beta, class_weight = options.alpha, options.beta, None
    if class_parameters is not None:
        alpha, beta, class_weight, _ = class_parameters.to(tp.dtype)
    is_absent = tp + fn == 0
    error = alpha * fp + beta * fn + (options.smooth_dr - options.smooth_nr)
    denominator = tp + alpha * fp + beta * fn + options.smooth_dr
    # Nothing predicted, nothing there and no smoothing: nothing is wrong.
    empty = denominator == 0
    one_minus_ti = torch.where(empty, 0.0, error) / torch.where(empty, 1.0, denominator)
    if _is_not(options.gamma, 1):
        # At 0 the power's slope is taken as 0, also where it is infinite (gamma < 1).
        positive = ~(one_minus_ti <= flat_below)
        least = 0.0
        if isinstance(options.gamma, torch.Tensor):  # of which 1 is no power, as above
            least = torch.where(options.gamma == 1, one_minus_ti, 0.0)
        one_minus_ti = torch.where(positive, torch.where(positive, one_minus_ti, 1.0) ** options.gamma, least)
    loss = one_minus_ti if class_weight is None else class_weight * one_minus_ti
    if options.absent != "keep":
        loss = torch.where(is_absent, 0.0, loss)
    if not options.include_background and loss.size(1) > 1:
        loss, is_absent = loss[:, 1:], is_absent[:, 1:]
    return loss, is_absent


def reduced(terms: Terms, options: Options) -> torch.Tensor:
    """The loss of its terms."""
    loss, kept, cross_entropy, _ = terms
    if options.reduction == "mean":
        loss = _ratio(loss.sum(), kept)
    elif options.reduction == "sum":
        loss = loss.sum()
    elif options.batch:
        loss = loss.squeeze(0)
    if _is_not(options.tversky_weight, 1):
        loss = options.tversky_weight * loss
    if cross_entropy is not None:
        loss = loss + reduced_cross_entropy(terms, options)
    return loss


def _part(factor, x: torch.Tensor) -> torch.Tensor:
    # Of a factor that is 0, also where only a tensor knows it, nothing is left, whatever infinity it meets.
    if not isinstance(factor, torch.Tensor):
        return factor * x
    return torch.where(factor == 0, 0.0, factor * torch.where(factor == 0, 0.0, x))


def _is_not(value, neutral: float) -> bool:
    return isinstance(value, torch.Tensor) or value != neutral


def _ratio(numerator: torch.Tensor, denominator) -> torch.Tensor:
    # 0 where there is nothing to divide by.
    if not isinstance(denominator, torch.Tensor):
        return numerator / denominator if denominator else numerator
    some = denominator != 0
    return torch.where(some, numerator, 0.0 * numerator) / torch.where(some, denominator, 1)


def _cross_entropy(
    counts: Counts, options: Options, class_weight, dense: bool, partial: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    # Each row's weighted sum, and the divisor of its mean: (rows, 1). partial: channels may differ in their voxels.
    tp, _, fn, *of_ce = counts
    cross_entropy, smoothing, voxels = (x for x in of_ce if x is not None)
    softmax, smooth = options.activation == "softmax", options.label_smoothing
    weight = torch.ones_like(tp[0]) if class_weight is None else class_weight
    total = (1 - smooth) * cross_entropy
    if _is_not(smooth, 0):
        total = total + _part(smooth, smoothing / (tp.size(1) if softmax else 2))
    total = (weight * total).sum(1, keepdim=True)
    if softmax and not dense:
        labels = voxels if _of_labels(options, dense) else (tp + fn).detach()  # the weight of a label
        return total, (weight * labels).sum(1, keepdim=True)  # Σ w b_label
    if partial and not softmax:
        return total, voxels.sum(1, keepdim=True)
    return total, (voxels.amax(1, keepdim=True) if partial else voxels[:, :1]) * (1 if softmax else tp.size(1))


def reduced_cross_entropy(terms: Terms, options: Options) -> torch.Tensor:
    """Its weighted sum or mean; without a reduction, the mean of each row (N, 1), or of the summed batch."""
    _, _, total, divisor = terms
    if total is None or divisor is None:
        raise ValueError("terms: expected those of a loss with a cross-entropy")
    if options.reduction == "sum":
        value = total.sum()
    elif options.reduction == "mean":
        value = _ratio(total.sum(), divisor.sum())
    else:
        value = _ratio(total, divisor)
        value = value.squeeze(0) if options.batch else value
    return _part(options.ce_weight, value)
