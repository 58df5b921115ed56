"""Draws combinations of arguments, thousands of them, and compares each with the float64 reference.

    python tests/tools/fuzz.py --cases 50000                               the CPU kernels
    python tests/tools/fuzz.py --cases 10000 --kernels PATH          the CUDA kernels' host build (tests/cuda_on_host)
    TRITON_INTERPRET=1 python tests/tools/fuzz.py --cases 2000 --kernels interpreter

goes on after a case that fails, names it and its seed, and ends with a summary: docs/testing.md has those of long runs.
"""

from __future__ import annotations

import argparse
import collections
import time

import hypothesis
import kernels_on_host
import torch
from combinations import cases, check_case
from common import CPU_CAPABILITIES

from tversky_kernels._ops import ops


def draw_and_check(cases_of_seed: int, seed: int, backend: str, largest: int, rounding: float, seen, failed) -> None:
    """Draws so many cases; those that fail are added to `failed`."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases_of_seed,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(cases(largest=largest))
    def check(case):
        seen["cases"] += 1
        for kind in (case.how, f"upstream {case.upstream:g}", str(case.dtype).removeprefix("torch."), case.target):
            seen[kind] += 1
        try:
            check_case(case, backend, rounding=rounding)
        except Exception as error:
            failed.append((seed, case, error))

    check()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first thousand; the next has the next")
    parser.add_argument("--kernels", default="cpu", help="cpu, interpreter, or the path of a host build")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further thousand after so many")
    arguments = parser.parse_args()
    backend, interpreted = arguments.kernels, arguments.kernels == "interpreter"
    if interpreted:
        backend = "triton"
    elif arguments.kernels != "cpu":
        backend = kernels_on_host.use(arguments.kernels)
    torch.set_num_threads(1)
    # The interpreter takes a second for a thousand tiles, and cuts off where it should round to bfloat16.
    largest, rounding = (9, 3.0) if interpreted else (19, 1.0)
    seen, failed, started = collections.Counter(), [], time.monotonic()
    step = 250 if interpreted else 1000
    for first in range(0, arguments.cases, step):
        seed = arguments.seed + first // step
        if backend == "cpu" and arguments.kernels == "cpu":  # each thousand by another instruction set
            ops.cpu_capability(seed % len(CPU_CAPABILITIES))
        draw_and_check(min(step, arguments.cases - first), seed, backend, largest, rounding, seen, failed)
        minutes = (time.monotonic() - started) / 60
        print(f"{seen['cases']} cases, {len(failed)} wrong, {minutes:.1f} minutes", flush=True)
        for seed_of, case, error in failed[:5]:
            print(f"  seed {seed_of}: {case}\n    {type(error).__name__}: {str(error)[:500]}", flush=True)
        if minutes > arguments.minutes:
            break
    print(f"{arguments.kernels}, seeds {arguments.seed} to {seed}: {dict(sorted(seen.items()))}, wrong: {len(failed)}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
