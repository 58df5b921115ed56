"""The backend of torch's own operators, block by block: its numbers, its memory, and when "auto" takes it."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from combinations import cases, check_case, check_second_derivatives
from common import inputs, loss_and_gradient, truth

import tversky_kernels as tk
from tversky_kernels import _backends, _blocks, _ops
from tversky_kernels._memory import peak_bytes


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Several blocks of each small volume, with a last one that is not full."""
    if "whole blocks" not in request.keywords:
        monkeypatch.setattr(_blocks, "ROUND", 16)
        monkeypatch.setattr(_blocks, "BLOCK_BYTES", {"cpu": 1})


def with_small_blocks(function, *arguments):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(_blocks, "ROUND", 16)
        monkeypatch.setattr(_blocks, "BLOCK_BYTES", {"cpu": 1})
        function(*arguments)


@hypothesis.settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
@hypothesis.given(cases())
def test_any_combination(case):
    with_small_blocks(check_case, case, "blocks")


@hypothesis.settings(
    max_examples=10, deadline=None, derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)  # fmt: skip
@hypothesis.given(cases(tiny=True))
def test_second_derivatives(case):
    with_small_blocks(check_second_derivatives, case, "blocks")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_has_the_logits_layout(layout, dtype):
    logits, target = inputs(2, 5, (6, 7, 9), dtype)
    logits = logits.to(memory_format=layout)
    loss, gradient = loss_and_gradient(tk.tversky_ce_loss, logits, target, backend="blocks", batch=True)
    expected, true = truth(logits, target, reference=tk.reference.tversky_ce_loss, batch=True)
    assert gradient.is_contiguous(memory_format=layout)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient.double() - true).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-2) * true.abs().max()


def test_the_last_layer_within():
    features, target = inputs(2, 6, (5, 7, 6), torch.float64, labels=4)
    head = tk.TverskyHead(6, 4, dtype=torch.float64, loss="tversky_ce", backend="blocks")
    loss, gradient = loss_and_gradient(head, features, target)
    of_weight = torch.autograd.grad(head(features, target), head.weight)[0]
    head.backend = "reference"
    expected, true = loss_and_gradient(head, features, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, true)
    torch.testing.assert_close(of_weight, torch.autograd.grad(head(features, target), head.weight)[0])


def test_counts_and_deep_supervision():
    logits, target = inputs(2, 3, (8, 6, 10), torch.float64)
    for ours, expected in zip(
        *(tk.overlap_counts(logits, target, backend=b) for b in ("blocks", "reference")), strict=True
    ):
        torch.testing.assert_close(ours, expected)
    levels = [logits, logits[:, :, ::2, ::2, ::2]]
    deep = [tk.deep_supervision_loss(levels, target, loss="tversky_ce", backend=b) for b in ("blocks", "reference")]
    torch.testing.assert_close(*deep)


def test_bad_values():
    logits, target = inputs(2, 3, (6, 5, 4))
    target[1, 2] = 7
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 3\), got 7"):
        tk.tversky_loss(logits, target, backend="blocks")
    assert tk.tversky_loss(logits, target, backend="blocks", check_target=False, reduction="none").isnan().all()
    with pytest.raises(ValueError, match="target: expected values of a dense target in"):
        tk.tversky_loss(logits, 255 * torch.ones_like(logits), backend="blocks")
    with pytest.raises(ValueError, match="voxel_weight: expected values >= 0"):
        tk.tversky_loss(logits, target % 3, voxel_weight=-torch.ones(2, 6, 5, 4), backend="blocks")


def test_auto_takes_it_where_no_kernels_are(monkeypatch):
    logits, target = inputs(1, 3, (6, 5, 4))
    assert tk.available_backends()["blocks"] is True
    assert _backends.choose("auto", torch.device("cpu"), None) == "cpu"
    monkeypatch.setattr(_ops, "CPU_MISSING", "it was not built")
    for device in ("cpu", "mps", "xpu"):
        assert _backends.choose("auto", torch.device(device), None) == "blocks"
    assert _backends.choose("auto", torch.device("cpu"), "the gradient of a target") == "reference"
    assert _backends.choose("auto", torch.device("meta"), None) == "reference"
    taken = []
    monkeypatch.setattr(_blocks, "_blocks", lambda z, blocks=_blocks._blocks: taken.append(z.shape) or blocks(z))
    loss, _ = loss_and_gradient(tk.tversky_loss, logits, target)
    assert len(taken) == 2
    assert loss.item() == pytest.approx(tk.reference.tversky_loss(logits, target).item(), rel=1e-6)


def test_it_is_not_compiled(monkeypatch):
    logits, target = inputs(1, 3, (6, 5, 4))
    named = torch.compile(lambda z, t: tk.tversky_loss(z, t, backend="blocks"), backend="eager")
    with pytest.raises(Exception, match="is not traced"):
        named(logits, target)
    monkeypatch.setattr(_ops, "CPU_MISSING", "it was not built")
    auto = torch.compile(lambda z, t: tk.tversky_loss(z, t), backend="eager", fullgraph=True)
    assert auto(logits, target).item() == pytest.approx(tk.reference.tversky_loss(logits, target).item(), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"ce_weight": 1.0}, {"inplace_backward": True}])
def test_memory_is_one_gradient_and_some_blocks(options, monkeypatch):
    monkeypatch.undo()  # blocks of their own size
    source, target = inputs(1, 4, (64, 128, 128), target_dtype=torch.uint8)
    logits = source.requires_grad_() * 1
    options = {"ce_weight": 0.0, "backend": "blocks", **options}
    taken = peak_bytes(
        lambda: torch.autograd.grad(tk.tversky_ce_loss(logits, target, **options), logits), logits.device
    )
    fresh = 0 if "inplace_backward" in options else logits.numel() * 4
    assert taken <= fresh + 20 * 2**20
