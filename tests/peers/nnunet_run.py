"""nnU-Net itself, on a small data set made here: plans, trains two short epochs, validates and predicts.

    python tests/peers/nnunet_run.py FOLDER TRAINER [TRAINER ...] [--regions] [--ignore]

Prints a line of JSON for each trainer: its losses of training and validation, its Dice, and whether it predicts.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

SHAPE, CASES = (40, 44, 36), 6


def images(folder: pathlib.Path, regions: bool, ignore: bool) -> None:
    import nibabel

    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"))
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for case in range(CASES):
        centre = rng.uniform(12, 26, 3)[:, None, None, None]
        distance = np.sqrt(((grid - centre) ** 2).sum(0))
        label = ((distance < 10).astype(np.uint8) + (distance < 5)).astype(np.uint8)
        image = (label + 0.3 * rng.standard_normal(SHAPE)).astype(np.float32)
        if ignore:
            label[:4] = 3
        for name, x, part in ((f"case_{case}_0000", image, "imagesTr"), (f"case_{case}", label, "labelsTr")):
            nibabel.save(nibabel.Nifti1Image(x, np.eye(4)), folder / part / f"{name}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / "imagesTs" / "case_9_0000.nii.gz")
    labels = {"background": 0, "whole": [1, 2] if regions else 1, "core": 2}
    description = {
        "channel_names": {"0": "MR"},
        "labels": {**labels, **({"ignore": 3} if ignore else {})},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    if regions:
        description["regions_class_order"] = [1, 2]
    (folder / "dataset.json").write_text(json.dumps(description))


def small(plans: pathlib.Path) -> None:
    # The network that was planned, with few features and a small patch.
    content = json.loads(plans.read_text())
    of = content["configurations"]["3d_fullres"]
    of["patch_size"], of["batch_size"] = [32, 32, 32], 2
    arguments = of["architecture"]["arch_kwargs"]
    stages = 3
    for name, value in arguments.items():
        if isinstance(value, list) and name.startswith(("features", "kernel_sizes", "strides", "n_conv", "n_blocks")):
            arguments[name] = value[: stages - name.endswith("_decoder")]
    arguments["n_stages"], arguments["features_per_stage"] = stages, [8, 16, 32]
    plans.write_text(json.dumps(content))


TRAIN = """
import json, sys
import numpy as np, torch
torch.manual_seed(0); np.random.seed(0)
torch.set_num_threads(2)
from nnunetv2.run import run_training
name = sys.argv[1]
of = run_training.recursive_find_trainer_class_by_name
def short(*a, **k):
    found = of(*a, **k)
    make = found.__init__
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device=torch.device("cuda")):
        make(self, plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.num_epochs = 8, 2, 2
    found.__init__ = __init__
    return found
run_training.recursive_find_trainer_class_by_name = short
run_training.run_training("1", "3d_fullres", 0, name, device=torch.device("cpu"))
"""


def run(folder: pathlib.Path, trainers: list[str], regions: bool, ignore: bool) -> list[dict]:
    """What each trainer did."""
    folder = folder.resolve()
    raw = folder / "raw" / "Dataset001_Small"
    environment = {
        **os.environ,
        **{f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")},
        "nnUNet_extTrainer": str(folder / "trainers"),
        "nnUNet_compile": "f",
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
    }

    def call(*command):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command[:4]}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def script(name):
        return str(pathlib.Path(sys.executable).with_name(name))

    images(raw, regions, ignore)
    call(sys.executable, "-m", "tversky_kernels.compat.nnunet", "--install", str(folder / "trainers"))
    call(script("nnUNetv2_plan_and_preprocess"), "-d", "1", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    small(folder / "preprocessed" / raw.name / "nnUNetPlans.json")
    done = []
    for trainer in trainers:
        call(sys.executable, "-c", TRAIN, trainer)
        results = folder / "results" / raw.name / f"{trainer}__nnUNetPlans__3d_fullres"
        log = next((results / "fold_0").glob("training_log*.txt")).read_text()
        lines = [line.split(": ", 1)[1].strip() for line in log.splitlines() if ": " in line]
        losses = {
            key: [float(x.split()[-1]) for x in lines if x.startswith(f"{key} ")] for key in ("train_loss", "val_loss")
        }
        dice = json.loads((results / "fold_0" / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"]
        out = folder / "predicted" / trainer
        call(
            script("nnUNetv2_predict"), "-i", str(raw / "imagesTs"), "-o", str(out), "-d", "1", "-c", "3d_fullres",
            "-f", "0", "-tr", trainer, "-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta",
        )  # fmt: skip
        predicted = (out / "case_9.nii.gz").exists()
        done.append({"trainer": trainer, **losses, "dice": dice, "predicted": predicted})
        print(json.dumps(done[-1]), flush=True)
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("trainers", nargs="+")
    parser.add_argument("--regions", action="store_true")
    parser.add_argument("--ignore", action="store_true")
    given = parser.parse_args()
    run(given.folder, given.trainers, given.regions, given.ignore)
