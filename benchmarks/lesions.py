"""What regions, partial labels and hard counts cost: python -m benchmarks.lesions.

Forward and backward of a Tversky loss on 60 lesions, plain and with regions of several kinds, and what one does without
them: a loop over the lesions, with torch and with MONAI's loss. Then the counts of a validation step beside arg-max,
one-hot and MONAI's confusion matrix. All take turns in one run. Rows are appended to benchmarks/results/lesions.csv.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time

import monai
import numpy as np
import torch
from monai.metrics.confusion_matrix import get_confusion_matrix

import tversky_kernels as tk
from benchmarks.results_table import ResultsTable
from benchmarks.run import describe_run
from benchmarks.timing import spread
from tversky_kernels._memory import peak_bytes

SHAPES = ((2, 128), (4, 128), (14, 96))
LESIONS = 60
FIELDS = ["case", "what", "milliseconds", "spread", "of_plain", "gradients"]


def label_of(classes: int, size: int, seed: int = 0) -> torch.Tensor:
    """(size, size, size) uint8: boxes of labels 1 to classes - 1."""
    random = np.random.default_rng(seed)
    label = np.zeros((size,) * 3, np.uint8)
    for _ in range(LESIONS):
        at, radius = random.integers(4, size - 4, 3), random.integers(1, 4)
        label[tuple(slice(x - radius, x + radius) for x in at)] = random.integers(1, classes)
    return torch.from_numpy(label)


def step(loss, logits: torch.Tensor, *arguments, **options):
    """A call that computes the loss and its gradient."""

    def run():
        value = loss(logits, *arguments, **options)
        return torch.autograd.grad(value, logits)

    return run


def torch_loop(logits, label, regions, number):
    """A Tversky loss for each region, by torch's operators."""
    p, losses = logits.softmax(1), []
    g = torch.nn.functional.one_hot(label.long(), logits.size(1)).movedim(-1, 1)
    for r in range(number):
        here = (regions == r).unsqueeze(1)
        tp = (p * g * here).flatten(2).sum(2)
        fp, fn = (p * here).flatten(2).sum(2) - tp, (g * here).flatten(2).sum(2) - tp
        losses.append(1 - (tp + 1e-5) / (tp + 0.3 * fp + 0.7 * fn + 1e-5))
    return torch.stack(losses).mean()


def monai_loop(logits, label, regions, number):
    """The same by MONAI's masked loss."""
    one = monai.losses.TverskyLoss(softmax=False, alpha=0.3, beta=0.7, smooth_nr=1e-5, smooth_dr=1e-5)
    p = logits.softmax(1)
    g = torch.nn.functional.one_hot(label.long(), logits.size(1)).movedim(-1, 1)
    return torch.stack([one(p * (m := (regions == r).unsqueeze(1)), g * m) for r in range(number)]).mean()


def argmax_and_monai(logits, label):
    """tp, fp, tn, fn of the arg-max."""
    classes = logits.size(1)
    predicted = torch.nn.functional.one_hot(logits.argmax(1), classes).movedim(-1, 1)
    return get_confusion_matrix(predicted, torch.nn.functional.one_hot(label.long(), classes).movedim(-1, 1))


def losses(classes: int, size: int) -> tuple[dict, dict]:
    """Calls by name that take turns, and slow ones."""
    label = label_of(classes, size)
    cells, number = tk.regions.voronoi(label, batch=False)
    blobs, of_blobs = tk.regions.components(label)
    logits = torch.randn(1, classes, size, size, size, requires_grad=True)
    target, generator = label[None], torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, target.shape, generator=generator).short()
    rows = (torch.arange(label.numel()) * 1000 // label.numel()).view(target.shape).short()
    partly = torch.ones(1, classes, dtype=torch.bool)
    partly[:, classes // 2 + 1 :] = False
    drawn = torch.where(target > classes // 2, 0, target)
    loss, cell = tk.tversky_loss, {"regions": cells[None], "num_regions": number}
    calls = {
        "plain": step(loss, logits, target),
        "one region": step(loss, logits, target, regions=torch.zeros_like(target), num_regions=1),
        f"{number} Voronoi regions": step(loss, logits, target, **cell),
        "the same, plain torch by blocks": step(loss, logits, target, backend="blocks", **cell),
        "blob_loss": step(tk.blob_loss, logits, target, regions=blobs[None], num_regions=of_blobs),
        "1,000 regions, slabs": step(loss, logits, target, regions=rows, num_regions=1000),
        "1,000 regions, at random": step(loss, logits, target, regions=ids, num_regions=1000),
        "tversky_ce_loss": step(tk.tversky_ce_loss, logits, target),
        "overlap_counts with cross-entropy": step(
            lambda z, t: sum(x.sum() for x in tk.overlap_counts(z, t, cross_entropy=True)), logits, target
        ),
    }
    if classes > 2:
        calls["partial labels"] = step(loss, logits, drawn, annotated=partly)
    with_no_gradient = logits.detach()
    calls["hard_counts"] = lambda: tk.hard_counts(with_no_gradient, target)
    calls["a sum of logits and target"] = lambda: (with_no_gradient.sum(), target.sum())
    slow = {
        "a loop over the regions, torch": step(torch_loop, logits, target, cells[None], number),
        "a loop over the regions, MONAI": step(monai_loop, logits, target, cells[None], number),
        "arg-max, one-hot, MONAI's counts": lambda: argmax_and_monai(with_no_gradient, target),
    }
    return calls, slow


def measure(classes: int, size: int, repeats: int) -> list[dict]:
    """Rows of one shape."""
    calls, slow = losses(classes, size)
    times: dict[str, list[float]] = {name: [] for name in (*calls, *slow)}
    for repeat in range(repeats + 2):  # two to warm up
        for name, call in {**calls, **(slow if repeat in (0, 2, 3, 4) else {})}.items():
            start = time.perf_counter()
            call()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    gradient = 4 * classes * size**3
    plain = statistics.median(times["plain"])
    rows = []
    for name, call in {**calls, **slow}.items():
        median = statistics.median(times[name])
        memory = peak_bytes(call, torch.device("cpu")) / gradient
        rows.append({"case": f"{classes} classes, {size}^3", "what": name, "milliseconds": 1e3 * median,
                     "spread": spread(times[name]), "of_plain": median / plain, "gradients": memory})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"), metavar="DIR")
    arguments = parser.parse_args()
    run = describe_run()
    table = ResultsTable(arguments.out / "lesions.csv", [*run, *FIELDS])
    for classes, size in SHAPES:
        rows = measure(classes, size, arguments.repeats)
        table.append([{**run, **row} for row in rows])
        print(f"\n{rows[0]['case']}")
        for r in rows:
            print(
                f"  {r['what']:36} {r['milliseconds']:9.2f} ms +-{100 * r['spread']:3.0f}% "
                f"{r['of_plain']:8.2f} x plain {r['gradients']:6.2f} gradients"
            )
    print(f"\nAppended to {table.path}")


if __name__ == "__main__":
    main()
