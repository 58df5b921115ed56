"""The operators, called directly and wrongly: an error that names the argument, never a crash or another number."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from common import inputs
from processes import ROOT, run

import tversky_kernels as tk
from tversky_kernels._ops import ops

PASS = (None, 0, None, 0, 0, 0.0, False)
TABLE = (None, 0.3, 0.7, 1.0, 1e-5, 1e-5, True, False, 0, 2, 1.0, 0.0, 0.0, 0)


def changed(values, at, value):
    return (*values[:at], value, *values[at + 1 :])


def test_hostile_calls_do_not_crash():
    result = run([sys.executable, "tests/tools/hostile.py", "--calls", "2500", "--seed", "1"], where=ROOT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert re.search(r"2500 calls: .*'returned': \d{3,}", result.stdout)


@pytest.mark.parametrize("force", [-1, -(2**31), 4, 2**31, 2**63 - 1])
def test_instruction_sets_that_there_are_not(force):
    before = ops.cpu_capability(None)
    with pytest.raises(RuntimeError, match="force: expected 0 to 3"):
        ops.cpu_capability(force)
    assert ops.cpu_capability(None) == before


@pytest.mark.parametrize("value", [-1, 4, 2**32, -(2**63)])
def test_enumerations_are_not_truncated(value):
    logits, target = inputs(1, 3, (5,))
    counts = torch.rand(1, 3, 3, dtype=torch.float64)
    for name, at in (("absent", 8), ("reduction", 9), ("ce_mean", 13)):
        for call in (
            lambda at=at: ops.table(counts, *changed(TABLE, at, value)),
            lambda at=at: ops.tversky_loss(logits, target, *PASS, 2, *changed(TABLE, at, value)),
        ):
            with pytest.raises(RuntimeError, match=f"{name}: expected 0 to"):
                call()
    for name, at in (("activation", 1), ("overlap", 3)):
        with pytest.raises(RuntimeError, match=f"{name}: expected 0 to 2, got {value}"):
            ops.count_pass(logits, target, *changed(PASS, at, value), 2)
    with pytest.raises(RuntimeError, match="cross_entropy: expected 0, 1 or 2"):
        ops.count_pass(logits, target, *changed(PASS, 4, value), 2)
    with pytest.raises(RuntimeError, match="check: expected 0 to 2"):
        ops.count_pass(logits, target, *PASS, value)


def test_a_meta_tensor_among_others():
    """The dispatcher then takes what only says shapes, whose result would be memory that nobody wrote."""
    logits, target = inputs(2, 3, (5,))
    loss, coefficients = ops.tversky_loss(logits, target, *PASS, 2, *TABLE)
    weight = torch.rand(2, 5)
    calls = {
        "count_pass": (logits, target, *changed(PASS, 0, weight), 2),
        "tversky_loss": (logits, target, *changed(PASS, 0, weight), 2, *TABLE),
        "gradient_pass": (loss, coefficients, logits, target, *changed(PASS, 0, weight)),
        "gradient_pass_": (logits, loss, coefficients, target, *changed(PASS, 0, weight)),
        "table": (torch.rand(2, 3, 3).double(), *changed(TABLE, 0, torch.rand(4, 3).double())),
        "linear_count_pass": (logits, torch.rand(3, 3), torch.rand(3), target, *PASS, 2),
    }
    for name, arguments in calls.items():
        getattr(ops, name)(*arguments)
        for at, x in enumerate(arguments):
            if isinstance(x, torch.Tensor):
                with pytest.raises((ValueError, RuntimeError), match="device"):
                    getattr(ops, name)(*changed(arguments, at, x.to("meta")))
        meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
        getattr(ops, name)(*meta)  # all of them say shapes


@pytest.mark.parametrize("layout", ["expanded", "overlapping", "with gaps"])
def test_in_place_where_elements_share_memory(layout):
    _, target = inputs(2, 3, (4,))
    memory = torch.randn(64)
    logits = {
        "expanded": memory[:12].view(1, 3, 4).expand(2, 3, 4),
        "overlapping": memory.as_strided((2, 3, 4), (3, 1, 2)),
        "with gaps": memory.as_strided((2, 3, 4), (24, 8, 2)),
    }[layout]
    loss, coefficients = ops.tversky_loss(logits, target, *PASS, 2, *TABLE)
    before = memory.clone()
    with pytest.raises(RuntimeError, match="logits: in place"):
        ops.gradient_pass_(logits, loss, coefficients, target, *PASS)
    with pytest.raises(ValueError, match="features: in place"):
        ops.linear_gradient_pass_(logits, loss, coefficients, torch.eye(3), None, target, *PASS)
    assert torch.equal(memory, before)
    ops.gradient_pass(loss, coefficients, logits, target, *PASS)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, torch.randn(2, 5, 6), "weight: expected"),
        (1, torch.randn(3, 5), "weight: expected"),
        (1, torch.randn(3), "weight: expected"),
        (1, torch.randn(3, 4).double(), "weight: expected"),
        (2, torch.randn(4), "bias: expected"),
        (2, torch.randn(3).half(), "bias: expected"),
        (3, torch.zeros(3, 6, dtype=torch.long), "target: expected"),
        (3, torch.zeros(2, 7, dtype=torch.long), "target: expected"),
        (3, torch.zeros(2, 3, 2, 3), "target: expected"),
        (4, torch.rand(2, 7), "voxel_weight: expected"),
    ],
)
def test_sizes_of_a_head(at, value, message):
    features, weight, bias, target = torch.randn(2, 4, 6), torch.randn(3, 4), torch.randn(3), torch.zeros(2, 6).long()
    arguments = [features, weight, bias, target, *PASS]
    upstream, coefficients = torch.ones(()), torch.rand(2, 3, 2).double()
    ops.linear_gradient_pass(upstream, coefficients, *arguments, True)
    with pytest.raises(ValueError, match=message):
        ops.linear_count_pass(*changed(arguments, at, value), 2)
    with pytest.raises(ValueError, match=message):
        ops.linear_gradient_pass(upstream, coefficients, *changed(arguments, at, value), True)


@pytest.mark.parametrize("coefficients", [(3, 3, 2), (2, 4, 2), (2, 3, 4), (2, 3)])
def test_coefficients_of_a_head(coefficients):
    arguments = (torch.randn(2, 4, 6), torch.randn(3, 4), None, torch.zeros(2, 6).long(), *PASS)
    with pytest.raises(ValueError, match="coefficients: expected"):
        ops.linear_gradient_pass(torch.ones(()), torch.rand(coefficients).double(), *arguments, True)
    for upstream in (torch.ones(3, 3), torch.ones(2, 5), torch.ones(3), torch.ones(2, 3, 1)):
        with pytest.raises(ValueError, match="grad_loss: its shape"):
            ops.linear_gradient_pass(upstream, torch.rand(2, 3, 2).double(), *arguments, True)


@pytest.mark.parametrize("shape", [(2, 3, 0, 5), (2, 3, 5, 0), (0, 3, 4, 5), (2, 3, 0, 0, 7), (0, 3), (2, 3, 0)])
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
@pytest.mark.parametrize("dense", [False, True])
def test_sizes_of_0(shape, layout, dense):
    """A finite loss, and an empty gradient of the logits' shape, in place too."""
    logits = torch.randn(shape)
    if layout == "permuted":
        logits = logits.transpose(1, -1).contiguous().transpose(1, -1)
    elif layout == "sliced":
        logits = torch.cat((logits, logits), -1)[..., : shape[-1]] if len(shape) > 2 else logits
    target = torch.zeros(shape) if dense else torch.zeros(shape[0], *shape[2:], dtype=torch.uint8)
    for inplace in (False, True):
        for options in ({}, {"voxel_weight": torch.rand(shape[0], *shape[2:])}, {"reduction": "none"}):
            z = logits * torch.ones((), requires_grad=True)
            loss = tk.tversky_ce_loss(z, target, inplace_backward=inplace, **options)
            assert torch.isfinite(loss).all()
            (gradient,) = torch.autograd.grad(loss.sum(), z)
            assert gradient.shape == z.shape
    for name in ("generalized_dice_loss", "overlap_counts"):
        result = getattr(tk, name)(logits, target)
        assert all(torch.isfinite(x).all() for x in (result if name == "overlap_counts" else [result]))
