"""The results of benchmarks.run as a table, a line a case: python -m benchmarks.summary [--device cuda].

Of every case the run that compared the most providers, the newest of such runs. "of the copy": the speed at which ours,
with a fresh gradient, moves the fewest bytes there are, in per cent of a copy's; peers are in multiples of ours, the
fastest of each name.
"""

from __future__ import annotations

import argparse
import pathlib

import pandas as pd

from benchmarks.cases import Case
from benchmarks.plot import of_one_run, said_of
from benchmarks.run import OURS
from tversky_kernels import _backends

PEERS = ("lean compiled", "lean eager", "exacta", "MONAI", "nnU-Net", "smp", "kornia")
BACKENDS = tuple(b for b in _backends.NAMES if b in ("cuda", "triton"))


def _cell(value, form: str) -> str:
    return "-" if value is None or pd.isna(value) else form.format(value)


def line_of(case: Case, rows: pd.DataFrame, task: str) -> dict[str, str] | None:
    """What is said of a case, by the column; None where ours was not measured."""
    measured = rows.dropna(subset=["milliseconds"]).set_index("provider")
    usual = OURS[task]
    if usual not in measured.index:
        return None
    ours = measured.loc[usual]

    def of(provider: str, column: str = "milliseconds"):
        return measured[column].get(provider) if column in measured else None

    line = {
        "case": case.name.replace(f",{case.device}", ""),
        "ours, ms": _cell(ours["milliseconds"], "{:.3g}"),
        "in place, ms": _cell(of(f"{usual}, in place"), "{:.3g}"),
        "of the copy": _cell(100 / ours["times_floor"], "{:.0f} %"),
    }
    if case.device == "cuda":
        line |= {f"{b}, ms": _cell(of(f"{usual}, {b}"), "{:.3g}") for b in BACKENDS}
        line["host, ms"] = _cell(of(usual, "host_milliseconds"), "{:.3f}")
    gradient = case.logits_bytes / 2**20
    memory = of(usual, "both_allocator_mib")
    line["gradients held"] = _cell(None if memory is None else memory / gradient, "{:.2f}")
    for peer in PEERS:
        mine = measured[measured.index.str.startswith(peer)]["milliseconds"]
        line[peer] = _cell(None if mine.empty else mine.min() / ours["milliseconds"], "{:.3g}x")
    return line


def table(rows: pd.DataFrame, task: str) -> str:
    """Markdown; columns that say nothing of any case are left out."""
    lines = []
    for name, of_case in of_one_run(rows[rows["task"] == task]).groupby("case", sort=False):
        line = line_of(Case.parse(name), of_case, task)
        lines += [line] if line else []
    columns = [c for c in (lines[0] if lines else ()) if any(line[c] != "-" for line in lines)]
    shown = [columns, ["---"] * len(columns), *([line[c] for c in columns] for line in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in shown) if lines else "nothing measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--task", choices=list(OURS), action="append", help="default: all")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("benchmarks/results"), metavar="DIR")
    arguments = parser.parse_args()
    rows = pd.read_csv(arguments.results / f"{arguments.device}.csv")
    print(said_of(rows))
    for task in arguments.task or [t for t in OURS if (rows["task"] == t).any()]:
        print(f"\n{task}\n\n{table(rows, task)}")


if __name__ == "__main__":
    main()
