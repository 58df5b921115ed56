"""What dense targets, a sigmoid, channels_last and the options of a cross-entropy cost us beside the plain case:
python -m benchmarks.variants.

The variants of one shape take turns, with one copy of the logits, in one run: the machine's speed drops out. Printed
are milliseconds, multiples of the plain case's, and multiples of its multiple of the floor (a dense target has more
bytes to read). Rows are appended to benchmarks/results/variants.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics

import torch

from benchmarks.cases import Case, plain
from benchmarks.providers import FOCAL_CE, PROVIDERS, SMOOTHING, our_dice_ce
from benchmarks.results_table import ResultsTable
from benchmarks.run import OURS, describe_run
from benchmarks.timing import spread, timed

VARIANTS = {
    "plain": {},
    "dense": {"form": "dense"},
    "sigmoid": {"activation": "sigmoid"},
    "dense, sigmoid": {"form": "dense", "activation": "sigmoid"},
    "channels_last": {"layout": "channels_last"},
}
#: Of a Dice loss with a cross-entropy.
OPTIONS = {
    "Dice + CE": {},
    "label smoothing": SMOOTHING,
    "focal exponent 2": {"focal_gamma": 2.0},
    "focal exponent 1.5": {"focal_gamma": 1.5},
    "sigmoid, focal exponent 2": FOCAL_CE,
}
#: On a card by both backends, the one that "auto" does not take too; and the shapes there.
ON_BOTH, OF_CARD = ("plain", "channels_last", "label smoothing"), (2, 14, 33)
FIELDS = [
    "variant",
    "gradient",
    "case",
    "milliseconds",
    "spread",
    "times_floor",
    "of_plain",
    "of_plain_floor",
    "copy_ms",
]


def measure(shape: Case, repeats: int) -> list[dict]:
    runs = {}
    for name in (*VARIANTS, *OPTIONS):
        case = dataclasses.replace(shape, **VARIANTS.get(name, {}))
        source, target = case.inputs(seed=0)
        gradients = {"fresh": OURS["tversky"], "in place": "ours, in place"}
        if shape.device == "cuda" and name in ON_BOTH:
            gradients["fresh, triton"] = "ours, triton"
        for gradient, usual in gradients.items():
            make = PROVIDERS[usual].make
            if name in OPTIONS:
                backend = "triton" if gradient == "fresh, triton" else "auto"
                make = our_dice_ce(backend, gradient == "in place", **OPTIONS[name])
            loss = make(case)
            runs[name, gradient] = (case, source, target, torch.empty_like(source), loss, [])
    copies, other = [], torch.empty_like(runs["plain", "fresh"][1])
    for repeat in range(repeats + 2):  # two to warm up
        source = runs["plain", "fresh"][1]
        taken = timed(other.copy_, lambda source=source: (source,), shape.device).work
        if repeat >= 2:
            copies.append(taken)
        for _, source, target, memory, loss, times in runs.values():
            taken = timed(
                lambda z, t=target, loss=loss: loss(z, t).backward(),
                lambda memory=memory, source=source: (memory.detach().copy_(source).requires_grad_(),),
                shape.device,
            ).work
            if repeat >= 2:
                times.append(taken)
    copy = statistics.median(copies)
    rows = []
    for (name, gradient), (case, *_, times) in runs.items():
        plain_case, *_, plain_times = runs["plain", gradient]
        median, plain = statistics.median(times), statistics.median(plain_times)
        rows.append(
            {
                "variant": name, "gradient": gradient, "case": case.name, "milliseconds": 1e3 * median,
                "spread": spread(times), "times_floor": median / (copy * case.floor_copies),
                "of_plain": median / plain,
                "of_plain_floor": median / plain * plain_case.floor_copies / case.floor_copies,
                "copy_ms": 1e3 * copy,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"), metavar="DIR")
    arguments = parser.parse_args()
    run = describe_run()
    table = ResultsTable(arguments.out / "variants.csv", [*run, *FIELDS])
    shapes = [c for c in plain(arguments.device) if arguments.device == "cpu" or c.classes in OF_CARD]
    for shape in shapes:
        rows = measure(shape, arguments.repeats)
        table.append([{**run, **row} for row in rows])
        print(f"\n{shape.name}: a copy takes {rows[0]['copy_ms']:.3f} ms")
        for r in rows:
            print(
                f"  {r['gradient']:13} {r['variant']:25} {r['milliseconds']:8.3f} ms +-{100 * r['spread']:3.0f}%  "
                f"{r['times_floor']:5.2f} x floor   {r['of_plain']:5.2f} x plain   "
                f"{r['of_plain_floor']:5.2f} x its floor ratio"
            )
    print(f"\nAppended to {table.path}")


if __name__ == "__main__":
    main()
