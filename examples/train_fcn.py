"""Trains the 3D FCN of Salehi, Erdogmus, Gholipour (2017) with the Tversky loss, and reports what their paper reports.

Cross-validation by patient: the network that segments a patient has never seen that patient. The defaults are the
paper's where it gives them (Adam, learning rate 1e-4, times 0.9 every 1000 steps, alpha 0.3, beta 0.7, threshold 0.5);
`make demo` overrides those that want hours. Results, logs, weights and pictures go to --out:

  results.csv, results.json   the figures of every held-out patient, the settings and the versions
  log.csv                     loss and learning rate of every step
  fold_*.pt                   checkpoints; --resume goes on from them and ends at the same weights
  *.png                       precision-recall curves, and slices with truth and prediction

Own data: --data DIR --modalities flair t1 t2 --label lesions --z-score --crop; volumes.py says how files are named.
--sweep beta trains once for each beta of the paper's Table 1 and prints the table of them all.

Many GPUs: torchrun --nproc-per-node 4 examples/train_fcn.py --batch-size 4 ...; a batch is shared by the ranks, and the
weights are those of one process with that batch, but for rounding (cross-entropy with class weights apart: torch's is
normalised by each rank's own labels).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime
import io
import json
import os
import pathlib
import platform
import sys
from collections.abc import Iterator
from typing import get_args

import monai
import numpy as np
import pandas as pd
import torch
from evaluate import LESION_NAMES, NAMES, lesion_scores, scores
from loss_cost import loss_cost
from pictures import precision_recall, slices
from recipes import BETAS, RECIPES, Loss, Sampling, cross_entropy, regional_tversky
from sklearn.model_selection import KFold
from tqdm import tqdm
from training import Settings, Trainer, rank_of_process
from volumes import DataError, Volume, prepare, read_folder

import tversky_kernels as tk

#: What may differ where a run is continued.
LOSSES = ("tversky", "dice", "focal-tversky", "regional-tversky", "cross-entropy")
NOT_IDENTITY = {"fold", "steps", "out", "resume", "checkpoint_every", "no_loss_cost", "threads", "device", "workers"}
NOT_IDENTITY |= {"overlap", "sweep"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        type=pathlib.Path,
        default=pathlib.Path(".data/lung"),
        metavar="DIR",
        help="a sub-folder of DICOM files a patient, or NAME_image.nii.gz and NAME_label.nii.gz (%(default)s)",
    )
    data.add_argument("--structure", default="GTV-1", help="the RTSTRUCT contour to learn (%(default)s)")
    data.add_argument(
        "--modalities", nargs="+", default=["image"], metavar="NAME", help="NIfTI: one file of each a patient (image)"
    )
    data.add_argument("--label", default="label", metavar="NAME", help="NIfTI: the mask's file (%(default)s)")
    data.add_argument(
        "--lesion-values", type=int, nargs="+", default=[1], metavar="N", help="NIfTI: what in it is a lesion (1)"
    )
    data.add_argument(
        "--spacing",
        type=float,
        nargs="+",
        default=[3.0],
        metavar="MM",
        help="voxel size: one number, or three as z y x (3.0)",
    )
    data.add_argument("--crop", action="store_true", help="cut away what is dark in every modality, as around a head")
    data.add_argument(
        "--window",
        type=float,
        nargs=2,
        default=(-1000.0, 400.0),
        metavar=("LOW", "HIGH"),
        help="CT numbers that become -1 and 1 (-1000 400)",
    )
    data.add_argument(
        "--z-score",
        action="store_true",
        help="zero mean and unit variance of each modality instead, over voxels that are not 0, as for MR",
    )
    data.add_argument("--folds", type=int, default=0, help="cross-validation folds; 0: leave one patient out")
    data.add_argument("--fold", type=int, action="append", help="run only this fold, from 0; may be repeated")

    network = parser.add_argument_group("network")
    network.add_argument("--features", type=int, default=16, help="features of the first level (%(default)s)")
    network.add_argument("--levels", type=int, default=4, help="levels of the U (%(default)s)")
    network.add_argument("--norm", choices=("none", "instance"), default="none", help="normalisation (%(default)s)")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=1000, help="optimiser steps a fold (%(default)s)")
    training.add_argument("--batch-size", type=int, default=1, help="patches a step (%(default)s)")
    training.add_argument(
        "--patch-size",
        type=int,
        nargs=3,
        default=(48, 48, 48),
        metavar=("D", "H", "W"),
        help="of training and sliding window, multiples of 2^(levels-1) (48 48 48)",
    )
    training.add_argument(
        "--overlap", type=float, default=0.5, metavar="SHARE", help="of the sliding windows (%(default)s)"
    )
    training.add_argument(
        "--sampling",
        choices=get_args(Sampling),
        default="balanced",
        help="where patches come from, as recipes.py says (%(default)s)",
    )
    training.add_argument(
        "--lesion-share", type=float, default=0.5, metavar="SHARE", help="of balanced patches (%(default)s)"
    )
    training.add_argument("--lr", type=float, default=1e-4, help="Adam's learning rate (%(default)s)")
    training.add_argument(
        "--decay-every",
        type=int,
        default=1000,
        metavar="STEPS",
        help="multiply the learning rate by 0.9 this often (%(default)s)",
    )
    training.add_argument("--seed", type=int, default=0, help="of weights, patches and flips (%(default)s)")
    training.add_argument(
        "--amp", action="store_true", help="bfloat16 autocast (float16 with loss scaling on cards that lack it)"
    )
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    training.add_argument("--workers", type=int, default=2, help="processes that load patches (%(default)s)")
    training.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice (%(default)s)")

    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--recipe",
        choices=RECIPES,
        help="a loss and a sampling of recipes.py; --loss and what belongs to it are not read",
    )
    loss.add_argument(
        "--sweep", choices=("beta",), help="train with every alpha / beta of the paper's Table 1 and compare"
    )
    loss.add_argument("--loss", choices=LOSSES, default="tversky")
    loss.add_argument("--alpha", type=float, default=0.3, help="weight of false positives (%(default)s)")
    loss.add_argument("--beta", type=float, default=0.7, help="weight of false negatives (%(default)s)")
    loss.add_argument("--gamma", type=float, default=0.75, help="exponent of the focal loss (%(default)s)")
    loss.add_argument(
        "--class-weights",
        type=float,
        nargs=2,
        default=(1.0, 20.0),
        metavar=("BACKGROUND", "LESION"),
        help="of the cross-entropy (1 20)",
    )
    loss.add_argument(
        "--backend",
        choices=("auto", "cpu", "cuda", "triton", "reference", "monai"),
        default="auto",
        help="of our loss; 'reference' and 'monai' are naive ones to compare with (%(default)s)",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/fcn"), metavar="DIR", help="(%(default)s)"
    )
    output.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    output.add_argument("--checkpoint-every", type=int, default=50, metavar="STEPS", help="(%(default)s)")
    output.add_argument("--no-loss-cost", action="store_true", help="do not compare the cost of the losses at the end")
    arguments = parser.parse_args(argv)
    if any(s % 2 ** (arguments.levels - 1) for s in arguments.patch_size):
        parser.error(f"--patch-size: expected multiples of {2 ** (arguments.levels - 1)}, got {arguments.patch_size}")
    for name in ("steps", "batch_size", "checkpoint_every", "features", "levels", "decay_every"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(arguments, name)}")
    if arguments.backend == "monai" and arguments.loss not in ("tversky", "dice"):
        parser.error(f"--backend monai: expected --loss tversky or dice, got {arguments.loss}")
    if len(arguments.spacing) not in (1, 3):
        parser.error(f"--spacing: expected one number or three, got {len(arguments.spacing)}")
    for name in ("lesion_share", "overlap"):
        if not 0 <= getattr(arguments, name) < (1 if name == "overlap" else 1 + 1e-9):
            parser.error(f"--{name.replace('_', '-')}: expected 0 to 1, got {getattr(arguments, name)}")
    if arguments.recipe and arguments.sweep:
        parser.error("--sweep: expected no --recipe beside it")
    arguments.spacing = arguments.spacing[0] if len(arguments.spacing) == 1 else tuple(arguments.spacing)
    arguments.window = None if arguments.z_score else tuple(arguments.window)
    arguments.patch_size = tuple(arguments.patch_size)
    return arguments


def make_loss(arguments: argparse.Namespace, backend: str | None = None, inplace: bool = False) -> Loss:
    backend = backend or arguments.backend
    if arguments.recipe:
        return RECIPES[arguments.recipe].loss()
    if arguments.loss == "cross-entropy":
        return cross_entropy(tuple(arguments.class_weights))()
    alpha, beta = (0.5, 0.5) if arguments.loss == "dice" else (arguments.alpha, arguments.beta)
    if backend == "monai":
        # Our smoothing is MONAI's default too.
        return monai.losses.TverskyLoss(
            softmax=True, to_onehot_y=True, include_background=False, batch=True, alpha=alpha, beta=beta
        )
    if arguments.loss == "regional-tversky":
        return regional_tversky(alpha, beta, backend=backend)()
    gamma = arguments.gamma if arguments.loss == "focal-tversky" else 1.0
    return tk.TverskyLoss(
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        include_background=False,  # the paper's loss is the lesion's alone
        batch=True,  # a patch without a lesion would teach nothing by itself; together they stand for a volume
        backend=backend,
        inplace_backward=inplace,
    )


def make_trainer(arguments: argparse.Namespace, fold: int, volumes: list[Volume]) -> Trainer:
    settings = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Settings)}
    if arguments.recipe:
        settings["sampling"] = RECIPES[arguments.recipe].sampling or arguments.sampling
    identity = {name: value for name, value in vars(arguments).items() if name not in NOT_IDENTITY}
    if "two-step" in settings["sampling"]:
        identity["steps"] = arguments.steps  # the second step begins in the middle
    identity = json.loads(json.dumps(identity, default=str))
    path = arguments.out / f"fold_{fold}.pt"
    return Trainer(
        Settings(**settings), make_loss(arguments), volumes, fold, path, identity, arguments.checkpoint_every
    )


def compare_costs(arguments: argparse.Namespace, trainer: Trainer, repeats: int = 15) -> dict[str, dict[str, float]]:
    """Our loss against the naive ones in this run's own training step, on one batch."""
    image, label = trainer.first_batch()
    losses = {
        "tversky_kernels": make_loss(arguments, backend="auto"),
        "tversky_kernels, in place": make_loss(arguments, backend="auto", inplace=True),
        "our reference (naive)": make_loss(arguments, backend="reference"),
        "MONAI TverskyLoss (naive)": make_loss(arguments, backend="monai"),
    }
    return loss_cost(losses, lambda: trainer.logits(image), label, repeats)


def read_volumes(arguments: argparse.Namespace) -> list[Volume]:
    volumes = read_folder(
        arguments.data, arguments.structure, arguments.modalities, arguments.label, arguments.lesion_values
    )
    prepared = [
        prepare(v, arguments.spacing, arguments.window, arguments.crop)
        for v in tqdm(volumes, desc="reading", unit="patient", disable=rank_of_process()[0] > 0)
    ]
    for v in prepared:
        print(
            f"  {v.patient}: {tuple(v.image.shape[1:])} voxels of {' x '.join(f'{mm:g}' for mm in v.spacing)} mm, "
            f"{100 * v.label.float().mean():.2f} % lesion"
        )
    if len(prepared) < 2:
        raise DataError(f"{arguments.data}: cross-validation expects at least two patients, got one")
    return prepared


def cross_validate(arguments: argparse.Namespace, volumes: list[Volume]) -> pd.DataFrame:
    """Trains and tests every fold that is wanted, writes all results to --out, and returns their table."""
    folds = list(KFold(arguments.folds or len(volumes)).split(volumes))
    wanted = arguments.fold if arguments.fold is not None else range(len(folds))
    if any(not 0 <= f < len(folds) for f in wanted):
        raise DataError(f"--fold: expected 0 to {len(folds) - 1}, got {arguments.fold}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows, cases, pictures, log, seconds = [], [], [], [], 0.0
    for fold in wanted:
        training, held_out = folds[fold]
        trainer = make_trainer(arguments, fold, [volumes[i] for i in training])
        if arguments.resume:
            trainer.resume()
        trainer.train()
        if trainer.rank > 0:
            continue  # the first rank scores and writes; the others wait for it at the next fold's first step
        log += trainer.log
        seconds += trainer.seconds
        for i in held_out:
            v = volumes[i]
            probability, truth = trainer.predict(v), v.label[0].numpy()
            figures = scores(truth, probability)
            rows.append({"patient": v.patient, "fold": fold, **figures, **lesion_scores(truth, probability)})
            cases.append((v.patient, truth, probability))
            path = arguments.out / f"slices_{v.patient}.png"
            pictures.append(slices(v.patient, v.image[0].numpy(), truth, probability, figures["DSC"], path))
    if rank_of_process()[0] > 0:
        return pd.DataFrame()
    pictures.insert(0, precision_recall(cases, arguments.out / "precision_recall.png"))

    table = pd.DataFrame(rows)
    mean = {"patient": "mean", "fold": "", **table[[*NAMES, *LESION_NAMES]].mean().to_dict()}
    pooled_scores = scores(
        np.concatenate([t.ravel() for _, t, _ in cases]), np.concatenate([p.ravel() for *_, p in cases])
    )
    table = pd.concat([table, pd.DataFrame([mean, {"patient": "pooled", "fold": "", **pooled_scores}])])
    table.to_csv(arguments.out / "results.csv", index=False)
    with open(arguments.out / "log.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("fold", "step", "loss", "learning_rate"))
        writer.writerows(log)

    costs = {}
    if (
        not arguments.no_loss_cost
        and arguments.loss not in ("cross-entropy", "regional-tversky")
        and not arguments.recipe
    ):
        costs = compare_costs(arguments, trainer)
    report = {
        "settings": {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(arguments).items()},
        "versions": {
            "tversky_kernels": tk.__version__,
            "torch": torch.__version__,
            "monai": monai.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "backends": tk.available_backends(),
        "training_seconds": seconds,
        "results": json.loads(table.to_json(orient="records")),
        "loss_cost": costs,
    }
    (arguments.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print_report(arguments, table, costs, seconds, pictures)
    return table


def in_percent(table: pd.DataFrame) -> pd.DataFrame:
    percent = table.copy()
    fractions = [name for name in (*NAMES, "lesion_sensitivity") if name in percent]
    percent[fractions] = (100 * percent[fractions]).round(1)
    return percent.rename(columns={"lesion_sensitivity": "lesions found", "false_lesions": "false lesions"}).round(1)


def print_report(arguments, table, costs, seconds, pictures) -> None:
    name = arguments.recipe or arguments.loss
    if "tversky" in arguments.loss and not arguments.recipe:
        name += f" (alpha {arguments.alpha:g}, beta {arguments.beta:g})"
    print(f"\nHeld-out patients, {name}, {arguments.steps} steps a fold, {seconds:.0f} s of training; percent:\n")
    print(in_percent(table.drop(columns="fold")).to_string(index=False, na_rep=""))
    if costs:
        print(
            f"\nThe loss inside this training step ({arguments.batch_size} x "
            f"{' x '.join(map(str, arguments.patch_size))} voxels, 2 classes, {arguments.device}), "
            "forward + backward:\n"
        )
        rows = [
            {
                "loss": name,
                "ms": round(1e3 * c["seconds"], 2),
                "% of the step": round(100 * c["share"], 2),
                "MiB": round(c["MiB"], 2),
            }
            for name, c in costs.items()
        ]
        print(pd.DataFrame(rows).to_string(index=False))
    print("\nPictures:")
    for path in pictures:
        print(f"  {path}")
    print(f"Results: {arguments.out / 'results.json'}, {arguments.out / 'results.csv'}, {arguments.out / 'log.csv'}")


def sweep_beta(arguments: argparse.Namespace, volumes: list[Volume]) -> None:
    """The paper's Table 1 on these data."""
    rows, rank = [], rank_of_process()[0]
    for beta in BETAS:
        own = argparse.Namespace(**vars(arguments))
        own.loss, own.alpha, own.beta, own.out = "tversky", round(1 - beta, 1), beta, arguments.out / f"beta_{beta:g}"
        own.no_loss_cost = True
        table = cross_validate(own, volumes)
        if rank > 0:
            continue
        mean = table[table.patient == "mean"].iloc[0]
        rows.append({"alpha / beta": f"{own.alpha:g} / {beta:g}"} | {n: mean[n] for n in (*NAMES, *LESION_NAMES)})
    if rank > 0:
        return
    table = pd.DataFrame(rows)
    table.to_csv(arguments.out / "sweep.csv", index=False)
    print(f"\nMeans over the held-out patients, percent ({arguments.out / 'sweep.csv'}):\n")
    print(in_percent(table).to_string(index=False))
    print("\nOne seed a setting: differences of a few percent may be chance. Repeat with other --seed.")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            stack.enter_context(one_of_many_ranks(arguments))
        return run(arguments)


@contextlib.contextmanager
def one_of_many_ranks(arguments: argparse.Namespace) -> Iterator[None]:
    """As torchrun starts them: one GPU each, or the CPU; only the first says anything."""
    if arguments.backend == "monai":
        raise SystemExit("train_fcn: --backend monai: expected one process, for its loss sees one rank's patches alone")
    if arguments.device.startswith("cuda"):
        arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(arguments.device)
    # Other ranks wait while the first one scores.
    waits = datetime.timedelta(hours=2)
    torch.distributed.init_process_group("nccl" if arguments.device.startswith("cuda") else "gloo", timeout=waits)
    try:
        with contextlib.ExitStack() as stack:
            if torch.distributed.get_rank() > 0:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            yield
    finally:
        torch.distributed.destroy_process_group()


def run(arguments: argparse.Namespace) -> int:
    try:
        volumes = read_volumes(arguments)
        if arguments.sweep:
            sweep_beta(arguments, volumes)
        else:
            cross_validate(arguments, volumes)
    except DataError as error:
        print(f"train_fcn: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
