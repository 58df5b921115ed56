"""The functions that users call: they check the arguments, choose a backend and run it."""

from __future__ import annotations

import torch

from . import _arguments, _backends, autograd, reference

__all__ = ["dice_loss", "focal_tversky_loss", "jaccard_loss", "tversky_loss"]


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
            their own type; or a dense target (N, C, *spatial), one-hot or soft, of any real type. Dense targets,
            and with them targets that require a gradient, take the reference path for now.
        alpha: Weight of the false positives, >= 0: a number, or one a class.
        beta: Weight of the false negatives, >= 0: a number, or one a class.
        gamma: Exponent, > 0. Where 1 - TI is 0 and gamma < 1 the gradient is 0, not infinite.
        smooth_nr: Added to the numerator, >= 0.
        smooth_dr: Added to the denominator, >= 0. Where the denominator is still 0, the loss is 0.
        activation: "softmax"; "sigmoid", every channel by itself (C = 1 with labels {0, 1} is the binary case);
            "none", for logits that are probabilities already.
        class_weight: One factor a class, >= 0. It multiplies and is not renormalised.
        include_background: False leaves channel 0 out of the result (without effect at C = 1).
        ignore_index: Voxels with this label count nowhere, and their gradient is exactly 0. Any integer.
        voxel_weight: (N, *spatial) or (N, 1, *spatial), bool, uint8 or floating, >= 0: multiplies the voxel's part in
            all sums.
        batch: True sums the counts over the batch first, and gives one index a class.
        absent: What becomes of a class that the target lacks, in that sample or in the batch: "keep" it as the formula
            says, "zero" its loss, or "skip" it in the mean.
        soft_label: True measures a soft target by its L1 distance (Wang et al. 2023, arXiv:2303.16296).
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
    if not isinstance(inplace_backward, bool):
        raise TypeError(f"inplace_backward: expected True or False, got {inplace_backward!r}")
    chosen = _backends.choose(backend, logits.device, "dense targets" if volumes.dense else None)
    if chosen == "reference":
        return reference.checked_loss(logits, volumes, options, class_parameters, process_group, check_target)

    compiling = torch.compiler.is_compiling()
    check = logits.device.type == "cpu" if check_target is None else check_target
    if check and chosen != "cpu" and not compiling:  # the CPU kernels check while they read
        _arguments.raise_for_bad_values(logits, volumes, ignore_index)
    arguments = (
        logits,
        volumes.target,
        volumes.voxel_weight,
        class_parameters,
        options,
        check,
        inplace_backward,
        process_group,
        chosen,
    )
    if compiling:
        return autograd.TverskyLoss.apply(*arguments)[0]
    try:
        return autograd.TverskyLoss.apply(*arguments)[0]
    except RuntimeError:
        # The kernel found a bad label or weight. Say it as an error of the argument; anything else is passed on.
        _arguments.raise_for_bad_values(logits, volumes, ignore_index)
        raise


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
