"""What the tests share: inputs, the truth, and how far from it is too far."""

from __future__ import annotations

import torch

import tversky_kernels as tk

LOGITS_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
CPU_CAPABILITIES = {"baseline": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3}


def inputs(samples, classes, spatial, dtype=torch.float32, target_dtype=torch.int64, seed=0, scale=3.0, labels=None):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(samples, classes, *spatial, generator=generator, dtype=torch.float64) * scale).to(dtype)
    labels = max(classes, 2) if labels is None else labels
    target = torch.randint(0, labels, (samples, *spatial), generator=generator).to(target_dtype)
    return logits, target


def loss_and_gradient(function, logits, *arguments, upstream=None, **options):
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(logits, *arguments, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    return loss.detach(), gradient


def truth(logits, target, upstream=None, reference=tk.reference.tversky_loss, **options):
    """Loss and gradient of the reference in float64, from the very values that the volumes have in their own type."""
    target = target.double() if target.is_floating_point() else target
    options = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()
    }
    return loss_and_gradient(reference, logits.double(), target, upstream=upstream, **options)


def relative(actual, expected, least_norm=0.0):
    """‖actual - expected‖ / ‖expected‖, in float64; NaN is never close."""
    actual, expected = actual.double(), expected.double()
    norm = max(expected.norm().item(), least_norm)
    return (actual - expected).norm().item() / norm if norm > 0 else actual.norm().item()


def check_against_truth(
    function,
    logits,
    target,
    upstream=None,
    loss_tolerance=1e-6,
    least_norm=0.0,
    rounding=1.02,
    reference=tk.reference.tversky_loss,
    **options,
):
    """Loss to 1e-6, float32 gradients to 1e-6, half precision no worse than rounding the true gradient once.

    least_norm: the norm below which a gradient is as good as none, for predictions that are saturated.
    rounding: how many times the error of rounding the true gradient once half precision may be off.
    """
    true_loss, true_gradient = truth(logits, target, upstream, reference, **options)
    loss, gradient = loss_and_gradient(function, logits, target, upstream=upstream, **options)
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert loss.shape == true_loss.shape
    assert gradient.dtype == logits.dtype
    assert gradient.shape == logits.shape
    scale = true_loss.abs().max().item() if true_loss.numel() else 0.0
    small = {torch.float64: 1e-13}.get(logits.dtype, loss_tolerance) * max(scale, 1e-30)
    assert torch.isfinite(loss).all()
    assert (loss.double() - true_loss).abs().max().item() <= small if loss.numel() else True
    if true_gradient.numel() == 0:
        return
    assert torch.isfinite(gradient).all()
    if logits.dtype in (torch.float16, torch.bfloat16):
        # No worse than rounding the true gradient once, but where that lands on a tie.
        once = relative(true_gradient.to(logits.dtype), true_gradient, least_norm)
        assert relative(gradient, true_gradient, least_norm) <= rounding * once + 1e-6
    else:
        assert (
            relative(gradient, true_gradient, least_norm) <= {torch.float32: 1e-6, torch.float64: 1e-13}[logits.dtype]
        )


#: Losses whose coefficients of a class are alike or, where hardly a voxel is wrong, a thousand times apart and more.
FORMS = {
    "Dice": {"alpha": 0.5, "beta": 0.5},
    "L1": {"alpha": 0.5, "beta": 0.5, "soft_label": True},
    "squared": {"alpha": 0.5, "beta": 0.5, "squared": True},
    "false positives alone": {"alpha": 1.0, "beta": 0.0},
    "false negatives alone": {"alpha": 0.0, "beta": 1.0},
}


def nearly_right(classes, activation, dense):
    """Logits that are right everywhere, and a target."""
    logits, target = inputs(2, classes, (7, 8, 9), scale=1.0)
    one_hot = torch.nn.functional.one_hot(target, classes).movedim(-1, 1).float()
    logits = logits + (16 * one_hot - 8 if activation == "sigmoid" else 8 * one_hot)
    return logits, one_hot if dense or activation == "sigmoid" else target


def check_nearly_right(function, form, activation, dense):
    """Also of a class that all voxels are of, whose gradient is nothing but what smoothing leaves."""
    options = {"activation": activation, **FORMS[form]}
    check_against_truth(function, *nearly_right(3, activation, dense), loss_tolerance=3e-6, **options)
    if dense:
        alike = torch.zeros(1, 2, 5, 8)
        alike[:, 1] = 1
        logits, _ = inputs(1, 2, (5, 8), scale=0.1)
        check_against_truth(function, logits, alike, **{**options, "smooth_nr": 0.0})


def check_immense_coefficients(gradient_pass, overlap, device="cpu"):
    """The largest that the table makes, of all classes at once and after a GradScaler's factor: the gradient is finite,
    and 0 where a voxel does not count. Those beyond the type are infinite or NaN, and none of them is a number."""
    logits, target = inputs(1, 20, (64,))
    dense = torch.nn.functional.one_hot(target, 20).movedim(-1, 1).float()
    dense[..., 2] = 0
    for coefficient, upstream in ((1e30, 2.0**16), (1e80, 1.0)):
        u = torch.full((1, 20, 2), coefficient, dtype=torch.float64)
        u[:, ::2, 1] = 0.0
        arguments = (torch.tensor(upstream), u, logits, dense)
        gradient = gradient_pass(*(x.to(device) for x in arguments), None, 0, 0, overlap, 0, 0.0, False).cpu()
        if coefficient == 1e80:
            assert not torch.isfinite(gradient[..., :2]).any()
            continue
        assert torch.isfinite(gradient).all()
        assert torch.equal(gradient[..., 2], torch.zeros(1, 20))
