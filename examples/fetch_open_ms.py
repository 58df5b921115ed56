"""Fetches open_ms_data: FLAIR, T1, T2 and consensus lesion masks of 30 patients with multiple sclerosis, in MNI space.

The modalities of the paper, and twice its subjects. The images are of the Laboratory of Imaging Technologies,
University of Ljubljana, under the licence CC-BY: Lesjak et al., "A novel public MR image dataset of multiple sclerosis
patients with lesion segmentations based on multi-rater consensus", Neuroinformatics 2018,
doi:10.1007/s12021-017-9348-7. They are taken from the public repository muschellij2/open_ms_data on GitHub, folder
cross_sectional/MNI (about 400 MB).

    python examples/fetch_open_ms.py .data/open_ms                       by git
    python examples/fetch_open_ms.py .data/open_ms --source open_ms_data   from a clone that is there already

Written are DIR/patientNN/flair.nii.gz, t1.nii.gz, t2.nii.gz and lesions.nii.gz.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np
from tqdm import tqdm
from volumes import AFFINE_TOLERANCE, DataError, find_nifti, load_nifti

REPOSITORY = "https://github.com/muschellij2/open_ms_data.git"
FOLDER = "cross_sectional/MNI"
PATIENTS = tuple(f"patient{n:02d}" for n in range(1, 31))
PARTS = ("flair", "t1", "t2", "lesions")
#: How the repository's files begin.
PREFIXES = {"FLAIR_": "flair", "T1_": "t1", "T2_": "t2", "GOLD_STANDARD_": "lesions"}
SHAPE = (182, 218, 182)
#: Hashes of the uncompressed files that this study was made with; for the others none is known to us.
HASHES = pathlib.Path(__file__).with_name("open_ms.sha256")
CITATION = """Licence: CC-BY. Cite: Lesjak, Galimzianova, Koren, Lukin, Pernus, Likar, Spiclin, "A novel public MR image
dataset of multiple sclerosis patients with lesion segmentations based on multi-rater consensus", Neuroinformatics 16
(2018), doi:10.1007/s12021-017-9348-7."""


def clone(directory: pathlib.Path) -> pathlib.Path:
    """The one folder of the repository, without its history."""
    commands = [
        ["git", "clone", "--quiet", "--depth", "1", "--filter=blob:none", "--sparse", REPOSITORY, str(directory)],
        ["git", "-C", str(directory), "sparse-checkout", "set", FOLDER],
    ]
    for command in commands:
        try:
            code = subprocess.run(command).returncode
        except FileNotFoundError as error:
            raise DataError("git is not installed; install it, or download the repository and give --source") from error
        if code:
            raise DataError(
                f"git could not fetch {REPOSITORY}. Without a network: clone it where there is one, bring the folder "
                "here, and give it as --source"
            )
    return directory


def collect(source: pathlib.Path) -> dict[tuple[str, str], pathlib.Path]:
    """(patient, part) -> file, in the repository's layout or in one that volumes.py knows."""
    found = {}
    for path in sorted(source.rglob("*.nii.gz")):
        part = next((p for prefix, p in PREFIXES.items() if path.name.startswith(prefix)), None)
        if part and path.name.endswith("_regtoMNI.nii.gz") and re.fullmatch(r"patient\d\d", path.parent.name):
            found[path.parent.name, part] = path
    for patient, files in find_nifti(source, PARTS).items():
        for part, path in files.items():
            found.setdefault((patient, part), path)
    return found


def known_hashes() -> dict[str, str]:
    lines = HASHES.read_text().splitlines()
    return {name: digest for digest, name in (line.split() for line in lines if line.strip())}


def content_hash(path: pathlib.Path) -> str:
    """Of the uncompressed bytes: how a file was compressed says nothing about its image."""
    try:
        with gzip.open(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest(file)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}") from error


def _digest(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def check(directory: pathlib.Path, patients: list[str], hashes: bool = True) -> None:
    """Raises a DataError that names the first file that is not what was expected."""
    known = known_hashes()
    affine = None
    for patient in tqdm(patients, desc="checking", unit="patient"):
        for part in PARTS:
            path = directory / patient / f"{part}.nii.gz"
            if not path.exists():
                raise DataError(f"{path}: it is missing")
            digest = known.get(f"{patient}/{part}.nii.gz")
            if hashes and digest and content_hash(path) != digest:
                raise DataError(f"{path}: it is not the file that the study was made with (--no-hashes to go on)")
            volume, own = load_nifti(path)
            if tuple(reversed(volume.shape[1:])) != SHAPE:
                raise DataError(f"{path}: expected the shape {SHAPE}, got {tuple(reversed(volume.shape[1:]))}")
            affine = own if affine is None else affine
            if np.abs(own - affine).max() > AFFINE_TOLERANCE:
                raise DataError(f"{path}: expected the grid of the other files")
            if part == "lesions" and not (set(volume.unique().tolist()) == {0.0, 1.0}):
                raise DataError(f"{path}: expected a mask of 0 and 1 that is not empty")


def fetch(directory: pathlib.Path, source: pathlib.Path | None, hashes: bool = True) -> list[str]:
    """The patients that are complete in ``directory`` afterwards."""
    complete = [p for p in PATIENTS if all((directory / p / f"{part}.nii.gz").exists() for part in PARTS)]
    if len(complete) < len(PATIENTS):
        if directory.exists() and any(p for p in directory.iterdir() if p.name not in PATIENTS):
            raise DataError(f"{directory}: expected a new folder, or one of an earlier fetch; nothing in it is removed")
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
            if source is None:
                source = clone(pathlib.Path(temporary) / "clone")
            elif not source.is_dir():
                raise DataError(f"{source}: no such folder")
            found = collect(source)
            complete = [p for p in PATIENTS if all((p, part) in found for part in PARTS)]
            if not complete:
                raise DataError(f"{source}: no patient with {', '.join(PARTS)} in it")
            gathered = pathlib.Path(temporary) / "gathered"
            for patient in complete:
                (gathered / patient).mkdir(parents=True)
                for part in PARTS:
                    shutil.copyfile(found[patient, part], gathered / patient / f"{part}.nii.gz")
            check(gathered, complete, hashes)
            # The masks of patients whose images are not here serve the simulation.
            for (patient, part), path in found.items():
                if part == "lesions" and patient not in complete:
                    (gathered / patient).mkdir(parents=True)
                    shutil.copyfile(path, gathered / patient / "lesions.nii.gz")
            directory.mkdir(exist_ok=True)
            for folder in sorted(gathered.iterdir()):
                shutil.copytree(folder, directory / folder.name, dirs_exist_ok=True)
    else:
        check(directory, complete, hashes)
    return complete


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, help="where to put them")
    parser.add_argument("--source", type=pathlib.Path, metavar="DIR", help="a clone of the repository; no network then")
    parser.add_argument("--no-hashes", action="store_true", help="do not compare with the files of the study")
    arguments = parser.parse_args(argv)
    try:
        complete = fetch(arguments.directory, arguments.source, not arguments.no_hashes)
    except DataError as error:
        print(f"fetch_open_ms: {error}", file=sys.stderr)
        return 2
    print(f"{len(complete)} of {len(PATIENTS)} patients with {', '.join(PARTS)} in {arguments.directory}")
    print(CITATION)
    return 0


if __name__ == "__main__":
    sys.exit(main())
