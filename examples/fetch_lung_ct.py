"""Fetches the demo's images: four CT scans of lung tumours with the radiotherapists' contours, from a Python package.

The images are part of the package pyCERR on PyPI, which is downloaded by pip and read as an archive, never installed or
imported. They are Lambin et al., "Radiomics Digital Phantom", CancerData 2016, doi:10.17195/candat.2016.08.1, under the
licence CC BY-NC 3.0: not for commercial use, with attribution.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "pycerr==2.5.1"
SHA256 = "5c3e82cc387538c5c38143827314fc2aa743ef886e8518f7f52beff6805c635d"  # of its wheel
FOLDER = "cerr/datasets/radiomics_phantom_dicom/"
FILES = 207  # in FOLDER: 203 slices, four contour sets


def fetch(directory: pathlib.Path) -> None:
    """Puts pat_1 .. pat_4 and their licence into ``directory``; does nothing where they are already.

    The folder must be new or empty: nothing in it is ever removed.
    """
    if directory.is_dir() and sum(1 for p in directory.rglob("*.dcm")) == FILES:
        return
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise SystemExit(
            f"fetch_lung_ct: {directory} is there and does not hold the images (or not all of them); expected a new or "
            "an empty folder. Name another one, or remove it yourself"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        requirement = pathlib.Path(temporary) / "requirements.txt"
        requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--require-hashes", "--dest", temporary, "--requirement", str(requirement)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"fetch_lung_ct: pip could not download {PACKAGE}; is a package index reachable?")
        (wheel,) = pathlib.Path(temporary).glob("*.whl")
        unpacked = pathlib.Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(FOLDER) and not name.endswith("/"):
                    archive.extract(name, unpacked)
        found = sum(1 for p in unpacked.rglob("*.dcm"))
        if found != FILES:
            raise SystemExit(f"fetch_lung_ct: expected {FILES} DICOM files in {PACKAGE}, found {found}")
        (unpacked / FOLDER).rename(directory)  # at once, and over nothing but an empty folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, help="where to put them")
    directory = parser.parse_args().directory
    fetch(directory)
    print(f"Lung CT of four patients in {directory}")
    print((directory / "README_LICENSE.txt").read_text().strip())


if __name__ == "__main__":
    main()
