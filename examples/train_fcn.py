"""Trains the 3D FCN of Salehi, Erdogmus, Gholipour (2017) with the Tversky loss, and reports what their paper reports.

Cross-validation by patient: the network that segments a patient has never seen that patient. The defaults are the
paper's where it gives them (Adam, learning rate 1e-4, times 0.9 every 1000 steps, alpha 0.3, beta 0.7, threshold 0.5);
`make demo` overrides those that want hours. Results, logs, weights and pictures go to --out:

  results.csv, results.json   the figures of every held-out patient, the settings and the versions
  log.csv                     loss and learning rate of every step
  fold_*.pt                   checkpoints; --resume goes on from them and ends at the same weights
  *.png                       precision-recall curves, and slices with truth and prediction
"""

from __future__ import annotations

import argparse
import csv
import json
import pathlib
import platform
import sys
import time

import monai
import numpy as np
import pandas as pd
import torch
from evaluate import NAMES, scores
from fcn import FCN
from loss_cost import loss_cost
from monai.inferers import sliding_window_inference
from pictures import precision_recall, slices
from sklearn.model_selection import KFold
from tqdm import tqdm
from volumes import DataError, Volume, prepare, read_folder

import tversky_kernels as tk

CHECKPOINT_FORMAT = 1
#: What must be the same for a run to be continued.
IDENTITY = [
    *(
        "data",
        "structure",
        "spacing",
        "window",
        "folds",
        "features",
        "levels",
        "norm",
        "patch_size",
        "batch_size",
        "lr",
    ),
    *("decay_every", "seed", "amp", "loss", "alpha", "beta", "gamma", "class_weights", "backend"),
]


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
    data.add_argument("--spacing", type=float, default=3.0, metavar="MM", help="isotropic voxel size (%(default)s)")
    data.add_argument(
        "--window",
        type=float,
        nargs=2,
        default=(-1000.0, 400.0),
        metavar=("LOW", "HIGH"),
        help="CT numbers that become -1 and 1 (-1000 400)",
    )
    data.add_argument("--z-score", action="store_true", help="scale to zero mean and unit variance instead, as for MR")
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
    training.add_argument("--lr", type=float, default=1e-4, help="Adam's learning rate (%(default)s)")
    training.add_argument(
        "--decay-every",
        type=int,
        default=1000,
        metavar="STEPS",
        help="multiply the learning rate by 0.9 this often (%(default)s)",
    )
    training.add_argument("--seed", type=int, default=0, help="of weights, patches and flips (%(default)s)")
    training.add_argument("--amp", action="store_true", help="bfloat16 autocast (float16 with loss scaling on CUDA)")
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    training.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice (%(default)s)")

    loss = parser.add_argument_group("loss")
    loss.add_argument("--loss", choices=("tversky", "dice", "focal-tversky", "cross-entropy"), default="tversky")
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
    arguments.window = None if arguments.z_score else tuple(arguments.window)
    arguments.patch_size = tuple(arguments.patch_size)
    return arguments


def make_loss(arguments: argparse.Namespace, backend: str | None = None, inplace: bool = False):
    backend = backend or arguments.backend
    if arguments.loss == "cross-entropy":
        weights = torch.tensor(arguments.class_weights, device=arguments.device)
        return lambda z, t: torch.nn.functional.cross_entropy(z.float(), t[:, 0].long(), weights)
    alpha, beta = (0.5, 0.5) if arguments.loss == "dice" else (arguments.alpha, arguments.beta)
    if backend == "monai":
        # Our smoothing is MONAI's default too.
        return monai.losses.TverskyLoss(
            softmax=True, to_onehot_y=True, include_background=False, batch=True, alpha=alpha, beta=beta
        )
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


class Patches:
    """Training patches. Step s of a fold gives the same patches whatever came before, so a run can be resumed."""

    def __init__(self, volumes: list[Volume], arguments: argparse.Namespace, fold: int):
        self.items = [
            {
                "image": pad(v.image, arguments.patch_size, v.image.min().item()),
                "label": pad(v.label, arguments.patch_size),
            }
            for v in volumes
        ]
        self.key = (arguments.seed, fold)
        self.batch_size = arguments.batch_size
        keys = ["image", "label"]
        self.transform = monai.transforms.Compose(
            [
                monai.transforms.RandCropByPosNegLabeld(
                    keys, label_key="label", spatial_size=arguments.patch_size, pos=1, neg=1, num_samples=1
                ),
                *(monai.transforms.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
                monai.transforms.RandScaleIntensityd("image", factors=0.1, prob=0.5),
                monai.transforms.RandShiftIntensityd("image", offsets=0.1, prob=0.5),
            ]
        )

    def batch(self, step: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        random = np.random.RandomState(np.random.SeedSequence((*self.key, step)).generate_state(4))
        self.transform.set_random_state(state=random)
        chosen = [self.transform(self.items[random.randint(len(self.items))])[0] for _ in range(self.batch_size)]
        image, label = (torch.stack([torch.as_tensor(c[k]) for c in chosen]) for k in ("image", "label"))
        return image.to(device), label.to(device)


def pad(x: torch.Tensor, size: tuple[int, ...], value: float = 0) -> torch.Tensor:
    return torch.as_tensor(monai.transforms.SpatialPad(size, value=value)(x))


class Trainer:
    def __init__(self, arguments: argparse.Namespace, fold: int, volumes: list[Volume]):
        torch.manual_seed(arguments.seed * 1000 + fold)
        self.arguments, self.fold = arguments, fold
        self.network = FCN(1, 2, arguments.features, arguments.levels, arguments.norm).to(arguments.device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=arguments.lr)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimiser, arguments.decay_every, 0.9)
        self.half = torch.float16 if arguments.device.startswith("cuda") else torch.bfloat16
        self.scaler = torch.amp.GradScaler(enabled=arguments.amp and self.half == torch.float16)
        self.loss = make_loss(arguments)
        self.patches = Patches(volumes, arguments, fold)
        self.step, self.log, self.seconds = 0, [], 0.0

    @property
    def path(self) -> pathlib.Path:
        return self.arguments.out / f"fold_{self.fold}.pt"

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        with torch.autocast(image.device.type, self.half, enabled=self.arguments.amp):
            return self.network(image)

    def train(self) -> None:
        started = time.perf_counter()
        with tqdm(total=self.arguments.steps, initial=self.step, desc=f"fold {self.fold}", unit="step") as bar:
            while self.step < self.arguments.steps:
                image, label = self.patches.batch(self.step, self.arguments.device)
                self.optimiser.zero_grad(set_to_none=True)
                loss = self.loss(self.logits(image), label)
                if not torch.isfinite(loss):
                    raise SystemExit(f"fold {self.fold}, step {self.step}: the loss is {loss.item()}; stopped")
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimiser)
                self.scaler.update()
                rate = self.schedule.get_last_lr()[0]
                self.schedule.step()
                self.step += 1
                self.log.append((self.fold, self.step, loss.item(), rate))
                bar.update()
                bar.set_postfix(loss=f"{np.mean([row[2] for row in self.log[-20:]]):.3f}")
                if self.step % self.arguments.checkpoint_every == 0:
                    self.save()
        self.seconds += time.perf_counter() - started
        self.save()

    def save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        torch.save(
            {
                "format": CHECKPOINT_FORMAT,
                "arguments": identity(self.arguments),
                "step": self.step,
                "log": self.log,
                "seconds": self.seconds,
                "network": self.network.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
            temporary,
        )
        temporary.replace(self.path)  # never half a checkpoint under the real name

    def resume(self) -> None:
        if not self.path.exists():
            return
        try:
            state = torch.load(self.path, map_location=self.arguments.device, weights_only=True)
            differing = {k for k, v in identity(self.arguments).items() if state["arguments"].get(k) != v}
        except Exception as error:  # whatever unpickling stumbles over
            raise SystemExit(f"{self.path}: not a readable checkpoint: {error}") from error
        if differing or state["format"] != CHECKPOINT_FORMAT:
            raise SystemExit(f"{self.path}: it is of a run with other settings ({', '.join(sorted(differing))})")
        self.step, self.log, self.seconds = state["step"], [tuple(row) for row in state["log"]], state["seconds"]
        for name in ("network", "optimiser", "schedule", "scaler"):
            getattr(self, name).load_state_dict(state[name])

    @torch.no_grad()
    def predict(self, volume: Volume) -> np.ndarray:
        """The lesion's probability in every voxel of a whole volume, by overlapping windows."""
        self.network.eval()
        image = volume.image[None].to(self.arguments.device)
        probability = sliding_window_inference(
            image,
            self.arguments.patch_size,
            1,
            lambda x: self.logits(x).float().softmax(1)[:, 1:],
            overlap=0.5,
            mode="gaussian",
        )
        self.network.train()
        return probability[0, 0].cpu().numpy()


def identity(arguments: argparse.Namespace) -> dict:
    return json.loads(json.dumps({name: getattr(arguments, name) for name in IDENTITY}, default=str))


def compare_costs(trainer: Trainer, repeats: int = 15) -> dict[str, dict[str, float]]:
    """Our loss against the naive ones in this run's own training step, on one batch."""
    arguments = trainer.arguments
    image, label = trainer.patches.batch(0, arguments.device)
    losses = {
        "tversky_kernels": make_loss(arguments, backend="auto"),
        "tversky_kernels, in place": make_loss(arguments, backend="auto", inplace=True),
        "our reference (naive)": make_loss(arguments, backend="reference"),
        "MONAI TverskyLoss (naive)": make_loss(arguments, backend="monai"),
    }
    return loss_cost(losses, lambda: trainer.logits(image), label, repeats)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        volumes = [
            prepare(v, arguments.spacing, arguments.window)
            for v in tqdm(read_folder(arguments.data, arguments.structure), desc="reading", unit="patient")
        ]
    except DataError as error:
        print(f"train_fcn: {error}", file=sys.stderr)
        return 2
    for v in volumes:
        print(
            f"  {v.patient}: {tuple(v.image.shape[1:])} voxels of {arguments.spacing:g} mm, "
            f"{100 * v.label.float().mean():.2f} % lesion"
        )
    if len(volumes) < 2:
        print(f"train_fcn: {arguments.data}: cross-validation expects at least two patients, got one", file=sys.stderr)
        return 2
    folds = list(KFold(arguments.folds or len(volumes)).split(volumes))
    wanted = arguments.fold if arguments.fold is not None else range(len(folds))
    if any(not 0 <= f < len(folds) for f in wanted):
        print(f"train_fcn: --fold: expected 0 to {len(folds) - 1}, got {arguments.fold}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)

    rows, cases, pictures, log, seconds = [], [], [], [], 0.0
    for fold in wanted:
        training, held_out = folds[fold]
        trainer = Trainer(arguments, fold, [volumes[i] for i in training])
        if arguments.resume:
            trainer.resume()
        trainer.train()
        log += trainer.log
        seconds += trainer.seconds
        for i in held_out:
            v = volumes[i]
            probability, truth = trainer.predict(v), v.label[0].numpy()
            figures = scores(truth, probability)
            rows.append({"patient": v.patient, "fold": fold, **figures})
            cases.append((v.patient, truth, probability))
            path = arguments.out / f"slices_{v.patient}.png"
            pictures.append(slices(v.patient, v.image[0].numpy(), truth, probability, figures["DSC"], path))
    pictures.insert(0, precision_recall(cases, arguments.out / "precision_recall.png"))

    table = pd.DataFrame(rows)
    mean = {"patient": "mean", "fold": "", **table[list(NAMES)].mean().to_dict()}
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
    if not arguments.no_loss_cost and arguments.loss != "cross-entropy":
        costs = compare_costs(trainer)
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
    return 0


def print_report(arguments, table, costs, seconds, pictures) -> None:
    name = arguments.loss + (
        f" (alpha {arguments.alpha:g}, beta {arguments.beta:g})" if "tversky" in arguments.loss else ""
    )
    print(f"\nHeld-out patients, {name}, {arguments.steps} steps a fold, {seconds:.0f} s of training; percent:\n")
    percent = table.drop(columns="fold").copy()
    percent[list(NAMES)] = (100 * percent[list(NAMES)]).round(1)
    print(percent.to_string(index=False))
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


if __name__ == "__main__":
    sys.exit(main())
