"""Builds the CPU library with sanitizers and runs a script with it, in a Python that is not built with them.

    python tests/tools/sanitized.py FOLDER tests/tools/hostile.py --calls 2500

The portable kernels alone, for a library with all instruction sets takes a quarter of an hour to compile so.
tests/test_portability.py runs the kernels of every instruction set under sanitizers.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import setup_flags
from processes import ROOT, TORCH, under_sanitizers

FLAGS = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-D_GLIBCXX_ASSERTIONS"]
COMMON = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", *FLAGS]

NAMES = (
    "count_pass",
    "gradient_pass",
    "region_count_pass",
    "region_gradient_pass",
    "hard_count_pass",
    "operators",
    "gradient_memory",
    "capability",
)


def build(folder: pathlib.Path) -> None:
    """A copy of the package whose library has sanitizers."""
    package = folder / "tversky_kernels"
    shutil.copytree(ROOT / "tversky_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    operators = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(TORCH / "include")]
    kernels = [*setup_flags.KERNEL_FLAGS, "-DTK_CAPABILITY=baseline"]
    objects, running = [], []
    for name in NAMES:
        objects.append(str(folder / f"{name}.o"))
        flags = kernels if name.endswith("pass") else operators
        source = str(ROOT / "csrc" / "cpu" / f"{name}.cpp")
        running.append(subprocess.Popen([*COMMON, *flags, "-c", source, "-o", objects[-1]]))
    if any(compiler.wait() for compiler in running):
        raise SystemExit("sanitized: a source did not compile")
    link = ["-shared", *objects, "-o", str(package / "_C.so"), f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed"]
    subprocess.run([*COMMON, *link, "-ltorch", "-ltorch_cpu"], check=True)


def main() -> None:
    folder, *command = sys.argv[1:]
    folder = pathlib.Path(folder).absolute()
    if folder.exists():
        raise SystemExit(f"sanitized: expected a new folder, {folder} is there")
    build(folder)
    environment = {**os.environ, **under_sanitizers(), "PYTHONPATH": str(folder)}
    environment["ASAN_OPTIONS"] += ":allocator_may_return_null=1"
    raise SystemExit(subprocess.run([sys.executable, *command], env=environment, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
