"""Fetches the demo's images: four CT scans of lung tumours with the radiotherapists' contours, from a Python package.

The images are part of the package pyCERR on PyPI, which is downloaded by pip and read as an archive, never installed or
imported. They are Lambin et al., "Radiomics Digital Phantom", CancerData 2016, doi:10.17195/candat.2016.08.1, under the
licence CC BY-NC 3.0: not for commercial use, with attribution.
"""

from __future__ import annotations

import argparse
import pathlib

import packages

PACKAGE = "pycerr==2.5.1"
SHA256 = "5c3e82cc387538c5c38143827314fc2aa743ef886e8518f7f52beff6805c635d"  # of its wheel
FOLDER = "cerr/datasets/radiomics_phantom_dicom/"
FILES = 207  # DICOM files in FOLDER: 203 slices, four contour sets
OTHERS = 1  # its licence


def fetch(directory: pathlib.Path) -> None:
    """Puts pat_1 .. pat_4 and their licence into ``directory``; does nothing where they are already.

    The folder must be new or empty: nothing in it is ever removed.
    """
    if directory.is_dir() and sum(1 for p in directory.rglob("*.dcm")) == FILES:
        return
    packages.unpack(PACKAGE, SHA256, lambda name: True, FILES + OTHERS, FOLDER, directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, help="where to put them")
    directory = parser.parse_args().directory
    fetch(directory)
    print(f"Lung CT of four patients in {directory}")
    print((directory / "README_LICENSE.txt").read_text().strip())


if __name__ == "__main__":
    main()
