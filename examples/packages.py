"""Takes files out of a package on PyPI: pip downloads its archive, of a known hash; it is read, not installed."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable


def unpack(
    package: str,
    sha256: str,
    wanted: Callable[[str], bool],
    files: int,
    folder: str,
    directory: pathlib.Path,
    source: bool = False,
) -> None:
    """Puts the package's ``folder`` into ``directory``, with the files that are wanted; ``files`` is their number.

    source: take the source archive, not the wheel.
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
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary" if source else "--only-binary", ":all:"]
        command += ["--require-hashes", "--dest", temporary, "--requirement", str(requirement)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"{name}: pip could not download {package}; is a package index reachable?")
        (archive,) = pathlib.Path(temporary).glob("*.tar.gz" if source else "*.whl")
        unpacked = pathlib.Path(temporary) / "unpacked"
        found = _tar(archive, folder, wanted, unpacked) if source else _zip(archive, folder, wanted, unpacked)
        if found != files:
            raise SystemExit(f"{name}: expected {files} files in {package}, found {found}")
        (unpacked / folder).rename(directory)  # at once, and over nothing but an empty folder


def _chosen(names: list[str], folder: str, wanted: Callable[[str], bool]) -> list[str]:
    return [n for n in names if n.startswith(folder) and not n.endswith("/") and wanted(n)]


def _zip(archive: pathlib.Path, folder: str, wanted: Callable[[str], bool], out: pathlib.Path) -> int:
    with zipfile.ZipFile(archive) as opened:
        names = _chosen(opened.namelist(), folder, wanted)
        opened.extractall(out, names)
    return len(names)


def _tar(archive: pathlib.Path, folder: str, wanted: Callable[[str], bool], out: pathlib.Path) -> int:
    with tarfile.open(archive) as opened:
        members = {m.name: m for m in opened.getmembers() if m.isfile()}
        names = _chosen(list(members), folder, wanted)
        for name in names:  # by hand: before Python 3.12 not every extractall refuses a path that leads elsewhere
            path = out / name
            if not path.resolve().is_relative_to(out.resolve()):
                raise SystemExit(f"{archive.name}: {name} leads out of the archive")
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(opened.extractfile(members[name])) as read, open(path, "wb") as write:
                shutil.copyfileobj(read, write)
    return len(names)
