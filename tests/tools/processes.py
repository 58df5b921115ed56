"""Processes of their own for tests of kernels that replace a backend, and for compilers."""

from __future__ import annotations

import fcntl
import os
import pathlib
import re
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).parent.parent.parent
TORCH = pathlib.Path(torch.__file__).parent


def run(command, environment=None, timeout=900, where=ROOT):
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **(environment or {})}
    return subprocess.run(
        [str(c) for c in command], cwd=where, env=environment, capture_output=True, text=True, timeout=timeout
    )


def once(tmp_path_factory, name: str, make) -> pathlib.Path:
    """A folder that make(folder) has filled, by the first of pytest-xdist's workers that asks for it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / name
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "made").touch()
    return folder


def under_sanitizers() -> dict[str, str]:
    """The environment for a library that is built with them, in a Python that is not."""
    libraries = [run(["g++", f"-print-file-name=lib{n}.so"]).stdout.strip() for n in ("asan", "ubsan")]
    return {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}


def run_kernels_of(kernels, *options, environment=None, where=ROOT):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu_kernels", *options]
    return run(command, {"TK_GPU_KERNELS": str(kernels), **(environment or {})}, where=where)


def assert_passed(result, at_least):
    passed = re.search(r"(\d+) passed", result.stdout)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-3000:]
    assert int(passed[1]) >= at_least
    print(result.stdout.splitlines()[-1])
