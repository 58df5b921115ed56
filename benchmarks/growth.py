"""How the cost grows with voxels, classes, samples and threads: python -m benchmarks.growth.

Every series changes one thing. Rows are appended to benchmarks/results/growth.csv; printed are time per voxel and, for
every provider, the exponent of a power law fitted to its times (1: proportional; least squares of the logarithms).
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys

import torch
from tqdm import tqdm

from benchmarks.cases import Case
from benchmarks.memory import measure_in_own_process
from benchmarks.providers import PROVIDERS
from benchmarks.results_table import ResultsTable
from benchmarks.run import FIELDS, describe_run, run_case

SIDES = (32, 48, 64, 96, 128, 192, 256, 384, 512)
CLASSES = (2, 3, 4, 5, 8, 14, 32, 64, 118, 200)
SAMPLES = (1, 2, 4, 8)
#: Where the fit starts: below it is the calls that cost.
FIT_FROM = {"voxels": 64**3, "classes": 2, "samples": 1}
PROVIDER_NAMES = (
    "ours",
    "ours, in place",
    "lean compiled, mask",
    "MONAI TverskyLoss",
    "exacta TverskyLoss, compiled",
)
#: Our reference in float64 takes some 30 copies of the logits: only below this many bytes is everybody checked.
MOST_TO_CHECK = 256 * 2**20


def series(device: str) -> dict[str, list[tuple[float, Case, int | None]]]:
    """For every series: what is changed, the case, and the threads where it is they that change."""
    found: dict[str, list[tuple[float, Case, int | None]]] = {
        "voxels": [(side**3, Case(side, 2, device=device), None) for side in SIDES],
        "classes": [(classes, Case(64, classes, device=device), None) for classes in CLASSES],
        "samples": [(samples, Case(64, 4, samples, device=device), None) for samples in SAMPLES],
    }
    if device == "cpu":
        threads = [2**i for i in range(torch.get_num_threads().bit_length())]
        found["threads"] = [(n, Case(96, 14, device=device), n) for n in threads]
    return found


def exponent(points: list[tuple[float, float]]) -> float:
    """Of the power law through (x, y)."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(v[i] for v in logs) / len(logs) for i in (0, 1))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def report(name: str, rows: list[dict]) -> str:
    """Time per voxel over the series, and the fitted exponents."""
    values = sorted({r["value"] for r in rows})
    lines = [f"{name}: ns per voxel at {', '.join(f'{v:g}' for v in values)}"]
    for provider in dict.fromkeys(r["provider"] for r in rows):
        here = {r["value"]: r for r in rows if r["provider"] == provider and r.get("milliseconds")}
        cells = [f"{1e6 * here[v]['milliseconds'] / here[v]['voxels']:.2f}" if v in here else "-" for v in values]
        line = f"  {provider:30} {' '.join(f'{c:>8}' for c in cells)}"
        fitted = [(v, r["milliseconds"]) for v, r in here.items() if v >= FIT_FROM.get(name, math.inf)]
        if len(fitted) > 1:
            line += f"   exponent {exponent(fitted):.2f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--series", action="append", choices=("voxels", "classes", "samples", "threads"))
    parser.add_argument("--provider", action="append", choices=list(PROVIDERS), metavar="NAME")
    parser.add_argument("--most-mib", type=float, default=1024, help="of logits; default: %(default)s")
    parser.add_argument("--no-memory", action="store_true", help="do not measure the memory of the classes' series")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"), metavar="DIR")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda: torch finds no CUDA device", file=sys.stderr)
        return 2
    names = arguments.provider or PROVIDER_NAMES
    table = ResultsTable(arguments.out / "growth.csv", ["series", "value", "voxels", *FIELDS])
    usual_threads = torch.get_num_threads()
    reports = []
    for name, points in series(arguments.device).items():
        if arguments.series and name not in arguments.series:
            continue
        points = [p for p in points if p[1].logits_bytes <= arguments.most_mib * 2**20]
        collected = []
        for value, case, threads in tqdm(points, desc=name, unit="case", disable=None):
            torch.set_num_threads(threads or usual_threads)
            repeats = 15 if case.logits_bytes <= 64 * 2**20 else 7 if case.logits_bytes <= 512 * 2**20 else 5
            check = case.logits_bytes <= MOST_TO_CHECK
            suited = [n for n in names if PROVIDERS[n].suits(case)]
            rows = run_case(case, suited, repeats, memory=False, check=check)
            if name == "classes" and not arguments.no_memory:
                for row in rows:
                    if row["status"] == "ok":
                        row.update(measure_in_own_process(case, row["provider"]))
            run = describe_run()
            for row in rows:
                row.pop("host_milliseconds", None)  # a card's, which this table has no column for
            rows = [{**run, "series": name, "value": value, "voxels": case.voxels, **row} for row in rows]
            table.append(rows)
            collected += rows
        torch.set_num_threads(usual_threads)
        reports.append(report(name, collected))
        tqdm.write("\n" + reports[-1])
    print(f"\nAppended to {table.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
