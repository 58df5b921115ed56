"""Partial labels: classes that were not annotated in a sample are a part of its background."""

from __future__ import annotations

import pytest
import torch
from common import inputs, loss_and_gradient

import tversky_kernels as tk

BACKENDS = ["cpu", "blocks", "reference"]
ANNOTATED = torch.tensor([[True, True, False, False], [True, False, True, True]])


def volumes(space=(5, 6, 7), dtype=torch.float64):
    """Labels that were annotated: the others are 0."""
    logits, target = inputs(2, 4, space, dtype)
    for n in range(2):
        target[n][~ANNOTATED[n][target[n].long()]] = 0
    return logits, target


def merged(logits, n):
    """One sample with the channels that were not annotated added to the background by hand: the others' logits."""
    kept = ANNOTATED[n]
    background = logits[n : n + 1, torch.cat([torch.tensor([True]), ~kept[1:]])].logsumexp(1, keepdim=True)
    return torch.cat([background, logits[n : n + 1, 1:][:, kept[1:]]], 1)


def renumbered(target, n):
    new = torch.cumsum(ANNOTATED[n].long(), 0) - 1
    return new[target[n : n + 1].long()]


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (tk.tversky_loss, {}),
        (tk.tversky_loss, {"gamma": 0.75, "include_background": False}),
        (tk.tversky_ce_loss, {}),
        (tk.tversky_ce_loss, {"focal_gamma": 2.0}),
        (tk.tversky_ce_loss, {"label_smoothing": 0.1}),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_merged_by_hand(backend, loss, options):
    logits, target = volumes()
    logits.requires_grad_()
    found = loss(logits, target, annotated=ANNOTATED, reduction="none", backend=backend, **options)
    for n in range(2):
        expected = loss(merged(logits, n), renumbered(target, n), reduction="none", backend="reference", **options)
        row = found[n][ANNOTATED[n][-found.size(1) :]]
        torch.testing.assert_close(row, expected[0])
        (gradient,) = torch.autograd.grad(row.sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_is_over_what_was_annotated(backend):
    logits, target = volumes()
    each = tk.tversky_loss(logits, target, annotated=ANNOTATED, reduction="none", backend=backend)
    found = tk.tversky_loss(logits, target, annotated=ANNOTATED, backend=backend)
    torch.testing.assert_close(found, each[ANNOTATED].mean())
    batch = tk.tversky_loss(logits, target, annotated=ANNOTATED, batch=True, reduction="none", backend=backend)
    assert batch.shape == (4,)
    nowhere = ANNOTATED.clone()
    nowhere[:, 3] = False
    target[target == 3] = 0
    found = tk.tversky_loss(logits, target, annotated=nowhere, batch=True, backend=backend)
    rows = tk.tversky_loss(logits, target, annotated=nowhere, batch=True, reduction="none", backend=backend)
    torch.testing.assert_close(found, rows[:3].mean())
    assert rows[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loss", [tk.tversky_loss, tk.tversky_ce_loss])
def test_all_annotated_gives_the_same_bits(loss, dtype):
    logits, target = inputs(2, 4, (5, 6, 7), dtype)
    plain = loss_and_gradient(loss, logits, target)
    found = loss_and_gradient(loss, logits, target, annotated=torch.ones(2, 4, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_by_themselves(backend):
    """sigmoid: the entries of what was not annotated are left out of both parts."""
    logits, target = volumes()
    dense = torch.nn.functional.one_hot(target.long(), 4).movedim(-1, 1).double()
    logits.requires_grad_()
    for g in (target, dense):
        how = {"activation": "sigmoid", "annotated": ANNOTATED, "backend": backend}
        found = tk.tversky_ce_loss(logits, g, tversky_weight=0.0, **how)
        entries = ANNOTATED.view(2, 4, 1, 1, 1).expand_as(dense)
        ce = torch.nn.functional.binary_cross_entropy_with_logits(logits[entries], dense[entries])
        torch.testing.assert_close(found, ce)
        (gradient,) = torch.autograd.grad(tk.tversky_loss(logits, g, **how), logits)
        assert (gradient[~entries] == 0).all()
    # A dense target of a class that nobody drew may hold anything.
    anything = torch.where(entries, dense, 1.0)
    torch.testing.assert_close(tk.tversky_loss(logits, anything, **how), tk.tversky_loss(logits, dense, **how))


def test_regions_of_partial_labels():
    logits, target = volumes()
    regions = torch.arange(target[0].numel()).view(1, 5, 6, 7).expand(2, 5, 6, 7) // 70
    found = {}
    for backend in BACKENDS:
        how = {"annotated": ANNOTATED, "regions": regions, "num_regions": 3, "backend": backend}
        found[backend] = loss_and_gradient(tk.tversky_ce_loss, logits, target, **how)
        torch.testing.assert_close(found[backend], found["cpu"])
    rows = tk.tversky_loss(logits, target, reduction="none", **how)
    torch.testing.assert_close(
        tk.tversky_loss(logits, target, **how),
        torch.stack([rows[n][:, ANNOTATED[n]].mean() for n in range(2)]).mean(),
    )


def test_generalised_dice():
    logits, target = volumes()
    each = tk.generalized_dice_loss(logits, target, annotated=ANNOTATED, reduction="none")
    for n in range(2):
        expected = tk.generalized_dice_loss(merged(logits, n), renumbered(target, n), reduction="none")
        torch.testing.assert_close(each[n : n + 1], expected)


def test_derivatives():
    logits, target = volumes((2, 2))
    logits.requires_grad_()

    def loss(z):
        return tk.tversky_ce_loss(z, target, annotated=ANNOTATED, label_smoothing=0.1, reduction="none")

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    logits, target = volumes(dtype=dtype)
    true_loss, true = loss_and_gradient(tk.tversky_loss, logits.double(), target, annotated=ANNOTATED)
    loss, gradient = loss_and_gradient(tk.tversky_loss, logits, target, annotated=ANNOTATED)
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), true, rtol=1e-2, atol=1e-6)


def test_other_callers():
    """Counts, the last layer, several resolutions, modules, compiled graphs."""
    logits, target = volumes()
    expected = tk.tversky_loss(logits, target, annotated=ANNOTATED)
    assert tk.TverskyLoss()(logits, target, annotated=ANNOTATED) == expected
    counts = tk.overlap_counts(logits, target, annotated=ANNOTATED)
    assert (counts.fp[~ANNOTATED] == 0).all()
    torch.testing.assert_close(tk.deep_supervision_loss([logits], target, annotated=ANNOTATED), expected)
    compiled = torch.compile(lambda z: tk.tversky_loss(z, target, annotated=ANNOTATED), fullgraph=True)
    torch.testing.assert_close(compiled(logits), expected)
    features, weight = torch.randn(2, 5, 5, 6, 7, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    z = torch.einsum("nkxyz,ck->ncxyz", features, weight)
    torch.testing.assert_close(
        tk.linear_tversky_loss(features, weight, None, target, annotated=ANNOTATED),
        tk.tversky_loss(z, target, annotated=ANNOTATED),
    )


@pytest.mark.parametrize(
    ("annotated", "error", "message"),
    [
        ([[True]], TypeError, "annotated: expected a tensor, got list"),
        (ANNOTATED.long(), TypeError, "annotated: expected bool, got torch.int64"),
        (ANNOTATED[:1], ValueError, r"annotated: expected \(N, C\), here \(2, 4\), got \(1, 4\)"),
        (~ANNOTATED, ValueError, "annotated: with softmax expected class 0"),
    ],
)
def test_bad_input(annotated, error, message):
    logits, target = volumes()
    with pytest.raises(error, match=message):
        tk.tversky_loss(logits, target, annotated=annotated)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_that_was_not_annotated(backend):
    logits, target = volumes()
    target[0, 0, 0, 0] = 3
    with pytest.raises(ValueError, match="target: expected labels that were annotated in their sample, got 3"):
        tk.tversky_loss(logits, target, annotated=ANNOTATED, backend=backend)
    loss = tk.tversky_loss(logits, target, annotated=ANNOTATED, backend=backend, check_target=False)
    assert torch.isnan(loss)
