"""The last layer and its loss, one after the other and in one (`linear_tversky_loss`): python -m benchmarks.head.

Forward and backward from the features of a network on, to the gradients of features, weight and bias: a convolution of
size 1 (or a matrix product) and each loss, and `linear_tversky_loss`, taking turns in random order. Peak memory is
beyond the features, the target and the parameters, and holds the gradient of the features. Rows are appended to
benchmarks/results/head.csv.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

import tversky_kernels as tk
from benchmarks.cases import DTYPES, Case
from benchmarks.providers import ALPHA, BETA, PROVIDERS
from benchmarks.results_table import ResultsTable
from benchmarks.run import describe_run
from benchmarks.timing import spread, timed
from examples.loss_cost import peak_bytes

IN_ONE = "linear_tversky_loss"
MATMUL = "ours, in place, after a matrix product"  # the same layer without torch's convolution
LOSSES = ("ours", "ours, in place", "lean compiled, gather", "MONAI TverskyLoss")
SHAPES = ((128, 2), (128, 14), (96, 118))
FIELDS = [
    *("case", "channels", "loss", "version", "status", "milliseconds", "spread", "of_one", "peak_mib", "features_mib"),
    *("logits_mib", "loss_error", "gradient_error"),
]


def steps(case: Case, layer: torch.nn.Conv3d, names: Sequence[str]) -> dict[str, Callable | str]:
    """By name, the loss as a function of features and target, or why it is not there."""

    def in_one(features, target):
        return tk.linear_tversky_loss(features, layer.weight, layer.bias, target, alpha=ALPHA, beta=BETA)

    def after_matmul(features, target):
        logits = torch.matmul(layer.weight.flatten(1), features.flatten(2)) + layer.bias[:, None]
        loss = tk.TverskyLoss(alpha=ALPHA, beta=BETA, inplace_backward=True)
        return loss(logits.unflatten(2, features.shape[2:]), target)

    found: dict[str, Callable | str] = {IN_ONE: in_one, MATMUL: after_matmul}
    for name in names:
        try:
            loss = PROVIDERS[name].make(case)
        except ImportError as error:
            found[name] = f"missing: {error.name}"
            continue
        found[name] = lambda features, target, loss=loss: loss(layer(features), target)
    return found


def truth_of(layer: torch.nn.Conv3d, features: torch.Tensor, target: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The float64 reference's loss, and its gradient of the weight."""
    weight, bias = (x.detach().double().requires_grad_() for x in (layer.weight, layer.bias))
    loss = tk.reference.linear_tversky_loss(features.detach().double(), weight, bias, target, alpha=ALPHA, beta=BETA)
    return loss.item(), torch.autograd.grad(loss, weight)[0]


def measure(case: Case, channels: int, repeats: int, names: Sequence[str] = ()) -> list[dict]:
    """A row a loss: those in one or after a matrix product, and these (none: `LOSSES`) after a convolution."""
    torch.manual_seed(0)
    _, target = case.inputs(seed=0)
    source = torch.randn(case.samples, channels, *target.shape[2:], device=case.device).to(DTYPES[case.dtype])
    layer = torch.nn.Conv3d(channels, case.classes, 1).to(case.device, DTYPES[case.dtype])
    losses = steps(case, layer, names or LOSSES)
    there = {name: loss for name, loss in losses.items() if callable(loss)}
    true_loss, true_gradient = truth_of(layer, source, target)
    times: dict[str, list[float]] = {name: [] for name in there}
    found: dict[str, dict] = {}

    def step(loss, features):
        layer.zero_grad()
        value = loss(features, target)
        value.backward()
        return value

    for name, loss in there.items():  # these also warm up
        value = step(loss, source.clone().requires_grad_()).item()
        error = (layer.weight.grad.double() - true_gradient).norm() / true_gradient.norm()
        features = source.clone().requires_grad_()
        peak = peak_bytes(lambda loss=loss, features=features: step(loss, features), source.device)
        found[name] = {
            "peak_mib": peak / 2**20,
            "loss_error": abs(value - true_loss) / abs(true_loss),
            "gradient_error": error.item(),
        }
    for _ in range(repeats):
        for name in random.sample(list(there), len(there)):
            taken = timed(
                lambda x, loss=there[name]: step(loss, x), lambda: (source.clone().requires_grad_(),), case.device
            )
            times[name].append(taken.work)
    in_one = statistics.median(times[IN_ONE])
    rows = []
    for name, loss in losses.items():
        row = {
            "case": case.name, "channels": channels, "loss": name, "status": loss if isinstance(loss, str) else "ok",
            "version": PROVIDERS[name].version if name in PROVIDERS else PROVIDERS["ours"].version,
            "features_mib": source.nbytes / 2**20, "logits_mib": case.logits_bytes / 2**20,
        }  # fmt: skip
        if name in there:
            median = statistics.median(times[name])
            row.update(milliseconds=1e3 * median, spread=spread(times[name]), of_one=median / in_one, **found[name])
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--channels", type=int, default=32, help="of the features; default: %(default)s")
    parser.add_argument("--loss", action="append", choices=LOSSES, metavar="NAME", help="default: all of them")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"), metavar="DIR")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda: torch finds no CUDA device", file=sys.stderr)
        return 2
    run = describe_run()
    table = ResultsTable(arguments.out / "head.csv", [*run, *FIELDS])
    print(f"{run['machine']}, {run['cores']} cores, {run['threads']} threads, torch {run['torch']}, {run['commit']}")
    for side, classes in tqdm(SHAPES, unit="case", disable=None):
        case = Case(side, classes, dtype=arguments.dtype, device=arguments.device)
        rows = measure(case, arguments.channels, arguments.repeats, arguments.loss or ())
        table.append([{**run, **row} for row in rows])
        first = rows[0]
        tqdm.write(
            f"\n{case.name}, {arguments.channels} channels: features {first['features_mib']:.0f} MiB, "
            f"logits {first['logits_mib']:.0f} MiB"
        )
        for r in rows:
            if r["status"] != "ok":
                tqdm.write(f"  {r['loss']:38} {r['status']}")
                continue
            tqdm.write(
                f"  {r['loss']:38} {r['milliseconds']:8.2f} ms +-{100 * r['spread']:3.0f}%  {r['of_one']:5.2f} x, peak "
                f"{r['peak_mib']:6.0f} MiB, errors {r['loss_error']:.1e}, {r['gradient_error']:.1e}"
            )
    print(f"\nAppended to {table.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
