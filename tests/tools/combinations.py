"""Any combination of the losses' arguments, drawn by hypothesis, on any backend against the float64 reference."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math

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
    how: str  # the loss is called, one of HOW
    upstream: float  # the gradient of the loss
    resample: str  # of a target of another resolution
    regions: tuple | None  # their number, their type, whether each class has its own, and whether they are runs
    partly_annotated: bool

    def make(self):
        """Logits, target and options, voxel_weight, regions and annotated among them."""
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
        if self.regions is not None:
            count, dtype, by_class, runs = self.regions
            shape = (samples, classes, *space) if by_class else (samples, *space)
            ids = torch.randint(-1 if dtype.is_signed else 0, count, shape, generator=generator)
            if runs:
                ids = (torch.arange(ids[0].numel()) // 23 % count).view(1, *shape[1:]).expand(shape)
            options.update(regions=ids.to(dtype), num_regions=count)
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
        if self.partly_annotated:
            options["annotated"] = self._annotated(target, generator)
        target = target.to(self.target_dtype)
        if options["activation"] == "none":
            logits = 0.01 + 0.98 * logits.sigmoid()  # not 0 or 1, where |p - g| has no slope
        logits, target = (_laid_out(x, self.layout) for x in (logits, target))
        return logits, target, options

    def _annotated(self, target, generator):
        # The background of a softmax, all classes that a sample's target has, and some others.
        samples, classes, *_ = self.shape
        annotated = torch.rand(samples, classes, generator=generator) < 0.5
        ignored = self.options.get("ignore_index")
        counted = torch.ones_like(target, dtype=torch.bool) if ignored is None else target != ignored
        if self.target == "index" or (classes == 1 and not self.target_dtype.is_floating_point):
            labels = range(classes) if classes > 1 else [1]
            present = [((target == c) & counted).flatten(1).any(1) for c in labels]
            annotated |= torch.stack(present, 1)
        elif self.options["activation"] == "softmax":
            annotated |= ((target != 0) & counted.any(1, keepdim=True)).flatten(2).any(2)
        if self.options["activation"] == "softmax":
            annotated[:, 0] = True
        return annotated


def _laid_out(x, layout):
    if layout == "channels_last" and x.dim() > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.cat((x, x), -1)[..., : x.size(-1)]
    return x.contiguous()


#: How a loss is called: as a function or module; in place, on something computed, also under saved-tensor hooks or as a
#: part of a larger tensor; as a module whose options are set after another call; with its numbers as tensors.
HOW = ("function", "module", "changed module", "in place", "in place under hooks", "in place of a part", "tensors")


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
        how="function" if tiny else draw(st.sampled_from(HOW)),
        upstream=1.0 if tiny else draw(st.sampled_from(UPSTREAM)),
        resample=draw(st.sampled_from(["nearest", "nearest-exact"])),
        regions=draw(_regions) if draw(st.integers(0, 2)) == 0 else None,
        partly_annotated=draw(st.integers(0, 4)) == 0,
    )


_REGION_TYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
_regions = st.tuples(st.sampled_from([1, 2, 3, 9, 100]), st.sampled_from(_REGION_TYPES), st.booleans(), st.booleans())


#: Gradients of the loss: nearly all of them 1, some that a GradScaler makes, and what follows from a loss that is none.
UPSTREAM = [1.0, 1.0, 1.0, -3.0, 2.0**16, 2.0**90, math.inf, math.nan]


def _loss(case, backend, how="function"):
    run = {"backend": backend}
    if how.startswith("in place"):
        run["inplace_backward"] = True
    if case.target_space is not None:  # one level, whose target has another resolution
        run.update(loss="tversky_ce" if case.cross_entropy else "tversky", resample=case.resample)
        function, module = tk.deep_supervision_loss, tk.DeepSupervisionLoss
    else:
        function = tk.tversky_ce_loss if case.cross_entropy else tk.tversky_loss
        module = tk.TverskyCELoss if case.cross_entropy else tk.TverskyLoss
    levels = (lambda z: [z]) if case.target_space is not None else (lambda z: z)
    if how == "module":
        return lambda z, g, **o: module(**run, **_lasting(o))(levels(z), g, **_of_call(o))
    if how == "changed module":
        return lambda z, g, **o: _changed(module, levels(z), g, run, _lasting(o))(levels(z), g, **_of_call(o))
    if how == "tensors":
        numbers = ("gamma", "smooth_nr", "smooth_dr", "tversky_weight", "ce_weight", "label_smoothing")
        as_tensor = functools.partial(torch.tensor, dtype=torch.float64, requires_grad=True)

        def with_tensors(z, g, **o):
            o.update({name: as_tensor(o[name]).to(z.device) for name in numbers if name in o})
            return function(levels(z), g, **run, **o)

        return with_tensors
    return lambda z, g, **o: function(levels(z), g, **run, **o)


def _of_call(options):
    return {k: v for k, v in options.items() if k in ("voxel_weight", "regions", "annotated")}


def _lasting(options):
    return {k: v for k, v in options.items() if k not in _of_call(options)}


def _changed(module, z, g, run, options):
    # A module that has been called with other options, and is then given these.
    criterion = module(**run, activation=options["activation"], ignore_index=options["ignore_index"], smooth_nr=0.25)
    criterion(z, g)
    for name, value in {"smooth_nr": 1e-5, **options}.items():
        setattr(criterion, name, value)
    return criterion


def _loss_and_gradient(case, backend, logits, target, options, upstream):
    loss = _loss(case, backend, case.how)
    if not case.how.startswith("in place"):
        return loss_and_gradient(loss, logits, target, upstream=upstream, **options)
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with hooks if case.how.endswith("hooks") else contextlib.nullcontext():
        if case.how.endswith("part"):
            z = torch.stack((leaf, leaf)).unbind(0)[1]
        else:
            z = torch.nn.functional.leaky_relu(leaf, 1.0) if case.how.endswith("hooks") else leaf * 1
        value = loss(z, target, **options)
    (gradient,) = torch.autograd.grad(value, leaf, torch.full_like(value, upstream))
    return value.detach(), gradient


def check_case(case, backend, device="cpu", rounding=1.0):
    """Loss and gradient, scaled back, to what the type of the logits allows."""
    logits, target, options = case.make()
    in_double = {k: v.double() if k == "voxel_weight" else v for k, v in options.items()}
    exact = target.double() if target.is_floating_point() else target
    true_loss, true_gradient = loss_and_gradient(_loss(case, "reference"), logits.double(), exact, **in_double)
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    upstream = torch.full_like(true_loss, case.upstream).to(device)
    if case.how.startswith("in place"):
        upstream = case.upstream
    loss, gradient = _loss_and_gradient(case, backend, logits.to(device), target.to(device), there, upstream)
    loss, gradient = loss.cpu(), gradient.cpu()
    assert loss.shape == true_loss.shape
    assert gradient.dtype == logits.dtype
    assert gradient.shape == logits.shape
    scale = max(1.0, true_loss.abs().max().item()) if true_loss.numel() else 1.0
    assert (loss.double() - true_loss).abs().max().item() <= 2e-6 * scale
    if true_gradient.numel() == 0:
        return
    most = torch.finfo(logits.dtype).max / 2**12  # coefficients are larger than what p (1 - p) makes of them
    if not math.isfinite(case.upstream) or true_gradient.abs().max().item() * abs(case.upstream) > most:
        # Infinite or NaN, where there is a gradient at all; and if numbers, then the right ones.
        # By torch's table ("blocks", regions, numbers in tensors) a gradient that is 0 in the type stays 0.
        by_torch = backend == "blocks" or case.regions is not None or case.partly_annotated or case.how == "tensors"
        least = torch.finfo(logits.dtype).tiny if by_torch else 0.0
        if not math.isfinite(case.upstream) and true_gradient.abs().max().item() > least:
            assert not torch.isfinite(gradient).all()
        return
    if abs(case.upstream) > 2.0**28 and not torch.isfinite(gradient).all():
        # gamma < 1 makes coefficients of up to 1e30, beside which there is room for such a factor, and no more.
        assert options["gamma"] < 1
        return
    limits = torch.finfo(logits.dtype)
    smallest = limits.smallest_normal * limits.eps / abs(case.upstream) + 1e-9
    error = (gradient.double() / case.upstream - true_gradient).abs().max().item()
    # Against the largest gradient there is, for one that ought to be 0 has no relative error.
    largest = true_gradient.abs().max().item()
    eps = max(limits.eps, 2e-6 if logits.dtype != torch.float64 else 1e-11)
    if error <= 2 * rounding * eps * largest + smallest:
        return
    # Or no further from it than twice the plain formula in the same type, or than one rounding of logits and target
    # moves it: some differences have no more digits.
    _, plain = loss_and_gradient(_loss(case, "reference"), logits, target, **options)
    generator = torch.Generator().manual_seed(case.seed)
    rounded = (
        x * (1 - limits.eps * torch.randint(0, 2, x.shape, generator=generator)) if x.is_floating_point() else x
        for x in (logits.double(), exact)
    )
    _, moved = loss_and_gradient(_loss(case, "reference"), *rounded, **in_double)
    allowed = max((2 * (plain.double() - true_gradient)).abs().max(), (moved - true_gradient).abs().max()).item()
    assert error <= allowed + smallest


def check_second_derivatives(case, backend):
    """gradcheck and gradgradcheck in float64."""
    logits, target, options = case.make()
    logits = logits.requires_grad_()
    loss = _loss(case, backend)
    assert torch.autograd.gradcheck(lambda z: loss(z, target, **options), logits, atol=1e-5)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, target, **options), logits, atol=1e-4)
