"""python -m tversky_kernels: what is installed here, a check of its numbers, and with --shape what a loss costs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from . import _report

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
EPILOG = "example: python -m tversky_kernels --shape 2 14 128 128 128"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report. Returns 0, or 1 where a backend's numbers are wrong."""
    parser = argparse.ArgumentParser("python -m tversky_kernels", description=__doc__.split(": ", 1)[1], epilog=EPILOG)
    parser.add_argument(
        "--shape", type=int, nargs="+", metavar="N", help="of logits, N C and sizes: times losses there"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the logits that are timed")
    parser.add_argument("--device", help="on which is timed; a GPU where there is one")
    parser.add_argument("--rounds", type=int, default=11, help="of timing, at least 2")
    given = parser.parse_args(arguments)
    if given.shape is not None and (len(given.shape) < 3 or min(given.shape) < 1 or given.shape[1] < 2):
        parser.error(f"--shape: expected samples, classes (2 or more) and spatial sizes, got {given.shape}")
    if given.rounds < 2:
        parser.error(f"--rounds: expected 2 or more, got {given.rounds}")
    found = _report.facts()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")
    print("\nself-check against the reference in float64")
    all_right = True
    for backend, case, right, far in _report.self_check():
        all_right &= right
        print(f"  {'ok   ' if right else 'WRONG'}  {backend:<7} {case:<40} {far}")
    if given.shape is not None:
        _print_benchmark(given)
    if not all_right:
        print("\nA backend's numbers are wrong here. Please report all of this.", file=sys.stderr)
    return 0 if all_right else 1


def _print_benchmark(given) -> None:
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(
        f"\nforward + backward, {tuple(given.shape)} {given.dtype} on {device}: medians of {given.rounds}, taking turns"
    )
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = iter
    rows = list(_report.benchmark(tuple(given.shape), DTYPES[given.dtype], device, given.rounds, tqdm))
    width = max(len(name) for name, *_ in rows)
    print(f"  {'':<{width}}  {'ms':>9}  {'spread':>6}  {'extra MiB':>9}")
    for name, taken, spread, peak in rows:
        if spread is None:
            print(f"  {name:<{width}}  {taken}")
        else:
            print(f"  {name:<{width}}  {taken:>9.2f}  {spread:>6.0%}  {peak:>9.1f}")
    print("  extra MiB: the peak beyond logits and target; a fresh gradient is a part of it")


if __name__ == "__main__":
    sys.exit(main())
