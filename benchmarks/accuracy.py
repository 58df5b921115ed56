"""How right a float32 gradient stays while a network becomes right: python -m benchmarks.accuracy.

Random logits, raised at every voxel's own class by 0, 4, 8, ...: the first steps of a training, and later ones. Printed
is the relative L2 error of each loss's gradient against its own definition in float64. Rows are appended to
benchmarks/results/accuracy.csv.
"""

from __future__ import annotations

import argparse
import pathlib

import torch
from tqdm import tqdm

from benchmarks.cases import DTYPES, Case
from benchmarks.providers import PROVIDERS, TASKS, TVERSKY
from benchmarks.results_table import ResultsTable
from benchmarks.run import describe_run, errors

RAISED_BY = (0, 4, 8, 12, 16)
FIELDS = ["task", "case", "raised_by", "mean_probability", "provider", "version", "status"]
FIELDS += ["loss_error", "gradient_error"]


def raised(case: Case, by: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Logits, target, and the mean probability of what is right."""
    logits, target = case.inputs(seed=0)
    own = torch.zeros_like(logits).scatter_(1, target.long(), by)
    logits = logits + own
    return logits, target, logits.double().softmax(1).gather(1, target.long()).mean().item()


def measure(case: Case, by: float, names: list[str]) -> list[dict]:
    logits, target, probability = raised(case, by)
    rows = []
    for name in names:
        provider = PROVIDERS[name]
        row = {
            "task": provider.task, "case": case.name, "raised_by": by, "mean_probability": probability,
            "provider": name, "version": provider.version, "status": "ok",
        }  # fmt: skip
        try:
            row["loss_error"], row["gradient_error"] = errors(case, provider, provider.make(case), logits, target)
        except ImportError as error:
            row["status"] = f"missing: {error.name}"
        except Exception as error:  # as in benchmarks.run
            row["status"] = f"failed: {type(error).__name__}"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--task", choices=TASKS, default=TVERSKY, help="what all are asked for; default: %(default)s")
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--side", type=int, default=48)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"), metavar="DIR")
    arguments = parser.parse_args()
    case = Case(arguments.side, arguments.classes, dtype=arguments.dtype, device=arguments.device)
    names = [n for n, p in PROVIDERS.items() if p.task == arguments.task and p.suits(case)]
    run = describe_run()
    table = ResultsTable(arguments.out / "accuracy.csv", [*run, *FIELDS])
    rows = []
    for by in tqdm(RAISED_BY, disable=None):
        rows += measure(case, by, names)
    table.append([{**run, **row} for row in rows])
    probabilities = dict.fromkeys(row["mean_probability"] for row in rows)
    print(f"{case.name}: relative error of the gradient, by the mean probability of the right class")
    print(f"  {'':32}" + "".join(f"{p:11.7f}" for p in probabilities))
    for name in names:
        own = [row for row in rows if row["provider"] == name]
        ok = all(row["status"] == "ok" for row in own)
        print(f"  {name:32}" + ("".join(f"{r['gradient_error']:11.1e}" for r in own) if ok else f" {own[0]['status']}"))
    print(f"\nAppended to {table.path}")


if __name__ == "__main__":
    main()
