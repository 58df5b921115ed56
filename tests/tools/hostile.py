"""Calls every operator with arguments that nobody should give it: an error or a result, never a crash.

    python tests/tools/hostile.py --calls 2000 --seed 0

prints how many calls raised and returned. tests/test_operators.py runs it in a process of its own, so that a crash is
seen; `make test-hostile` runs it with the CPU kernels under sanitizers.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter

import torch

import tversky_kernels  # noqa: F401  (registers the operators)
from tversky_kernels._ops import LINEAR_NAMES, NAMES, REGION_NAMES, ops

CLASSES = (1, 2, 3, 5)
INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 4, 7, 255, 2**31, 2**32, 2**32 + 1, 2**63 - 1)
FLOATS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-320, 0.5, 2.0, 1e38, 1e308)
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64,
)  # fmt: skip


def valid_arguments(name: str, random_: random.Random) -> list:
    """A call that is right."""
    samples, classes = random_.choice((0, 1, 2)), random_.choice(CLASSES)
    space = tuple(random_.choice((0, 1, 3, 8)) for _ in range(random_.choice((0, 1, 2, 3))))
    dtype = random_.choice((torch.float32, torch.float64, torch.float16, torch.bfloat16))
    cross_entropy, activation = random_.choice((0, 1, 2)), 1 if classes == 1 else random_.choice((0, 1))
    logits = torch.randn(samples, classes, *space).to(dtype)
    target = torch.randint(0, max(classes, 2), (samples, *space), dtype=torch.uint8)
    if random_.random() < 0.4:
        target = torch.rand(samples, classes, *space)
    weight = random_.choice((None, torch.rand(samples, *space)))
    passes = [activation, random_.choice((None, 0, 255)), random_.choice((0, 1, 2)), cross_entropy,
              random_.choice((0.0, 2.0)), random_.random() < 0.5]  # fmt: skip
    rows = random_.choice((1, samples))
    coefficients = torch.rand(rows, classes, 4 if cross_entropy else 2, dtype=torch.float64)
    table = [random_.choice((None, torch.rand(4, classes, dtype=torch.float64))), 0.3, 0.7, 1.0, 1e-5, 1e-5,
             True, rows == 1, 0, random_.choice((0, 1, 2)), 1.0, 0.5, 0.1, random_.choice((0, 1, 2, 3))]  # fmt: skip
    features = torch.randn(samples, 4, *space).to(dtype)
    head = [features, torch.randn(classes, 4).to(dtype), random_.choice((None, torch.randn(classes).to(dtype)))]
    upstream = random_.choice((torch.ones(()), torch.ones(rows, classes)))
    check = random_.choice((0, 1, 2))
    count = random_.choice((1, 3, 300))
    regions = torch.randint(-1, count, (samples, random_.choice((1, classes)), *space)).to(
        random_.choice((torch.int16, torch.int32, torch.int64))
    )
    regions_there, regions = regions, random_.choice((regions, regions, None))
    merged = random_.choice((None, torch.rand(samples, classes) < 0.5)) if activation == 0 else None
    of_regions = torch.rand(samples, count, classes, coefficients.size(-1), dtype=torch.float64)
    return {
        "count_pass": [logits, target, weight, *passes, check],
        "table": [torch.rand(samples, classes, 6 if cross_entropy else 3, dtype=torch.float64), *table],
        "tversky_loss": [logits, target, weight, *passes, check, *table],
        "gradient_pass": [upstream, coefficients, logits, target, weight, *passes],
        "gradient_pass_": [logits, upstream, coefficients, target, weight, *passes],
        "linear_count_pass": [*head, target, weight, *passes, check],
        "linear_gradient_pass": [upstream, coefficients, *head, target, weight, *passes, random_.random() < 0.5],
        "linear_gradient_pass_": [features, upstream, coefficients, *head[1:], target, weight, *passes],
        "region_count_pass": [logits, target, weight, regions, merged, count, *passes, check],
        "region_gradient_pass": [of_regions, logits, target, weight, regions, merged, *passes],
        "region_gradient_pass_": [logits, of_regions, target, weight, regions, merged, *passes],
        "linear_region_count_pass": [*head, target, weight, regions_there, count, *passes, check],
        "linear_region_gradient_pass": [
            of_regions,
            *head,
            target,
            weight,
            regions_there,
            *passes,
            random_.random() < 0.5,
        ],
        "linear_region_gradient_pass_": [features, of_regions, *head[1:], target, weight, regions_there, *passes],
        "cpu_capability": [None],
        "cpu_gradient_memory": [None],
    }[name]


def hostile_tensor(x: torch.Tensor, random_: random.Random) -> torch.Tensor:
    """Another shape, type, device or layout, or values that are none."""
    choice = random_.randrange(14)
    if choice == 0:
        return x.to(random_.choice(DTYPES))
    if choice == 1 and x.dim():
        return x.narrow(random_.randrange(x.dim()), 0, 0)
    if choice == 2 and x.dim():
        d = random_.randrange(x.dim())
        return torch.cat((x, x), d)
    if choice == 3:
        return x.unsqueeze(random_.randrange(x.dim() + 1))
    if choice == 4 and x.dim():
        return x.sum(random_.randrange(x.dim())) if x.numel() else x[..., :0]
    if choice == 5:
        return x.to("meta")
    if choice == 6 and x.dim():
        sizes = list(x.shape)
        d = random_.randrange(x.dim())
        return x.narrow(d, 0, min(1, sizes[d])).expand(*(s if i != d or s == 0 else 5 for i, s in enumerate(sizes)))
    if choice == 7 and x.dim() > 1:
        return x.transpose(random_.randrange(x.dim()), random_.randrange(x.dim()))
    if choice == 8 and x.dim() > 0 and not x.is_complex():
        return x.to_sparse()
    if choice == 9 and x.is_floating_point() and x.numel():
        y = x.clone()
        y.view(-1)[random_.randrange(y.numel())] = random_.choice((math.nan, math.inf, -1.0, 9.0))
        return y
    if choice == 10 and not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool and x.numel():
        return torch.full_like(x, random_.choice((0, 1, 77, 127)))
    if choice == 11 and x.dim() > 1:
        wide = torch.cat((x, x), -1)
        return wide[..., ::2]
    if choice == 12 and x.numel():  # elements that share memory
        return torch.as_strided(x.contiguous(), x.shape, (1,) * x.dim()) if sum(x.shape) <= x.numel() else x.flatten()
    return torch.empty(random_.choice(((), (0,), (3,), (1, 1), (2, 0, 3), (1, 2, 3, 4, 5, 6))))


def hostile(value, random_: random.Random):
    """Something else in the place of an argument."""
    if isinstance(value, torch.Tensor):
        return random_.choice((None, hostile_tensor(value, random_), hostile_tensor(value, random_)))
    if isinstance(value, bool):
        return random_.choice((True, False, 2, None))
    if isinstance(value, int):
        return random_.choice(INTEGERS)
    if isinstance(value, float):
        return random_.choice(FLOATS)
    return random_.choice((None, random_.choice(INTEGERS), torch.rand(2, 3), torch.rand(4, 2).double(), True, "cpu"))


def canary() -> torch.Tensor:
    """A call that must go on giving the same."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 5, 7, generator=generator)
    target = torch.randint(0, 3, (1, 5, 7), generator=generator)
    return ops.count_pass(logits, target, None, 0, None, 0, 0, 0.0, False, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = (*NAMES, *REGION_NAMES, *LINEAR_NAMES, "cpu_capability", "cpu_gradient_memory")
    random_ = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    capability = ops.cpu_capability(None)
    expected, outcomes = canary(), Counter()
    for i in range(arguments.calls):
        name = random_.choice(names)
        call = valid_arguments(name, random_)
        wrong = random_.choice((0, 1, 1, 1, 2, 3))
        for at in random_.sample(range(len(call)), min(wrong, len(call))):
            call[at] = hostile(call[at], random_)
        print(f"{i} {name}", flush=True) if i % 500 == 0 else None
        try:
            getattr(ops, name)(*call)
            outcomes["returned"] += 1
        except Exception as error:
            outcomes[type(error).__name__] += 1
            if wrong == 0:
                raise AssertionError(f"call {i}: {name} is right, and raised") from error
        ops.cpu_capability(capability)
        ops.cpu_gradient_memory(False)
        if i % 50 == 0 and not torch.equal(canary(), expected):
            raise AssertionError(f"after call {i}, {name}, a good call gives something else")
    print(f"{arguments.calls} calls: {dict(outcomes)}")


if __name__ == "__main__":
    main()
