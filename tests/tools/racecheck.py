"""compute-sanitizer's racecheck over tests of the CUDA kernels, on a machine with a card.

First it is asked about small programs of which the answer is known (named_barriers.cu). Where it reports a race in one
that has none and synchronises as our kernels do, it cannot be asked about those whose warps share voxels: their tests
are left out, and that is said. They are run with the races looked for in compiled code on the host (test_cuda_on_host).

    python tests/tools/racecheck.py --tests EXPRESSION --shared EXPRESSION   of pytest's -k; --shared: those left out
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from processes import ROOT, TORCH

SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--tool", "racecheck")
PROGRAM = ROOT / "tests" / "tools" / "named_barriers.cu"
#: What it is called with (see there), and whether it has a race.
PROGRAMS = {
    "barriers of warps as ours": (("0", "even"), False),
    "the same, uneven turns": (("0", "uneven"), False),
    "bar.sync": (("1", "even"), False),
    "bar.sync, uneven turns": (("1", "uneven"), False),
    "constant numbers": (("2", "even"), False),
    "constant numbers, uneven turns": (("2", "uneven"), False),
    "barriers of the block alone": (("3", "even"), False),
    "none of the block": (("4", "even"), True),
}
OURS = ("barriers of warps as ours", "the same, uneven turns")


def find_nvcc() -> str | None:
    """As setup.py does."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")


def compile_command(out: pathlib.Path) -> list[str]:
    """nvcc's, for the program."""
    abi = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(TORCH / "include")]
    return [find_nvcc() or "nvcc", "-std=c++17", *abi, str(PROGRAM), "-o", str(out)]


def is_reported(program: pathlib.Path, arguments: tuple[str, ...], races: bool) -> bool:
    result = subprocess.run([*SANITIZER, program, *arguments], capture_output=True, text=True, timeout=60)
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazard", result.stdout)
    if summary is None or not (races or "right\n" in result.stdout):
        raise SystemExit(f"racecheck did not come to an end: {result.stdout[-2000:]}{result.stderr[-2000:]}")
    return int(summary[1]) > 0


def ask_about_known_programs() -> dict[str, bool]:
    """By name, whether a race is reported."""
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor() as threads:
        program = pathlib.Path(folder) / "named_barriers"
        subprocess.run([*compile_command(program), "-arch=native"], check=True)
        answers = {name: threads.submit(is_reported, program, *of_name) for name, of_name in PROGRAMS.items()}
        return {name: answer.result() for name, answer in answers.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", required=True)
    parser.add_argument("--shared", required=True)
    options = parser.parse_args()

    answers = ask_about_known_programs()
    for name, reported in answers.items():
        wrong = "" if reported == PROGRAMS[name][1] else ", wrongly"
        print(f"racecheck: {name}: {'reported' if reported else 'nothing reported'}{wrong}")
    if missed := [name for name, (_, race) in PROGRAMS.items() if race and not answers[name]]:
        print(f"racecheck does not find what is planted: {missed}")
        return 1
    expression = options.tests
    if any(answers[name] for name in OURS):
        expression = f"({expression}) and not ({options.shared})"
        print("racecheck reports what is right: it is not asked about kernels whose warps share voxels")
    print(f"racecheck: tests {expression}", flush=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "tests/gpu_kernels", "-k", expression]
    return subprocess.run([*SANITIZER, *pytest], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
