"""What joining ranks costs: python -m benchmarks.ranks. Gloo processes on this machine, beside a model of the cost.

Every process has a volume of the same size and calls the loss forward and backward, alone and with `process_group`, in
turns; so does an all-reduce of a table of that size. The slowest rank of a call is its time. The model: the time alone
and two all-reduces, of the tables' sizes and of the tables. Rows go to benchmarks/results/ranks.csv, the picture beside
them.
"""

from __future__ import annotations

import argparse
import pathlib
import socket
import statistics
import time

import matplotlib
import torch

import tversky_kernels as tk
from benchmarks.results_table import ResultsTable
from benchmarks.run import describe_run

matplotlib.use("Agg")
FIELDS = ["case", "processes", "what", "milliseconds", "spread"]
CLASSES = (2, 14)
WHAT = ("alone", "joined", "all_reduce")


def one_rank(rank: int, world: int, port: int, size: int, rounds: int, queue) -> None:
    """Measures on one rank; rank 0 puts each call's slowest time into the queue."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=world, rank=rank)
    for classes in CLASSES:
        logits = torch.randn(1, classes, size, size, size, requires_grad=True)
        target = torch.randint(0, classes, (1, size, size, size), dtype=torch.uint8)
        table = torch.zeros(classes * 3 + 8, dtype=torch.float64)

        def loss(group, logits=logits, target=target):
            logits.grad = None
            tk.tversky_loss(logits, target, batch=True, process_group=group).backward()

        calls = {
            "alone": lambda loss=loss: loss(None),
            "joined": lambda loss=loss: loss(True),
            "all_reduce": lambda table=table: torch.distributed.all_reduce(table),
        }
        taken = torch.zeros(len(WHAT), rounds, dtype=torch.float64)
        for i in range(-3, rounds):
            for j, what in enumerate(WHAT):
                torch.distributed.barrier()
                start = time.perf_counter()
                calls[what]()
                taken[j, max(i, 0)] = (time.perf_counter() - start) * 1e3
        torch.distributed.all_reduce(taken, torch.distributed.ReduceOp.MAX)
        if rank == 0:
            queue.put((classes, taken.tolist()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure(world: int, size: int, rounds: int) -> dict[int, list[list[float]]]:
    """Milliseconds by class count: a list for each of WHAT."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    torch.multiprocessing.spawn(one_rank, (world, port, size, rounds, queue), world)
    return dict(queue.get() for _ in CLASSES)


def draw(found: dict, size: int, cores: int, path: pathlib.Path) -> None:
    """Measured and modelled time of a call against the number of processes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(CLASSES), figsize=(9, 3.4), layout="constrained")
    worlds = list(found)
    for axis, classes in zip(axes, CLASSES, strict=True):
        alone, joined, reduce = ([found[w][classes][what] for w in worlds] for what in WHAT)
        for name, values, style in (
            ("each rank by itself", alone, "o-"),
            ("joined (process_group)", joined, "s-"),
            ("model: by itself + 2 all-reduces", [a + 2 * r for a, r in zip(alone, reduce, strict=True)], "k--"),
        ):
            axis.plot(worlds, values, style, label=name)
        axis.set(title=f"{classes} classes, {size}³ voxels a process", ylim=(0, None), xticks=worlds)
        axis.set_xlabel(f"gloo processes on {cores} cores, one thread each")
        axis.set_ylabel("forward + backward, ms (median)")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes rows, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    given = parser.parse_args(arguments)
    run = {**describe_run(), "threads": 1}
    table, found = ResultsTable(given.out / "ranks.csv", [*run, *FIELDS]), {}
    for world in given.processes:
        for classes, taken in measure(world, given.size, given.rounds).items():
            for what, times in zip(WHAT, taken, strict=True):
                quartiles = statistics.quantiles(times, n=4)
                found.setdefault(world, {}).setdefault(classes, {})[what] = quartiles[1]
                row = {"case": f"{given.size}^3 x {classes}", "processes": world, "what": what}
                spread = (quartiles[2] - quartiles[0]) / quartiles[1]
                table.append([{**run, **row, "milliseconds": quartiles[1], "spread": spread}])
                print(f"{world} processes, {classes} classes, {what}: {quartiles[1]:.3f} ms, spread {spread:.0%}")
    draw(found, given.size, run["cores"], given.out / "ranks.png")


if __name__ == "__main__":
    main()
