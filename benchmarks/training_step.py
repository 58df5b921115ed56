"""What the loss takes of a whole training step: python -m benchmarks.training_step.

Networks: the demo's, MONAI's UNet and nnU-Net's plain U-Net (where its package is installed). Measured are the loss's
share of the step's time, its share of the step's peak memory, and the largest patch that trains in a given memory:
all with our loss, ours in place, and the others' own. Rows are appended to benchmarks/results/training_step.csv.
"""

from __future__ import annotations

import argparse
import copy
import functools
import pathlib
import sys
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

import tversky_kernels as tk
from benchmarks.cases import Case
from benchmarks.providers import DICE, PROVIDERS
from benchmarks.results_table import ResultsTable
from benchmarks.run import describe_run
from examples.fcn import FCN
from examples.loss_cost import loss_cost, peak_bytes

CLASSES = (2, 14, 118)
LOSSES = (
    "our Dice + CE",
    "our Dice + CE, in place",
    "MONAI DiceCELoss",
    "nnU-Net DC_and_CE_loss",
    "exacta DiceCELoss",
)
#: Only for the largest patch, of a network whose last layer is its ``head``: `linear_tversky_loss`.
WITH_HEAD = "our Dice + CE, last layer within"
FIELDS = [
    *("device", "measured", "network", "parameters", "classes", "side", "loss", "version", "status", "loss_seconds"),
    *("share_of_time", "step_peak_mib", "share_of_peak", "budget_mib", "largest_side"),
]
STEP = 16  # sides of patches; every network here halves them four times at the most


def fcn(classes: int) -> nn.Module:
    """The demo's network."""
    return FCN(inputs=1, classes=classes, features=8, norm="instance")


def monai_unet(classes: int) -> nn.Module:
    """MONAI's UNet at the sizes of its tutorials."""
    from monai.networks.nets import UNet

    return UNet(3, 1, classes, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2)


def nnunet_plain(classes: int) -> nn.Module:
    """nnU-Net's plain U-Net with its own default features, to four halvings, without deep supervision."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    features = [32, 64, 128, 256, 320]
    return PlainConvUNet(
        1, len(features), features, nn.Conv3d, 3, [1, 2, 2, 2, 2], 2, classes, 2,
        conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "demo FCN": fcn,
    "MONAI UNet": monai_unet,
    "nnU-Net plain U-Net": nnunet_plain,
}


def available_losses(case: Case) -> dict[str, Callable | str]:
    """Every loss, or why it is not there."""
    found: dict[str, Callable | str] = {}
    for name in LOSSES:
        try:
            found[name] = PROVIDERS[name].make(case)
        except ImportError as error:
            found[name] = f"missing: {error.name}"
    return found


def peak_of_step(network: nn.Module, image: torch.Tensor, finish: Callable[[torch.Tensor], None]) -> int:
    """Of forward, loss and backward, beyond parameters, their gradients and the image."""

    def step():
        network.zero_grad(set_to_none=False)
        finish(network(image))

    step()  # so that the parameters' gradients are there
    return peak_bytes(step, image.device)


def inputs_of(side: int, classes: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An image and a target of that size."""
    _, target = Case(side, classes, device=device).inputs(seed=0)
    return torch.randn(1, 1, side, side, side, generator=torch.Generator().manual_seed(0)).to(device), target


def shares(name: str, make: Callable, classes: int, side: int, device: str, repeats: int) -> list[dict]:
    """Rows: time and memory of one network with every loss."""
    torch.manual_seed(0)
    network = make(classes).to(device)
    image, target = inputs_of(side, classes, device)
    losses = available_losses(Case(side, classes, device=device))
    there = {n: loss for n, loss in losses.items() if callable(loss)}
    cost = loss_cost(there, functools.partial(network, image), target, repeats)
    # What the step takes with a gradient of the logits that is simply there.
    alone = peak_of_step(network, image, lambda logits: logits.sum().backward())
    rows = []
    for loss_name, loss in losses.items():
        row = {
            "measured": "shares", "network": name, "classes": classes, "side": side, "loss": loss_name,
            "parameters": sum(p.numel() for p in network.parameters()),
            "version": PROVIDERS[loss_name].version,
            "status": loss if isinstance(loss, str) else "ok",
        }  # fmt: skip
        if callable(loss):
            peak = peak_of_step(network, image, lambda logits, loss=loss: loss(logits, target).backward())
            row.update(
                loss_seconds=cost[loss_name]["seconds"],
                share_of_time=cost[loss_name]["share"],
                step_peak_mib=peak / 2**20,
                share_of_peak=max(0, peak - alone) / peak,
            )
        rows.append(row)
    return rows


def _without_head(network: nn.Module) -> nn.Module:
    # The same network, its parameters shared, which returns what its last layer would take.
    headless = copy.copy(network)
    headless._modules = {**network._modules, "head": nn.Identity()}
    return headless


def _loss_with_head(head: nn.Conv3d, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return tk.linear_tversky_loss(features, head.weight, head.bias, target, loss="tversky_ce", **DICE)


def largest_patches(name: str, make: Callable, classes: int, budget: int, most: int, device: str) -> list[dict]:
    """Rows: the largest cube, in steps of 16, whose step stays within the budget."""
    torch.manual_seed(0)
    network = make(classes).to(device)
    losses = available_losses(Case(STEP, classes, device=device))
    bodies = dict.fromkeys(losses, network)
    if hasattr(network, "head"):
        losses[WITH_HEAD] = functools.partial(_loss_with_head, network.head)
        bodies[WITH_HEAD] = _without_head(network)
    largest = {n: loss if isinstance(loss, str) else 0 for n, loss in losses.items()}
    peaks: dict[str, int] = {}
    within = [n for n, side in largest.items() if side == 0]
    for side in range(2 * STEP, most + 1, STEP):
        image, target = inputs_of(side, classes, device)
        for n in list(within):
            peak = peak_of_step(
                bodies[n],
                image,
                lambda output, loss=losses[n], target=target: loss(output, target).backward(),
            )
            if peak <= budget:
                largest[n], peaks[n] = side, peak
            else:
                within.remove(n)
        if not within:
            break
    return [
        {
            "measured": "largest patch", "network": name, "classes": classes, "loss": n, "budget_mib": budget / 2**20,
            "parameters": sum(p.numel() for p in network.parameters()),
            "version": PROVIDERS["our Dice + CE" if n == WITH_HEAD else n].version,
            **({"status": side} if isinstance(side, str) else {"status": "ok", "largest_side": side}),
            "step_peak_mib": peaks[n] / 2**20 if n in peaks else "",
        }
        for n, side in largest.items()
    ]  # fmt: skip


def print_rows(rows: list[dict]) -> None:
    """A line for each."""
    for r in rows:
        head = f"  {r['network']:20} C = {r['classes']:<4} {r['loss']:26}"
        if r["status"] != "ok":
            tqdm.write(f"{head} {r['status']}")
        elif r["measured"] == "shares":
            tqdm.write(
                f"{head} {r['side']}^3: {1e3 * r['loss_seconds']:8.1f} ms, {100 * r['share_of_time']:5.1f} % of the "
                f"time; peak {r['step_peak_mib']:7.0f} MiB, {100 * r['share_of_peak']:5.1f} % of it the loss's"
            )
        else:
            tqdm.write(f"{head} largest patch in {r['budget_mib']:.0f} MiB: {r['largest_side']}^3")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--network", action="append", choices=list(NETWORKS))
    parser.add_argument("--classes", action="append", type=int, help=f"default: {CLASSES}")
    parser.add_argument("--side", type=int, default=64, help="of the patch for the shares; default: %(default)s")
    parser.add_argument("--budget-mib", type=int, default=1024, help="for the largest patch; default: %(default)s")
    parser.add_argument("--most-side", type=int, default=160, help="of the largest patch; default: %(default)s")
    parser.add_argument("--shares-only", action="store_true", help="do not look for the largest patch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"), metavar="DIR")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda: torch finds no CUDA device", file=sys.stderr)
        return 2
    run = {**describe_run(), "device": arguments.device}
    table = ResultsTable(arguments.out / "training_step.csv", list(dict.fromkeys([*run, *FIELDS])))
    print(f"{run['machine']}, {run['cores']} cores, {run['threads']} threads, torch {run['torch']}, {run['commit']}")
    work = [(n, c) for n in arguments.network or NETWORKS for c in arguments.classes or CLASSES]
    for name, classes in tqdm(work, unit="network", disable=None):
        make = NETWORKS[name]
        try:
            make(classes)
        except ImportError as error:
            table.append([{**run, "network": name, "classes": classes, "status": f"missing: {error.name}"}])
            tqdm.write(f"  {name:20} missing: {error.name}")
            continue
        rows = shares(name, make, classes, arguments.side, arguments.device, arguments.repeats)
        print_rows(rows)
        table.append([{**run, **row} for row in rows])
        if name in ("demo FCN", "MONAI UNet") and not arguments.shares_only:
            rows = largest_patches(
                name, make, classes, arguments.budget_mib * 2**20, arguments.most_side, arguments.device
            )
            print_rows(rows)
            table.append([{**run, **row} for row in rows])
    print(f"\nAppended to {table.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
