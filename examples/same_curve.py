"""Trains the same network twice, with our kernels and with the plain reference, and shows that the curves are one.

Rounding errors grow in training, whatever their cause. So the difference between the two is shown beside the difference
that float32 makes by itself: the reference on one thread and on two, which add numbers up in another order.

    python examples/same_curve.py .data/lung --out docs/study
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from training import Settings, Trainer
from volumes import DataError, Volume, prepare, read_folder

import tversky_kernels as tk

#: name: the loss's backend and the number of threads
CURVES = {"ours": ("auto", 1), "reference": ("reference", 1), "reference, two threads": ("reference", 2)}


def losses_of(volumes: list[Volume], settings: Settings, backend: str, threads: int) -> list[float]:
    """The training loss of every step."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loss = tk.TverskyLoss(alpha=0.3, beta=0.7, include_background=False, batch=True, backend=backend)
        trainer = Trainer(settings, loss, volumes)
        trainer.train(progress=False)
    finally:
        torch.set_num_threads(before)
    return [row[2] for row in trainer.log]


def curves(volumes: list[Volume], settings: Settings) -> pd.DataFrame:
    of = {name: losses_of(volumes, settings, *how) for name, how in CURVES.items()}
    return pd.DataFrame({"step": np.arange(1, settings.steps + 1), **of})


def draw(tables: dict[str, pd.DataFrame], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(2, len(tables), figsize=(5.2 * len(tables), 6.4), layout="constrained", squeeze=False)
    for (name, table), (above, below) in zip(tables.items(), axes.T, strict=True):
        for curve, style in (("reference", {"lw": 3, "alpha": 0.4}), ("ours", {"lw": 1})):
            above.plot(table.step, table[curve], label=curve, **style)
        above.set(title=name, ylabel="training loss", xlabel="step", ylim=(0, 1))
        above.legend()
        for curve in ("ours", "reference, two threads"):
            apart = (table[curve] - table.reference).abs().clip(lower=1e-9)
            below.semilogy(table.step, apart, lw=1, label=f"{curve} less reference")
        below.set(ylabel="difference of the losses", xlabel="step", ylim=(1e-9, 1))
        below.legend(loc="lower right")
        for ax in (above, below):
            ax.grid(alpha=0.3)
    figure.suptitle("The same network from the same seed, trained with our kernels and with the plain reference")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, help="lung CT, as fetch_lung_ct.py puts it")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/same_curve"), metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        volumes = [prepare(v, 3.0, (-1000.0, 400.0)) for v in read_folder(arguments.data)]
    except DataError as error:
        print(f"same_curve: {error}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = {"patch_size": (32, 32, 32), "batch_size": 2, "features": 8, "levels": 3, "norm": "instance", "lr": 2e-3}
    tables = {}
    for name, amp in (("float32", False), ("bfloat16 autocast", True)):
        tables[name] = curves(volumes, Settings(steps=arguments.steps, amp=amp, **settings))
        tables[name].to_csv(arguments.out / f"same_curve_{name.split()[0]}.csv", index=False, float_format="%.9g")
        apart = {c: (tables[name][c] - tables[name].reference).abs() for c in CURVES if c != "reference"}
        for curve, d in apart.items():
            print(f"{name}, {curve} less reference: first 20 steps {d[:20].max():.1e}, all {d.median():.1e} (median)")
    draw(tables, arguments.out / "same_curve.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
