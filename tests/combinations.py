"""Any combination of the losses' arguments, drawn by hypothesis, on any backend against the float64 reference."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import torch
from common import INDEX_DTYPES, LOGITS_DTYPES, inputs, loss_and_gradient

import tversky_kernels as tk


@dataclasses.dataclass(frozen=True)
class Combination:
    """The volumes as `make` makes them, and the options of the loss."""

    shape: tuple
    dtype: torch.dtype
    target: str  # "index", "one-hot" or "soft"
    target_dtype: torch.dtype
    target_space: tuple | None  # of a target of another resolution; None: the logits'
    layout: str
    weighted: torch.dtype | None
    seed: int
    scale: float
    excluded: bool  # the last class has logits of -inf, and no voxel's target
    cross_entropy: bool
    options: dict

    def make(self):
        """Logits, target and options, voxel_weight among them."""
        samples, classes, *space = self.shape
        logits, _ = inputs(samples, classes, space, self.dtype, seed=self.seed, scale=self.scale)
        space = self.target_space or tuple(space)
        _, target = inputs(samples, classes, space, target_dtype=torch.int64, seed=self.seed)
        if self.excluded:
            logits[:, -1], target = -torch.inf, target % (classes - 1)
        generator = torch.Generator().manual_seed(self.seed)
        options = dict(self.options)
        if self.weighted is not None:
            options["voxel_weight"] = (torch.rand(target.shape, generator=generator) * 2).to(self.weighted)
        if self.target != "index":
            one_hot = torch.nn.functional.one_hot(target, max(classes, 2)).movedim(-1, 1)[:, -classes:]
            ignored = torch.rand(target.shape, generator=generator) < 0.2
            if self.target == "soft":
                one_hot = 0.6 * one_hot + 0.4 * torch.rand(one_hot.shape, generator=generator)
                if self.excluded:
                    one_hot[:, -1] = 0
            if options.get("ignore_index") is not None:
                one_hot = torch.where(ignored[:, None], options["ignore_index"], one_hot)
            target = one_hot
        target = target.to(self.target_dtype)
        if options["activation"] == "none":
            logits = 0.01 + 0.98 * logits.sigmoid()  # not 0 or 1, where |p - g| has no slope
        logits, target = (_laid_out(x, self.layout) for x in (logits, target))
        return logits, target, options


def _laid_out(x, layout):
    if layout == "channels_last" and x.dim() > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.cat((x, x), -1)[..., : x.size(-1)]
    return x.contiguous()


@st.composite
def cases(draw, tiny=False, most_classes=9, largest=19):
    """tiny: a few voxels of float64, for derivatives of higher order."""
    classes = draw(st.integers(1, 4 if tiny else most_classes))
    largest = 3 if tiny else largest
    dimensions = draw(st.integers(1, 2 if tiny else 3))
    space = tuple(draw(st.lists(st.integers(1, largest), min_size=dimensions, max_size=dimensions)))
    other = tuple(draw(st.lists(st.integers(1, largest), min_size=dimensions, max_size=dimensions)))
    cross_entropy = draw(st.booleans())
    activation = draw(st.sampled_from(["softmax", "sigmoid"] + ([] if cross_entropy else ["none"])))
    activation = "sigmoid" if classes == 1 and activation == "softmax" else activation
    target = draw(st.sampled_from(["index", "index", "one-hot", "soft"]))
    floating = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    target_dtypes = {"index": INDEX_DTYPES, "one-hot": [*INDEX_DTYPES, *floating], "soft": floating}[target]
    resampled = draw(st.integers(0, 3)) == 0
    weight = st.one_of(st.just(0.0), st.floats(1e-3, 2))
    per_class = st.lists(st.floats(0, 2), min_size=classes, max_size=classes)
    options = {
        "activation": activation,
        "alpha": draw(st.one_of(st.floats(0, 2), per_class)),
        "beta": draw(st.one_of(st.floats(0, 2), per_class)),
        "class_weight": draw(st.one_of(st.none(), per_class)),
        "gamma": draw(st.sampled_from([1.0, 2.0] if tiny else [0.5, 0.75, 1.0, 2.0])),
        "smooth_nr": draw(st.sampled_from([1e-2] if tiny else [0.0, 1e-5, 1.0])),
        "smooth_dr": draw(st.sampled_from([1.0] if tiny else [1e-5, 1.0])),
        "ignore_index": draw(st.sampled_from([None, 0, 1, 100])),
        "include_background": draw(st.booleans()),
        "batch": draw(st.booleans()),
        "absent": draw(st.sampled_from(["keep", "zero", "skip"])),
        "soft_label": False if tiny else draw(st.booleans()),
        "squared": draw(st.sampled_from([False, False, True])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    if options["squared"]:
        options.update(soft_label=False, beta=options["alpha"] if isinstance(options["alpha"], float) else 0.5)
        options["alpha"] = options["beta"]
    if cross_entropy:
        options.update(
            tversky_weight=draw(st.sampled_from([0.0, 1.0, 0.3])),
            ce_weight=draw(st.sampled_from([1.0, 0.7])),
            # A tiny sum of weights would be divided by, and its loss be more than a float.
            ce_class_weight=draw(st.one_of(st.none(), st.lists(weight, min_size=classes, max_size=classes))),
            label_smoothing=draw(st.sampled_from([0.0, 0.0, 0.1])),
            focal_gamma=draw(st.sampled_from([0.0, 0.0, 2.0] if tiny else [0.0, 0.0, 0.5, 2.0])),
        )
    excludable = classes > 2 and activation != "none" and not options.get("label_smoothing") and not tiny
    return Combination(
        shape=(draw(st.integers(1, 2 if tiny else 3)), classes, *space),
        dtype=torch.float64 if tiny else draw(st.sampled_from(LOGITS_DTYPES)),
        target=target,
        target_dtype=draw(st.sampled_from(target_dtypes)),
        target_space=other if resampled else None,
        layout=draw(st.sampled_from(["contiguous", "channels_last", "sliced"])),
        weighted=draw(st.sampled_from([None, None, torch.float32, torch.bool, torch.float16])),
        seed=draw(st.integers(0, 2**31)),
        scale=draw(st.sampled_from([0.1, 1.0, 10.0])),
        excluded=excludable and draw(st.integers(0, 3)) == 0,
        cross_entropy=cross_entropy,
        options=options,
    )


def _loss(case, backend):
    if case.target_space is not None:  # one level, whose target has another resolution
        run = {} if backend == "reference" else {"backend": backend}
        kind = "tversky_ce" if case.cross_entropy else "tversky"
        return lambda z, g, **o: tk.deep_supervision_loss([z], g, loss=kind, **({"backend": "reference"} | run), **o)
    if backend == "reference":
        return tk.reference.tversky_ce_loss if case.cross_entropy else tk.reference.tversky_loss
    function = tk.tversky_ce_loss if case.cross_entropy else tk.tversky_loss
    return lambda z, g, **o: function(z, g, backend=backend, **o)


def check_case(case, backend, device="cpu", rounding=1.0):
    """Loss and gradient, to what the type of the logits allows."""
    logits, target, options = case.make()
    in_double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    exact = target.double() if target.is_floating_point() else target
    true_loss, true_gradient = loss_and_gradient(_loss(case, "reference"), logits.double(), exact, **in_double)
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    loss, gradient = loss_and_gradient(_loss(case, backend), logits.to(device), target.to(device), **there)
    loss, gradient = loss.cpu(), gradient.cpu()
    assert loss.shape == true_loss.shape
    assert gradient.dtype == logits.dtype
    scale = max(1.0, true_loss.abs().max().item()) if true_loss.numel() else 1.0
    assert (loss.double() - true_loss).abs().max().item() <= 2e-6 * scale
    # Against the largest gradient there is, for one that ought to be 0 has no relative error.
    largest = true_gradient.abs().max().item()
    eps = max(torch.finfo(logits.dtype).eps, 2e-6 if logits.dtype != torch.float64 else 1e-11)
    smallest = torch.finfo(logits.dtype).smallest_normal * torch.finfo(logits.dtype).eps
    error = (gradient.double() - true_gradient).abs().max().item()
    assert error <= 2 * rounding * eps * largest + smallest + 1e-9


def check_second_derivatives(case, backend):
    """gradcheck and gradgradcheck in float64."""
    logits, target, options = case.make()
    logits = logits.requires_grad_()
    loss = _loss(case, backend)
    assert torch.autograd.gradcheck(lambda z: loss(z, target, **options), logits, atol=1e-5)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, target, **options), logits, atol=1e-4)
