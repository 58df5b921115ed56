"""Draws what the benchmarks have measured: python -m benchmarks.plot. Pictures go beside the CSV files that they show.

Of every case and provider the newest row is taken; the distance to the floor is of one run. growth_DEVICE.png: time
against voxels and classes, memory against classes, distance to the floor; training_step_DEVICE.png: what the loss
takes of a step.
"""

from __future__ import annotations

import argparse
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from benchmarks.cases import plain

COLOURS = {
    "ours": "#c0392b",
    "ours, in place": "#e67e22",
    "lean compiled, mask": "#2980b9",
    "MONAI TverskyLoss": "#27ae60",
    "exacta TverskyLoss, compiled": "#8e44ad",
    "our Dice + CE": "#c0392b",
    "our Dice + CE, in place": "#e67e22",
    "our Dice + CE, last layer within": "#f1c40f",
    "MONAI DiceCELoss": "#27ae60",
    "nnU-Net DC_and_CE_loss": "#2980b9",
    "exacta DiceCELoss": "#8e44ad",
}
LABELS = {"lean compiled, mask": "torch.compile of a lean loss"}


def newest(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The last row of each."""
    return rows.groupby(keys, sort=False).tail(1)


def of_one_run(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every case the rows of the run that compared the most providers, the newest of such runs."""
    runs = rows.groupby(["case", "date", "commit"], sort=False)["provider"].nunique().reset_index(name="compared")
    chosen = runs.groupby("case", sort=False)["compared"].transform(lambda n: n == n.max())
    return rows.merge(newest(runs[chosen], ["case"]), on=["case", "date", "commit"])


def curves(axes, rows: pd.DataFrame, x: str, y: str) -> None:
    """A line for every provider."""
    for provider, mine in rows.groupby("provider", sort=False):
        if provider in COLOURS:
            mine = mine.dropna(subset=[y]).sort_values(x)
            axes.plot(mine[x], mine[y], "o-", ms=3, color=COLOURS[provider], label=LABELS.get(provider, provider))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def bars(axes, rows: pd.DataFrame, groups: list[str], group: str, names: list[str], name: str, y: str) -> None:
    """Groups of horizontal bars, with their values."""
    height = 0.8 / max(1, len(names))
    for i, n in enumerate(names):
        for k, g in enumerate(groups):
            found = rows[(rows[group] == g) & (rows[name] == n)][y].dropna()
            if not found.empty:
                at = k + (i - (len(names) - 1) / 2) * height
                axes.barh(at, found.iloc[-1], height, color=COLOURS[n], label=LABELS.get(n, n) if k == 0 else None)
                axes.text(found.iloc[-1], at, f" {found.iloc[-1]:.3g}", va="center", fontsize=6)
    axes.set_yticks(range(len(groups)))
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")


def said_of(rows: pd.DataFrame) -> str:
    """Machine, threads, torch and date of these rows."""
    last = rows.iloc[-1]
    dates = sorted({d[:10] for d in rows["date"]})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{last['machine']}, {last['threads']} threads, torch {last['torch']}, {when}"


def draw_growth(folder: pathlib.Path, device: str) -> pathlib.Path:
    growth = pd.read_csv(folder / "growth.csv")
    growth = newest(growth[growth["case"].str.endswith(f",{device}")], ["series", "value", "provider"])
    figure, ((voxels, classes), (memory, floor)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    curves(voxels, growth[growth["series"] == "voxels"], "value", "milliseconds")
    voxels.set(xlabel="voxels (2 classes)", ylabel="ms, forward + backward", title="Time against voxels")
    voxels.legend(fontsize=8)
    by_class = growth[growth["series"] == "classes"]
    curves(classes, by_class, "value", "milliseconds")
    classes.set(xlabel="classes (64³ voxels)", ylabel="ms, forward + backward", title="Time against classes")
    curves(memory, by_class, "value", "both_allocator_mib")
    memory.set(xlabel="classes (64³ voxels)", ylabel="MiB beyond the inputs", title="Memory against classes")
    memory.set_yscale("symlog", linthresh=1)
    memory.set_visible(bool(by_class["both_allocator_mib"].notna().any()))  # --no-memory
    core = pd.read_csv(folder / f"{device}.csv")
    cases = [c.name for c in plain(device)]
    core = core[(core["task"] == "tversky") & core["case"].isin(cases)]
    core = of_one_run(core.dropna(subset=["times_floor"]))
    names = [n for n in COLOURS if n in set(core["provider"])]
    bars(floor, core, cases, "case", names, "provider", "times_floor")
    floor.set_yticklabels([c.removesuffix(f",uint8,{device}") for c in cases], fontsize=8)
    floor.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.17), ncols=2)
    floor.set_xscale("log")
    floor.set_xlim(left=1)
    floor.set_xticks(ticks := (1, 2, 5, 10, 20, 50, 100), [str(t) for t in ticks])
    floor.minorticks_off()
    floor.set(xlabel="multiples of reading logits and target twice and writing once", title="Distance to the floor")
    figure.suptitle(said_of(pd.concat((growth, core))), fontsize=9)
    path = folder / f"growth_{device}.png"
    figure.savefig(path, dpi=110)
    return path


def draw_training_step(folder: pathlib.Path, device: str) -> pathlib.Path | None:
    rows = pd.read_csv(folder / "training_step.csv")
    rows = rows[(rows["status"] == "ok") & (rows["device"] == device)]
    rows = newest(rows, ["measured", "network", "classes", "loss"])
    if rows.empty:
        return None
    shares, patches = rows[rows["measured"] == "shares"].copy(), rows[rows["measured"] == "largest patch"].copy()
    shares["group"] = shares["network"] + ", C = " + shares["classes"].astype(int).astype(str)
    shares["percent_time"], shares["percent_peak"] = 100 * shares["share_of_time"], 100 * shares["share_of_peak"]
    patches["group"] = patches["network"] + ", C = " + patches["classes"].astype(int).astype(str)
    names, compared = ([n for n in COLOURS if n in set(x["loss"])] for x in (shares, patches))
    figure, axes = plt.subplots(1, 3, figsize=(15, 6), layout="constrained", width_ratios=(2, 2, 1.6))
    groups = list(dict.fromkeys(shares["group"]))
    for ax, column, title in (
        (axes[0], "percent_time", "of the step's time"),
        (axes[1], "percent_peak", "of the step's peak memory"),
    ):
        bars(ax, shares, groups, "group", names, "loss", column)
        ax.set(xlabel="%", title=f"The loss's share {title}")
        ax.set_yticklabels(groups if ax is axes[0] else [], fontsize=8)
    axes[0].legend(fontsize=8)
    groups = list(dict.fromkeys(patches["group"]))
    bars(axes[2], patches, groups, "group", compared, "loss", "largest_side")
    axes[2].set_yticklabels(groups, fontsize=8)
    budget = f"{patches['budget_mib'].iloc[-1] / 1024:g} GiB" if len(patches) else ""
    axes[2].set(xlabel="side", title=f"Largest patch in {budget}")
    axes[2].legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.11), ncols=2)
    figure.suptitle(said_of(rows) + f"; patches of {shares['side'].iloc[-1]:.0f}³", fontsize=9)
    path = folder / f"training_step_{device}.png"
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("benchmarks/results"), metavar="DIR")
    arguments = parser.parse_args()
    for draw, needed in ((draw_growth, "growth.csv"), (draw_training_step, "training_step.csv")):
        path = draw(arguments.results, arguments.device) if (arguments.results / needed).exists() else None
        program = f"python -m benchmarks.{needed.removesuffix('.csv')}"
        print(path or f"{arguments.results / needed} has nothing of {arguments.device}: run {program}")


if __name__ == "__main__":
    main()
