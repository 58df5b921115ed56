"""Fetches the demo's images: four CT scans of lung tumours with the radiotherapists' contours, from a Python package.

The images are part of the package pyCERR on PyPI, which is downloaded by pip and read as an archive, never installed or
imported. They are Lambin et al., "Radiomics Digital Phantom", CancerData 2016, doi:10.17195/candat.2016.08.1, under the
licence CC BY-NC 3.0: not for commercial use, with attribution.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "pycerr==2.5.1"
FOLDER = "cerr/datasets/radiomics_phantom_dicom/"
FILES = 207  # in FOLDER: 203 slices, four contour sets


def fetch(directory: pathlib.Path) -> None:
    """Puts pat_1 .. pat_4 and their licence into ``directory``; does nothing where they are already."""
    if directory.is_dir() and sum(1 for p in directory.rglob("*.dcm")) == FILES:
        return
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE]
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
        if directory.exists():
            shutil.rmtree(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(unpacked / FOLDER, directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, help="where to put them")
    directory = parser.parse_args().directory
    fetch(directory)
    print(f"Lung CT of four patients in {directory}")
    print((directory / "README_LICENSE.txt").read_text().strip())


if __name__ == "__main__":
    main()
