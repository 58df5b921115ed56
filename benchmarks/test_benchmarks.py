"""The core cases through pytest-benchmark: pytest benchmarks --benchmark-only (--benchmark-json, --benchmark-compare).

`python -m benchmarks.run` is the fairer comparison: there the providers take turns in one run.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import core, plain
from benchmarks.providers import DICE_CE, PROVIDERS, TVERSKY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {TVERSKY: core(DEVICE), DICE_CE: plain(DEVICE)}


@pytest.mark.parametrize(
    ("case", "provider"),
    [(c, p) for p in PROVIDERS.values() for c in CASES[p.task]],
    ids=lambda x: x.name,
)
def test_forward_and_backward(benchmark, case, provider):
    try:
        loss = provider.make(case)
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    source, target = case.inputs(seed=0)
    logits = torch.empty_like(source)

    def fresh():
        return (logits.detach().copy_(source).requires_grad_(),), {}

    def both(z):
        loss(z, target).backward()
        z.grad = None
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{provider.task} {case.name}"
    benchmark.pedantic(both, setup=fresh, rounds=7, warmup_rounds=2)
