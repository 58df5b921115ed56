"""The functions that users call: they check the arguments, choose a backend and run it."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch

from . import _arguments, _backends, _blocks, _joint, _options, autograd, reference  # noqa: F401 (_blocks registers)
from ._layout import walkable
from ._options import RUN_DEFAULTS
from ._transforms import JVP, VMAP, active_transforms
from .distributed import Ranks, attempt, ranks_of

__all__ = [
    "OverlapCounts",
    "OverlapCountsCE",
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


#: One number, or one a class: a list, a tensor of them (which gets a gradient where it requires one) or an array.
PerClass = float | Sequence[float] | torch.Tensor
#: A number, or a 0-d tensor with one.
Scalar = float | torch.Tensor
#: True: the default group.
if TYPE_CHECKING or torch.distributed.is_available():  # noqa: SIM108 (mypy takes no conditional expression)
    Group = torch.distributed.ProcessGroup | bool | None
else:
    Group = object
if TYPE_CHECKING:
    from typing_extensions import Unpack


class OverlapCounts(NamedTuple):
    """True positives, false positives and false negatives: (N, C) each."""

    tp: torch.Tensor
    fp: torch.Tensor
    fn: torch.Tensor


class OverlapCountsCE(NamedTuple):
    """`OverlapCounts`, and a cross-entropy: (N, C) each but voxels, (N).

    ce: the sums of w (-log p) over the voxels of each class (sigmoid: of both terms of each channel), w the
    voxel_weight; ce.sum(1) / voxels is the mean cross-entropy of each sample. voxels: the sum of w.
    """

    tp: torch.Tensor
    fp: torch.Tensor
    fn: torch.Tensor
    ce: torch.Tensor
    voxels: torch.Tensor


def _is_transformed() -> bool:
    # Whether torch.func or forward-mode differentiation is at work.
    return torch._C._are_functorch_transforms_active() or _forward_ad._current_level >= 0


def _only_by_reference(*tensors: torch.Tensor | None) -> bool:
    # Whether forward-mode derivatives are wanted, or torch.func.vmap maps over a tensor.
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return not active_transforms().isdisjoint((VMAP, JVP))
    return any(x is not None and _forward_ad.unpack_dual(x).tangent is not None for x in tensors)


_forward_ad = torch.autograd.forward_ad
#: The backends whose kernels add up classes that were not annotated themselves.
MERGING = ("cpu", "cuda")


def _on_backend(logits, checked, function, how, check_target, backend):
    # function(chosen backend, check, logits, checked, compiles, *how), or None: the reference is to compute it.
    # compiles: a graph for itself, not one that is exported.
    volumes, plan, regions = checked.volumes, checked.plan, checked.regions
    differentiable_target = volumes.target.requires_grad and torch.is_grad_enabled()
    unsupported = "the gradient of a target" if differentiable_target else None
    # Triton's kernels do not merge classes: that would take torch's operators and another tensor.
    regional = regions is not None and not reference.marginalises(checked)
    triton_first = _backends.faster_by_triton(logits, plan.options, volumes.dense, regional)
    chosen = _backends.choose(backend, logits.device, unsupported, triton_first, _backends.beyond_cuda(logits))
    if chosen == "reference" or (
        _is_transformed() and _only_by_reference(logits, volumes.voxel_weight, checked.class_parameters)
    ):
        return None
    if reference.marginalises(checked) and chosen not in MERGING:
        logits = _marginal_logits(logits, checked)
    on_host = chosen == "cpu" or (chosen == "blocks" and logits.device.type == "cpu")  # which check while they read
    check = _arguments.check_mode(check_target, on_host)
    if torch.compiler.is_compiling():
        return function(chosen, check, logits, checked, not torch.compiler.is_exporting(), *how)
    if check_target and not on_host:
        _arguments.raise_for_bad_values(logits, volumes, plan.options.ignore_index, regions)
    # Tensors that the kernels cannot read in place are copied here, once for both passes.
    walked = logits
    target, voxel_weight, dense = volumes
    are_plain = logits.is_contiguous() and target.is_contiguous() and voxel_weight is None and regions is None
    if not are_plain:
        spatial = 2 if dense else 1
        walked = walkable(logits, 2)
        if target.shape[spatial:] == logits.shape[2:]:
            target = walkable(target, spatial)
            voxel_weight = None if voxel_weight is None else walkable(voxel_weight, 1)
            if regions is not None:
                checked = checked._replace(regions=regions._replace(ids=walkable(regions.ids, 2)))
        checked = checked._replace(volumes=_arguments.Volumes(target, voxel_weight, dense))
    if chosen != "cpu" or check != _arguments.CHECKS["raise"]:
        return function(chosen, check, walked, checked, False, *how)
    try:
        return function(chosen, check, walked, checked, False, *how)
    except RuntimeError as error:
        raise_for_argument(error)
        raise


def raise_for_argument(error: RuntimeError) -> None:
    """Says a kernel's error about a bad value as an error of the argument."""
    found = _BAD_VALUE.search(str(error))
    if found is not None:
        raise ValueError(found[0]) from None


#: The CPU kernels' error about a bad value.
_BAD_VALUE = re.compile(r"(target|voxel_weight|regions): expected (labels|values) .*, got .*")


def _apply_loss(chosen, check, logits, checked, compiles, inplace):
    (target, voxel_weight, _), plan, class_parameters, *_ = checked
    # Numbers of the operator `tversky_loss` are part of a compiled graph, which would be made again for each new value.
    if compiles or checked.needs_torch_table or chosen == "blocks":
        counts = _apply_counts(chosen, check, logits, checked, compiles, inplace)
        return _loss_of_counts(counts, checked, compiles, _arguments.compute_dtype(logits))
    volumes = (logits, target, voxel_weight, _constant(class_parameters))
    return autograd.apply(autograd.TverskyLoss, *volumes, plan, check, inplace, chosen)[0]


def _loss(
    logits, checked, check_target, inplace_backward, process_group, sample_group, grad_reduction, backend
) -> torch.Tensor:
    ranks = ranks_of(process_group, sample_group, grad_reduction)
    if ranks is not None:
        part = _part(logits, checked, ranks, check_target, inplace_backward, backend)
        return _joint.losses([part], ranks, check_target)[0]
    checked = checked.of_one_process()
    inplace = inplace_backward is not False and autograd.inplace_allowed("logits", logits, inplace_backward)
    loss = _on_backend(logits, checked, _apply_loss, (inplace,), check_target, backend)
    return reference.checked_loss(logits, checked, None, check_target) if loss is None else loss


def _marginal_logits(logits, checked):
    # What kernels read that do not merge classes themselves.
    if torch.compiler.is_compiling() or _is_transformed():
        return reference.marginal_logits(logits, checked.annotated)
    return autograd.apply(autograd.MarginalLogits, logits, checked.annotated)[0]


def _part(logits, checked, ranks: Ranks, check_target, inplace_backward, backend) -> _joint.Part:
    # This rank's part of a loss. All that is not said of this call alone is checked now.
    _joint.check_ranks(ranks, checked.plan.options)
    inplace = inplace_backward is not False and autograd.inplace_allowed("logits", logits, inplace_backward)
    return _joint.Part(lambda: _counts(logits, checked, check_target, inplace, backend), checked, logits)


def _counts(logits, checked, check_target, inplace: bool, backend: str) -> torch.Tensor:
    # (N, C, 3 or 6) in float64; with regions (N, R, C, 4 or 7).
    counts = _on_backend(logits, checked, _apply_counts, (inplace,), check_target, backend)
    return reference.checked_counts(logits, checked, check_target).double() if counts is None else counts


def _apply_linear(chosen, check, logits, checked, compiles, inplace, head, of_counts):
    features, weight, bias = head
    if not torch.compiler.is_compiling():
        features = walkable(features, 2)
    wants_counts, of_counts = of_counts, of_counts or compiles or checked.needs_torch_table or chosen == "blocks"
    volumes = (features, weight, bias, *checked.volumes[:2], _constant(checked.class_parameters))
    how = (checked.plan, check, inplace, chosen, of_counts, *_ids_and_count(checked))
    result = autograd.apply(autograd.LinearTverskyLoss, *volumes, *how)[0]
    if wants_counts or not of_counts:
        return result
    return _loss_of_counts(result, checked, compiles, _arguments.compute_dtype(features))


def _apply_counts(chosen, check, logits, checked, compiles, inplace):
    ids, number = _ids_and_count(checked)
    merged = ~checked.annotated if chosen in MERGING and reference.marginalises(checked) else None
    number = max(number, int(merged is not None))  # all voxels in one region
    volumes = (logits, *checked.volumes[:2], ids, merged, number)
    counts = autograd.apply(autograd.Counts, *volumes, checked.plan, check, inplace, chosen)
    return counts[:, 0, :, :-1] if number and ids is None else counts


def _ids_and_count(checked) -> tuple[torch.Tensor | None, int]:
    return (None, 0) if checked.regions is None else tuple(checked.regions)


def _constant(class_parameters: torch.Tensor | None) -> torch.Tensor | None:
    # Without the history that nobody asks for here.
    if class_parameters is None or not class_parameters.requires_grad:
        return class_parameters
    return class_parameters.detach()


def _loss_of_counts(counts: torch.Tensor, checked, compiles: bool, dtype) -> torch.Tensor:
    # The table by torch's own operators: the arithmetic on the counts, in float64.
    options = checked.options
    if compiles:
        variable = {}
        for name in ("alpha", "beta", *_options.SCALARS):
            value = getattr(options, name)
            if not isinstance(value, torch.Tensor) and value != _NEUTRAL.get(name):
                variable[name] = counts.new_zeros(()) + value
        checked = checked._replace(scalars={**checked.scalars, **variable})
    rows = reference.rows_of(counts, checked)
    terms = reference.terms_of_table(rows, checked, reference.flat_below(dtype))
    return reference.reduced(terms, checked.options).to(dtype)


#: Numbers that leave a part of the arithmetic out: a compiled graph is made for them, and takes all others.
_NEUTRAL = {"gamma": 1.0, "tversky_weight": 1.0, "ce_weight": 0.0, "label_smoothing": 0.0}


def tversky_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    alpha: PerClass = 0.3,
    beta: PerClass = 0.7,
    gamma: Scalar = 1.0,
    smooth_nr: Scalar = 1e-5,
    smooth_dr: Scalar = 1e-5,
    activation: str = "softmax",
    class_weight: PerClass | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    voxel_weight: torch.Tensor | None = None,
    regions: torch.Tensor | None = None,
    num_regions: int | None = None,
    annotated: torch.Tensor | None = None,
    batch: bool = False,
    absent: str = "keep",
    soft_label: bool = False,
    squared: bool = False,
    reduction: str = "mean",
    process_group: Group = None,
    sample_group: Group = None,
    grad_reduction: str = "mean",
    inplace_backward: bool = False,
    check_target: bool | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Tversky loss of a softmax, fused: nothing of the volume's size is made but the gradient.

    Per sample n and class c, over the voxels that count, with p = softmax(logits) and g the target:

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
        ignore_index: Voxels with this label count nowhere, and their gradient is exactly 0 (as long as loss and
            upstream gradient are finite). Any integer. In a dense target these are the voxels that hold it in every
            channel.
        voxel_weight: (N, *spatial) or (N, 1, *spatial), bool, uint8 or floating, >= 0: multiplies the voxel's part in
            all sums. One below the smallest normal number (1.2e-38 in float32) counts as 0.
        regions: (N, *spatial), (N, 1, *spatial) or, one partition for each class, (N, C, *spatial), of uint8, int8,
            int16, int32 or int64: a voxel is counted in its region, in [0, num_regions), or nowhere where that is
            negative. What is said of a sample holds for each of its regions; regions without a voxel that counts are in
            no mean. "mean" is over the regions and classes of a sample, then over the samples. See
            `tversky_kernels.regions` and docs/every_lesion.md.
        num_regions: How many regions there are. None: the largest of ``regions`` plus one, on the CPU alone.
        annotated: (N, C) of bool: which classes were annotated in which sample; None: all. With a softmax the
            probabilities of the others are added to that of class 0, for a label 0 then means "background, or what
            nobody drew" (Fidon et al. 2021, arXiv:2107.03846; Shi et al. 2021, arXiv:2007.03868). Their own rows are in
            no mean; a label that was not annotated is a bad label. See docs/partial_labels.md.
        batch: True sums the counts over the batch first, and gives one index a class.
        absent: What becomes of a class that the target lacks, in that sample or in the batch: "keep" it as the formula
            says, "zero" its loss, or "skip" it in the mean.
        soft_label: True measures a soft target by its L1 distance (Wang et al. 2023, arXiv:2303.16296).
        squared: True measures errors by their squares, FP + FN = sum (p - g)^2: with alpha = beta = 0.5 that is V-Net's
            Dice loss, 1 - 2 sum p g / (sum p^2 + sum g^2) (Milletari et al. 2016, arXiv:1606.04797). alpha and beta
            are then one number.
        reduction: "mean", "sum", or "none": (N, C'), or (C') with ``batch``, where C' is C without the background if
            that is left out.
        process_group: A `torch.distributed` group whose ranks hold parts of one batch (``batch=True``) or of the same
            volumes; True: the default group, looked up at each call. The counts are summed over it, and every rank gets
            the loss of the whole. What fails on one rank, a label out of range among others, raises on all in the same
            step (on a GPU only with check_target=True; the loss is NaN on all otherwise).
        sample_group: A group over whose ranks different samples are spread, for ``batch=False``: the mean, or the sum,
            is over the samples of all its ranks, each of them with the same weight. Together with process_group (ranks
            that hold parts of the same samples) the two span a mesh.
        grad_reduction: How the caller joins the gradients of the ranks: "mean", as DDP and FSDP do it, or "sum". Either
            way the parameters get the gradient of the loss of the whole, as one process computes it.
        inplace_backward: True writes the gradient over the logits, which are lost: no memory of their size is needed.
            A backward through another operation that had saved the logits raises autograd's error. What is computed
            from the logits after the backward is computed from the gradient, and nothing tells. An error for logits
            that are a leaf or a view of one. Without effect under torch.compile, with create_graph=True, for logits
            that are a part of a larger tensor or not dense, and where saved-tensor hooks (activation checkpointing,
            `save_on_cpu`) are active or were when the logits were made: autograd sees no overwriting then.
        check_target: None: a label outside [0, C), or a value of a dense target outside [0, 1], raises on the CPU and
            makes the loss NaN elsewhere, where reading it would stall the device. True: always raise. False: never
            raise; a bad label makes the loss NaN, and a dense target may hold anything.
        backend: "auto", or "cpu", "cuda", "triton", "blocks" (torch's operators, a block of voxels at a time, on any
            device), "reference". One that is named never falls back.

    Returns:
        The loss in float32, or float64 for float64 logits. Its gradient has the logits' dtype and layout. The same
        input gives the same bits, for any number of threads.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: A wrong shape, device, range or option, a label outside [0, C), a dense target outside [0, 1], or a
            backend that is not available.

    Second derivatives and forward-mode derivatives work, and so does `torch.func.vmap`; the reference computes them.
    alpha, beta, gamma, class_weight, smooth_nr and smooth_dr may be tensors (those of one number 0-d): they get a
    gradient where they require one, and a new value of one is no reason for torch.compile to compile again.

    Examples:
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
        regions=regions,
        num_regions=num_regions,
        annotated=annotated,
        batch=batch,
        absent=absent,
        soft_label=soft_label,
        squared=squared,
        reduction=reduction,
        check_target=check_target,
    )
    how = (check_target, inplace_backward, process_group, sample_group, grad_reduction, backend)
    return _loss(logits, checked, *how)


def tversky_ce_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    tversky_weight: Scalar = 1.0,
    ce_weight: Scalar = 1.0,
    ce_class_weight: PerClass | None = None,
    label_smoothing: Scalar = 0.0,
    focal_gamma: float = 0.0,
    alpha: PerClass = 0.3,
    beta: PerClass = 0.7,
    gamma: Scalar = 1.0,
    smooth_nr: Scalar = 1e-5,
    smooth_dr: Scalar = 1e-5,
    activation: str = "softmax",
    class_weight: PerClass | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    voxel_weight: torch.Tensor | None = None,
    regions: torch.Tensor | None = None,
    num_regions: int | None = None,
    annotated: torch.Tensor | None = None,
    batch: bool = False,
    absent: str = "keep",
    soft_label: bool = False,
    squared: bool = False,
    reduction: str = "mean",
    process_group: Group = None,
    sample_group: Group = None,
    grad_reduction: str = "mean",
    inplace_backward: bool = False,
    check_target: bool | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Tversky loss plus cross-entropy, in the same two passes over the volume.

    ``tversky_weight * tversky_loss(...) + ce_weight * CE`` with, over the voxels that count, each with its weight w,
    class weights b, q = (1 - label_smoothing) g + label_smoothing / K, and f = focal_gamma:

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

    Examples:
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
        regions=regions,
        num_regions=num_regions,
        annotated=annotated,
        batch=batch,
        absent=absent,
        soft_label=soft_label,
        squared=squared,
        reduction=reduction,
        check_target=check_target,
    )
    how = (check_target, inplace_backward, process_group, sample_group, grad_reduction, backend)
    return _loss(logits, checked, *how)


class _CountsOptions(TypedDict, total=False):
    # For type checkers, which have to know whether three tensors are returned or five.
    activation: str
    ignore_index: int | None
    voxel_weight: torch.Tensor | None
    regions: torch.Tensor | None
    num_regions: int | None
    annotated: torch.Tensor | None
    soft_label: bool
    batch: bool
    process_group: Group
    grad_reduction: str
    inplace_backward: bool
    check_target: bool | None
    backend: str


@overload
def overlap_counts(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    cross_entropy: Literal[False] = False,
    **options: Unpack[_CountsOptions],
) -> OverlapCounts: ...


@overload
def overlap_counts(
    logits: torch.Tensor, target: torch.Tensor, *, cross_entropy: Literal[True], **options: Unpack[_CountsOptions]
) -> OverlapCountsCE: ...


@overload
def overlap_counts(
    logits: torch.Tensor, target: torch.Tensor, *, cross_entropy: bool, **options: Unpack[_CountsOptions]
) -> OverlapCounts | OverlapCountsCE: ...


def overlap_counts(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    activation: str = "softmax",
    ignore_index: int | None = None,
    voxel_weight: torch.Tensor | None = None,
    regions: torch.Tensor | None = None,
    num_regions: int | None = None,
    annotated: torch.Tensor | None = None,
    soft_label: bool = False,
    batch: bool = False,
    cross_entropy: bool = False,
    process_group: Group = None,
    grad_reduction: str = "mean",
    inplace_backward: bool = False,
    check_target: bool | None = None,
    backend: str = "auto",
) -> OverlapCounts | OverlapCountsCE:
    """The sums that every overlap loss is made of, differentiable: build your own loss from them in a few lines.

    Per sample and class, over the voxels that count: tp = sum p g, fp = sum p (1 - g), fn = sum (1 - p) g. So sum p is
    tp + fp, and sum g is tp + fn. The arguments are those of `tversky_loss`. What you compute from the counts is
    small; the passes over the volume, forward and backward, are fused as they are there. With process_group each rank
    holds a part of the same samples' volumes or, with ``batch``, of one batch, and gets the counts of the whole.

    Args:
        logits: See `tversky_loss`, as for all that is not named here.
        target: See `tversky_loss`.
        cross_entropy: True gives the sums of a cross-entropy too, in the same passes (not with activation="none").

    Returns:
        OverlapCounts(tp, fp, fn), each (N, C), or (1, C) with ``batch``, in float32, or float64 for float64 logits.
        With ``cross_entropy`` OverlapCountsCE(tp, fp, fn, ce, voxels): ce (N, C), voxels (N). With regions (N, R, C)
        and (N, R), or (1, R, C). Classes that were not annotated have counts of 0.

    Examples:
        >>> tp, fp, fn = tk.overlap_counts(model(image), label)
        >>> dice = 2 * tp / (2 * tp + fp + fn)
        >>> dice.cosh().log().mean().backward()
    """
    ce_weight = float(_options.flag("cross_entropy", cross_entropy))
    options: dict[str, Any] = {"activation": activation, "ignore_index": ignore_index, "soft_label": soft_label}
    options |= {"batch": batch, "ce_weight": ce_weight}
    options |= {"regions": regions, "num_regions": num_regions, "annotated": annotated}
    how = (check_target, inplace_backward, ranks_of(process_group, None, grad_reduction), backend)
    counts = exact_counts(logits, target, voxel_weight, options, *how)
    tp, fp, fn, *of_ce = counts.to(_arguments.compute_dtype(logits)).unbind(-1)
    if not ce_weight:
        return OverlapCounts(tp, fp, fn)
    return OverlapCountsCE(tp, fp, fn, of_ce[0], of_ce[2].amax(-1))


def exact_counts(
    logits, target, voxel_weight, options: dict, check_target, inplace_backward, ranks: Ranks | None, backend
) -> torch.Tensor:
    """(rows, C, 3, or 6 with a ce_weight), in float64: a loss that takes differences of them loses no digits.

    With regions or classes that were not annotated there is a column more, `reference.rows_of`'s last.
    """
    checked = _arguments.check_arguments(logits, target, voxel_weight, check_target=check_target, **options)
    return rows_of_checked(logits, checked, check_target, inplace_backward, ranks, backend)


def rows_of_checked(logits, checked, check_target, inplace_backward, ranks: Ranks | None, backend) -> torch.Tensor:
    """`exact_counts` of arguments that have been checked."""
    if ranks is not None and ranks.parts is not None:
        part = _part(logits, checked, ranks, check_target, inplace_backward, backend)
        return _joint.counts(part, ranks, check_target)
    checked = checked.of_one_process()
    inplace = inplace_backward is not False and autograd.inplace_allowed("logits", logits, inplace_backward)
    return reference.rows_of(_counts(logits, checked, check_target, inplace, backend), checked)


def generalized_dice_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: str = "square",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    activation: str = "softmax",
    include_background: bool = True,
    ignore_index: int | None = None,
    voxel_weight: torch.Tensor | None = None,
    regions: torch.Tensor | None = None,
    num_regions: int | None = None,
    annotated: torch.Tensor | None = None,
    batch: bool = False,
    soft_label: bool = False,
    reduction: str = "mean",
    process_group: Group = None,
    sample_group: Group = None,
    grad_reduction: str = "mean",
    inplace_backward: bool = False,
    check_target: bool | None = None,
    backend: str = "auto",
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
        reduction: "mean" or "sum" over the samples, or "none": (N), or (1) with ``batch``; with R regions (N, R).
        activation: See `tversky_loss`, as for all that follow.
        ignore_index: Voxels with this label do not count.
        voxel_weight: Multiplies a voxel's part in all sums.
        regions: A quotient for each region; the mean is over a sample's regions, then over the samples.
        num_regions: How many regions there are.
        annotated: Which classes were annotated in which sample; the others are in no sum.
        soft_label: True measures the overlap by |p - g|.
        process_group: Ranks that hold parts of one batch or of the same volumes.
        sample_group: Ranks that hold different samples.
        grad_reduction: How the caller joins the ranks' gradients.
        inplace_backward: True writes the gradient over the logits.
        check_target: Whether a label or a dense target out of range raises.
        backend: Which kernels compute.
    """
    _options.one_of("weight", weight, _options.GENERALIZED_WEIGHTS)
    _options.one_of("reduction", reduction, ("mean", "sum", "none"))
    smooth_nr, smooth_dr = _options.number("smooth_nr", smooth_nr), _options.number("smooth_dr", smooth_dr)
    ranks = ranks_of(process_group, sample_group, grad_reduction)
    options: dict[str, Any] = {
        "activation": activation,
        "ignore_index": ignore_index,
        "soft_label": soft_label,
        "batch": batch,
    }
    options |= {"regions": regions, "num_regions": num_regions, "annotated": annotated}
    _options.flag("batch", batch)
    over_samples = ranks if ranks is not None and ranks.samples is not None else None
    if over_samples is not None and regions is not None:
        raise ValueError("sample_group: expected None with regions")
    if over_samples is not None and (batch or reduction == "none"):
        raise ValueError(
            "sample_group: expected batch=False and reduction='mean' or 'sum'; one batch is a process_group"
        )
    of_parts = ranks if over_samples is None else over_samples._replace(samples=None)
    how = (voxel_weight, options, check_target, inplace_backward, of_parts, backend)
    if over_samples is None:
        counts, error = exact_counts(logits, target, *how), None
    else:
        counts, error = attempt(
            lambda: exact_counts(logits, target, *how),
            lambda: logits.new_zeros((*logits.shape[:2], 3), dtype=torch.float64),
        )
    if not _options.flag("include_background", include_background) and logits.size(1) > 1:
        counts = counts[..., 1:, :]
    members, counts = counts[..., -1].amax(-1), counts[..., :3]
    loss = generalized_dice_of_counts(counts.flatten(0, -3), weight, smooth_nr, smooth_dr)
    if regions is not None:
        loss, some = loss.view(members.shape), ~(members <= 0)  # NaN, of bad values, is kept
        loss = torch.where(some, loss, 0.0)
        if reduction == "mean":
            some = some.sum(1)
            loss = loss.sum(1) / some.clamp(min=1)
            return (loss.sum() / (some > 0).sum().clamp(min=1)).to(_arguments.compute_dtype(logits))
    dtype = _arguments.compute_dtype(logits)
    if over_samples is not None:
        token = (weight, smooth_nr, smooth_dr, include_background, reduction, logits.size(1), logits.dtype)
        scale = over_samples.scale if over_samples.parts is None else 1.0
        total, samples = _joint.over_samples(loss, over_samples, scale, token, error, check_target, logits)
        return (total if reduction == "sum" else total / samples.clamp(min=1)).to(dtype)
    loss = loss.to(dtype)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" or loss.numel() == 0 else loss.mean()


def generalized_dice_of_counts(counts: torch.Tensor, weight: str, smooth_nr: float, smooth_dr: float) -> torch.Tensor:
    """The loss of each row (rows) of counts (rows, C, 3); see `generalized_dice_loss`."""
    tp, fp, fn = counts.unbind(-1)
    volume = (tp + fn).detach()
    w = 1 / volume ** {"square": 2, "simple": 1, "uniform": 0}[weight]
    infinite = torch.isinf(w)
    w = torch.where(infinite, 0.0, w)
    w = torch.where(infinite, w.amax(1, keepdim=True), w)
    # 1 - Dice without cancellation: denominator - numerator is computed directly.
    wrong = (w * (fp + fn)).sum(1) + (smooth_dr - smooth_nr)
    denominator = (w * (2 * tp + fp + fn)).sum(1) + smooth_dr
    some = denominator != 0
    return torch.where(some, wrong, 0.0 * wrong) / torch.where(some, denominator, 1.0)


def _split_options(function: str, loss: str, options: dict) -> tuple[dict, dict]:
    # The arguments of a loss that is called by its name, with defaults: what defines it, and how it runs.
    _options.one_of("loss", loss, _options.LOSSES)
    defaults = {**_options.TVERSKY_DEFAULTS, **(_options.CE_DEFAULTS if loss == "tversky_ce" else {})}
    all_options = _arguments.with_defaults(f"{function} with loss={loss!r}", {**defaults, **RUN_DEFAULTS}, options)
    return {name: all_options[name] for name in defaults}, {name: all_options[name] for name in RUN_DEFAULTS}


def deep_supervision_loss(
    logits: Sequence[torch.Tensor],
    target: torch.Tensor,
    weights: Sequence[float] | None = None,
    *,
    loss: str = "tversky",
    resample: str = "nearest",
    **options: Any,
) -> torch.Tensor:
    """The weighted sum of a loss over the outputs of several resolutions, all against one full-resolution target.

    No resampled target is made: each voxel of a coarser output reads its label, and its voxel_weight, where
    `torch.nn.functional.interpolate` would take them, for any ratio of the sizes.

    Args:
        logits: One (N, C, *spatial) tensor a level, of 1 to 3 spatial dimensions, the finest first.
        target: Class indices (N, *any) or (N, 1, *any), or dense (N, C, *any), see `tversky_loss`.
        weights: One factor a level, >= 0, a list, tensor or array; None: 1, 1/2, 1/4, ... divided by their sum.
            (nnU-Net's trainer sets the last of these to 0.) A level of weight 0 is not computed, and has a gradient of
            0.
        loss: "tversky", for `tversky_loss`, or "tversky_ce", for `tversky_ce_loss`.
        resample: Where a coarser voxel reads the target: "nearest" at its corner, as `interpolate(mode="nearest")`,
            or "nearest-exact" at its centre, as MONAI's `DeepSupervisionLoss` and nnU-Net do.
        **options: The arguments of that loss. voxel_weight has the target's spatial sizes.

    Examples:
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
    elif isinstance(weights, torch.Tensor) and weights.requires_grad:
        raise ValueError("weights: expected constants, got a tensor that requires a gradient")
    elif hasattr(weights, "tolist"):
        weights = weights.tolist()
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights: expected {len(logits)} numbers, one a level, got {type(weights).__name__}")
    if len(weights) != len(logits):
        raise ValueError(f"weights: expected {len(logits)} numbers, one a level, got {len(weights)}")
    weights = [_options.number(f"weights[{i}]", w) for i, w in enumerate(weights)]
    options, run = _split_options("deep_supervision_loss", loss, options)
    resample = _options.one_of("resample", resample, _options.RESAMPLE)
    ranks = ranks_of(run["process_group"], run["sample_group"], run["grad_reduction"])
    levels = [_checked_level(level, target, run["check_target"], resample, options) for level in logits]
    if ranks is None:
        losses = [
            _loss(level, c, **run) if w > 0 else None for level, c, w in zip(logits, levels, weights, strict=True)
        ]
    else:
        how = (ranks, run["check_target"], run["inplace_backward"], run["backend"])
        parts = [_part(level, c, *how) for level, c, w in zip(logits, levels, weights, strict=True) if w > 0]
        found = iter(_joint.losses(parts, ranks, run["check_target"]) if parts else ())
        losses = [next(found) if w > 0 else None for w in weights]
    # A level of weight 0 is not read, but stays a part of the graph, as DDP wants it.
    terms = [
        _zero_loss(level, checked) if of_level is None else w * of_level
        for level, checked, w, of_level in zip(logits, levels, weights, losses, strict=True)
    ]
    return functools.reduce(torch.add, terms)


def _checked_level(level, target, check_target, resample: str, options: dict) -> _arguments.Checked:
    are_tensors = isinstance(level, torch.Tensor) and isinstance(target, torch.Tensor)
    if are_tensors and not (level.is_nested or target.is_nested) and 0 in level.shape[2:]:
        # A rank may hold no voxel of a volume. There is nothing to read a target for, so its sizes do not matter.
        target = _of_no_voxels(target, level)
        weight = options["voxel_weight"]
        options = {**options, "voxel_weight": None if weight is None else _of_no_voxels(weight, level)}
        regions = options["regions"]
        options["regions"] = None if regions is None else _of_no_voxels(regions, level)
    return _arguments.check_arguments(level, target, check_target=check_target, resample=resample, **options)


def _of_no_voxels(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    channels = x.shape[1:2] if x.dim() == level.dim() else ()
    return x.new_empty((*x.shape[:1], *channels, *level.shape[2:]))


def _zero_loss(logits: torch.Tensor, checked) -> torch.Tensor:
    # A loss of 0 in the right shape. Its gradient is 0.
    options = checked.plan.options
    nothing = logits[:0].sum(dtype=_arguments.compute_dtype(logits))
    if options.reduction != "none":
        return nothing
    samples, classes = logits.shape[:2]
    kept = classes if options.include_background or classes == 1 else classes - 1
    of_sample = (kept,) if checked.regions is None else (checked.regions.number, kept)
    return nothing.expand(of_sample if options.batch else (samples, *of_sample))


def linear_tversky_loss(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    loss: str = "tversky",
    **options: Any,
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

    Examples:
        >>> head = torch.nn.Conv3d(32, 118, 1)
        >>> loss = tk.linear_tversky_loss(body(image), head.weight, head.bias, label)
    """
    options, run = _split_options("linear_tversky_loss", loss, options)
    head = features, weight, _ = _arguments.check_head(features, weight, bias)
    # Stands for the logits wherever their shape, type and device are asked for, and has one element.
    logits = features.new_empty(()).expand(features.size(0), weight.size(0), *features.shape[2:])
    checked = _arguments.check_arguments(logits, target, check_target=run["check_target"], **options)
    if reference.marginalises(checked) and not checked.all_annotated:  # of logits that exist
        return _loss(reference.linear_logits(*head), checked, **{**run, "inplace_backward": False})
    check_target, inplace_backward, process_group, sample_group, grad_reduction, backend = run.values()
    ranks = ranks_of(process_group, sample_group, grad_reduction)
    checked = checked if ranks is not None else checked.of_one_process()
    inplace = autograd.inplace_allowed("features", features, inplace_backward)
    by_reference = _is_transformed() and _only_by_reference(*head)

    def on_backend(of_counts: bool):
        if by_reference:
            return None
        return _on_backend(logits, checked, _apply_linear, (inplace, head, of_counts), check_target, backend)

    if ranks is not None:
        _joint.check_ranks(ranks, checked.plan.options)

        def counts():
            found = on_backend(True)
            if found is None:
                found = reference.checked_counts(reference.linear_logits(*head), checked, check_target).double()
            return found

        return _joint.losses([_joint.Part(counts, checked, logits)], ranks, check_target)[0]
    result = on_backend(False)
    if result is None:
        return reference.checked_loss(reference.linear_logits(*head), checked, None, check_target)
    return result


def dice_loss(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    """Dice loss: `tversky_loss` with alpha = beta = 0.5; takes its other arguments.

    With smoothing s it equals a Dice loss (2 TP + 2 s) / (2 TP + FP + FN + 2 s).
    """
    return tversky_loss(logits, target, alpha=0.5, beta=0.5, **options)


def jaccard_loss(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    """Jaccard (IoU, Tanimoto) loss: `tversky_loss` with alpha = beta = 1; takes its other arguments."""
    return tversky_loss(logits, target, alpha=1.0, beta=1.0, **options)


def focal_tversky_loss(
    logits: torch.Tensor, target: torch.Tensor, *, gamma: Scalar = 0.75, **options: Any
) -> torch.Tensor:
    """Focal Tversky loss (Abraham and Khan 2018, arXiv:1810.07842): `tversky_loss` with gamma = 0.75.

    The paper writes (1 - TI)^(1/γ) with γ = 4/3: gamma here is that exponent, 1/γ.
    """
    return tversky_loss(logits, target, gamma=gamma, **options)
