"""The study of docs/study.md: every recipe of recipes.py on every data set, fold and seed; each run once, one row each.

A run trains a network and scores the patients that it has not seen. Its row is appended to rows.jsonl when it ends, so
an interrupted study goes on where it stopped, and tables and pictures are made from the rows alone (study_report.py).

    python examples/study.py --list                       what would run, and for how long
    python examples/study.py --jobs 2                     the small setting: about a minute a run
    python examples/study.py --only 'lung/*' --seeds 1    a part of it
    python examples/study.py --setting full --device cuda --jobs 1

Data sets, each labelled for what it is: lung (real CT, from the package registry), ms and ms-flair (real MR of multiple
sclerosis, where --data has the folders open_ms and isbi_flair) and ms-simulated (simulated, made of open_ms's masks).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import fnmatch
import functools
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from evaluate import curve, lesion_scores, lower_trapezoid, scores
from loss_cost import loss_cost
from recipes import RECIPES
from sklearn.model_selection import KFold
from tqdm import tqdm
from training import Settings, Trainer
from volumes import DataError, Volume, prepare, read_folder

import tversky_kernels as tk


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Where images are and how they are prepared. folds: 0 leaves one patient out. small, full: what differs there."""

    words: str
    folder: str
    modalities: tuple[str, ...]
    label: str
    spacing: float | tuple[float, float, float]
    window: tuple[float, float] | None = None
    crop: bool = True
    folds: int = 0
    second_rater: str | None = None
    small: dict[str, Any] = dataclasses.field(default_factory=dict)
    full: dict[str, Any] = dataclasses.field(default_factory=dict)


#: Small: about a minute a run on one core. Full: larger patches, more features and steps, for a card; not run yet.
SMALL = Settings(
    steps=200,
    batch_size=2,
    patch_size=(32, 32, 32),
    sampling="foreground",
    lr=5e-3,
    decay_every=20,
    features=8,
    levels=3,
    norm="instance",
    overlap=0.25,
)
FULL = Settings(
    steps=10_000,
    batch_size=2,
    patch_size=(96, 96, 96),
    sampling="foreground",
    lr=1e-3,
    decay_every=250,
    features=16,
    levels=4,
    norm="instance",
    amp=True,
    workers=4,
)

DATA_SETS = {
    "ms": DataSet(
        "multiple sclerosis, real: FLAIR, T1, T2",
        "open_ms",
        ("flair", "t1", "t2"),
        "lesions",
        2.0,
        full={"spacing": 1.0},
    ),
    "ms-flair": DataSet(
        "multiple sclerosis, real: FLAIR alone, two raters",
        "isbi_flair",
        ("flair",),
        "rater1",
        (4.4, 1.65, 1.65),
        second_rater="rater2",
        small={"patch_size": (16, 48, 48)},
        full={"spacing": (4.4, 0.83, 0.83), "patch_size": (24, 160, 160)},
    ),
    "ms-simulated": DataSet(
        "multiple sclerosis, simulated: FLAIR, T1, T2",
        "simulated_ms",
        ("flair", "t1", "t2"),
        "lesions",
        2.0,
        folds=2,
        full={"spacing": 1.0},
    ),
    "lung": DataSet("lung tumours, real: CT", "lung", ("image",), "label", 3.0, window=(-1000.0, 400.0), crop=False),
}
#: How many seeds each setting gets.
SEEDS = {"ms": 3, "ms-flair": 3, "ms-simulated": 2, "lung": 3}


@dataclasses.dataclass(frozen=True)
class Run:
    data: str
    recipe: str
    fold: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}/{self.recipe}/{self.fold}/{self.seed}"


def settings_of(run: Run, setting: str, device: str) -> Settings:
    base, data = (SMALL, DATA_SETS[run.data].small) if setting == "small" else (FULL, DATA_SETS[run.data].full)
    own = {k: v for k, v in data.items() if k != "spacing"}
    sampling = RECIPES[run.recipe].sampling or base.sampling
    workers = 0 if device == "cpu" else base.workers
    return dataclasses.replace(base, **own, sampling=sampling, seed=run.seed, device=device, workers=workers)


@functools.cache
def read_data(name: str, folder: pathlib.Path, setting: str) -> list[Volume]:
    data = DATA_SETS[name]
    spacing = getattr(data, setting).get("spacing", data.spacing)
    volumes = read_folder(folder, modalities=data.modalities, label=data.label)
    return [prepare(v, spacing, data.window, data.crop) for v in volumes]


def agreement(name: str, folder: pathlib.Path, setting: str) -> list[dict]:
    """What the second rater would score against the first: the ceiling of a network there."""
    data = DATA_SETS[name]
    if data.second_rater is None:
        return []
    spacing = getattr(data, setting).get("spacing", data.spacing)
    second = [
        prepare(v, spacing, data.window, data.crop)
        for v in read_folder(folder, modalities=data.modalities, label=data.second_rater)
    ]
    rows = []
    for truth, other in zip(read_data(name, folder, setting), second, strict=True):
        a, b = truth.label[0].numpy(), other.label[0].numpy().astype(np.float32)
        rows.append({"patient": truth.patient, **scores(a, b), **lesion_scores(a, b)})
    return rows


def find_folder(name: str, roots: list[pathlib.Path]) -> pathlib.Path | None:
    return next((root / DATA_SETS[name].folder for root in roots if (root / DATA_SETS[name].folder).is_dir()), None)


def perform(run: Run, folder: pathlib.Path, setting: str, device: str, threads: int, pictures: pathlib.Path) -> dict:
    """Trains and scores; the row of the run."""
    if threads:
        torch.set_num_threads(threads)
    started = time.perf_counter()
    volumes = read_data(run.data, folder, setting)
    training, held_out = list(KFold(DATA_SETS[run.data].folds or len(volumes)).split(volumes))[run.fold]
    settings = settings_of(run, setting, device)
    loss = RECIPES[run.recipe].loss()
    trainer = Trainer(settings, loss, [volumes[i] for i in training], run.fold)
    trainer.train(progress=False)
    image, label = trainer.first_batch()
    trainer.network.requires_grad_(True)
    cost = loss_cost({run.recipe: loss}, lambda: trainer.logits(image), label, repeats=5)[run.recipe]
    patients = []
    for i in held_out:
        truth, probability = volumes[i].label[0].numpy(), trainer.predict(volumes[i])
        patients.append(
            {
                "patient": volumes[i].patient,
                **{
                    k: round(float(v), 6)
                    for k, v in {**scores(truth, probability), **lesion_scores(truth, probability)}.items()
                },
                "APR_lower_trapezoid": round(lower_trapezoid(truth, probability), 6),
                "curve": curve(truth, probability),
            }
        )
        path = pictures / f"{run.name.replace('/', '_')}_{volumes[i].patient}.npz"
        np.savez_compressed(path, predicted=np.packbits(probability >= 0.5), shape=truth.shape)
    losses = [row[2] for row in trainer.log]
    return {
        "run": run.name,
        **dataclasses.asdict(run),
        "setting": setting,
        "patients": patients,
        "loss": [round(statistics.fmean(losses[i : i + 20]), 5) for i in range(0, len(losses), 20)],
        "training_seconds": round(trainer.seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "loss_ms": round(1e3 * cost["seconds"], 3),
        "loss_share": round(cost["share"], 5),
        "threads": torch.get_num_threads(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "versions": {
            "tversky_kernels": tk.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def read_rows(path: pathlib.Path) -> list[dict]:
    """The rows; one that was cut off by an interruption is left out, and its run is done again."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}, line {number}: not a whole row; its run is done again", file=sys.stderr)
    return rows


def append_row(path: pathlib.Path, row: dict) -> None:
    """One line, on the disk when this returns. What an interruption cut off is taken away first."""
    with open(path, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def all_runs(folders: dict[str, pathlib.Path], setting: str, seeds: int | None) -> Iterator[Run]:
    """Seed by seed, so that what there is after an interruption is a whole study with fewer seeds."""
    folds = {name: DATA_SETS[name].folds or len(read_data(name, folder, setting)) for name, folder in folders.items()}
    for seed in range(max(SEEDS.values())):
        for name in folders:
            if seed >= (SEEDS[name] if seeds is None else min(seeds, SEEDS[name])):
                continue
            for fold in range(folds[name]):
                for recipe in RECIPES:
                    yield Run(name, recipe, fold, seed)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        action="append",
        default=[],
        metavar="DIR",
        help="has the folders open_ms, isbi_flair, simulated_ms or lung; may be repeated (and .data is looked into)",
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/study"), metavar="DIR")
    parser.add_argument("--setting", choices=("small", "full"), default="small")
    parser.add_argument("--seeds", type=int, help="at most so many a data set (3; simulated 2)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="of DATA/RECIPE/FOLD/SEED, as 'ms/tversky-*'"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, which share the cores (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--list", action="store_true", help="say what would run, and end")
    arguments = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    return arguments


def matches(run: Run, patterns: list[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(run.name, p) or run.name.startswith(f"{p}/") for p in patterns)


def make_simulated(roots: list[pathlib.Path], directory: pathlib.Path) -> None:
    """The simulated subjects, where the masks are and the subjects are not."""
    masks = find_folder("ms", roots)
    if masks is None or find_folder("ms-simulated", roots) is not None:
        return
    import simulate_ms

    temporary = directory.with_name(directory.name + ".part")
    code = simulate_ms.main([str(temporary), "--masks", str(masks), "--template", str(directory.with_name("mni152"))])
    if code:
        raise DataError(f"{directory}: the subjects could not be simulated")
    temporary.rename(directory)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    local = pathlib.Path(".data")
    roots = [*arguments.data, local]
    try:
        if not arguments.only or any(p.startswith(("*", "ms-simulated")) for p in arguments.only):
            make_simulated(roots, local / "simulated_ms")
        folders = {name: folder for name in DATA_SETS if (folder := find_folder(name, roots))}
        for name in DATA_SETS.keys() - folders.keys():
            print(f"{name} is left out: no folder {DATA_SETS[name].folder} in {', '.join(map(str, roots))}")
        wanted = [r for r in all_runs(folders, arguments.setting, arguments.seeds) if matches(r, arguments.only)]
    except DataError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    if not wanted:
        print(f"study: nothing to run: no data set, or no run that is called {arguments.only}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    path, pictures = arguments.out / "rows.jsonl", arguments.out / "predictions"
    pictures.mkdir(exist_ok=True)
    rows = read_rows(path)
    others = sorted({r["setting"] for r in rows} - {arguments.setting})
    if others:
        print(f"study: {path} has rows of the setting {', '.join(others)}; give another --out", file=sys.stderr)
        return 2
    done = {r["run"] for r in rows}
    left = [r for r in wanted if r.name not in done]
    typical = statistics.median([r["seconds"] for r in rows]) if rows else None
    hours = f", about {typical * len(left) / arguments.jobs / 3600:.1f} hours" if typical else ""
    print(f"{len(wanted)} runs, {len(wanted) - len(left)} done, {len(left)} left{hours}; rows in {path}")
    if arguments.list:
        print("\n".join(r.name for r in left))
        return 0
    for name in {r.data for r in left}:
        with open(arguments.out / f"agreement_{name}.json", "w") as file:
            json.dump(agreement(name, folders[name], arguments.setting), file, indent=1)
    perform_all(left, folders, arguments, path, pictures)
    print(f"Tables and pictures: {sys.executable} examples/study_report.py {arguments.out}")
    return 0


def perform_all(left, folders, arguments, path, pictures) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = 0 if arguments.device != "cpu" else max(1, cores // arguments.jobs)
    deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    # Processes of their own: threads of torch do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool,
        tqdm(total=len(left), unit="run", smoothing=0.1) as bar,
    ):
        waiting, running = iter(left), {}
        while True:
            while len(running) < arguments.jobs and time.monotonic() < deadline and (run := next(waiting, None)):
                job = pool.submit(
                    perform, run, folders[run.data], arguments.setting, arguments.device, threads, pictures
                )
                running[job] = run
            if not running:
                break
            ended, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for job in ended:
                run = running.pop(job)
                row = job.result()
                append_row(path, row)
                bar.update()
                mean = statistics.fmean(p["DSC"] for p in row["patients"])
                bar.set_postfix_str(f"{run.name}: DSC {100 * mean:.0f} %, {row['seconds']:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
