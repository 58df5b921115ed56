"""Takes files out of a package on PyPI: pip downloads its wheel, of a known hash, which is read and never installed."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable


def unpack(
    package: str, sha256: str, wanted: Callable[[str], bool], files: int, folder: str, directory: pathlib.Path
) -> None:
    """Puts the wheel's ``folder`` into ``directory``, with the files that are wanted; ``files`` is how many those are.

    The directory must be new or empty: nothing in it is ever removed.
    """
    name = pathlib.Path(sys.argv[0]).stem
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise SystemExit(
            f"{name}: {directory} is there and does not hold the images (or not all of them); expected a new or "
            "an empty folder. Name another one, or remove it yourself"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        requirement = pathlib.Path(temporary) / "requirements.txt"
        requirement.write_text(f"{package} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--require-hashes", "--dest", temporary, "--requirement", str(requirement)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"{name}: pip could not download {package}; is a package index reachable?")
        (wheel,) = pathlib.Path(temporary).glob("*.whl")
        unpacked = pathlib.Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith(folder) and not n.endswith("/") and wanted(n)]
            if len(names) != files:
                raise SystemExit(f"{name}: expected {files} files in {package}, found {len(names)}")
            archive.extractall(unpacked, names)
        (unpacked / folder).rename(directory)  # at once, and over nothing but an empty folder
