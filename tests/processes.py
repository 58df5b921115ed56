"""Processes of their own for tests of kernels that replace a backend, and for compilers."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).parent.parent
TORCH = pathlib.Path(torch.__file__).parent


def run(command, environment=None, timeout=900, where=ROOT):
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **(environment or {})}
    return subprocess.run(
        [str(c) for c in command], cwd=where, env=environment, capture_output=True, text=True, timeout=timeout
    )


def run_kernels_of(kernels, *options, environment=None, where=ROOT):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu_kernels", *options]
    return run(command, {"TK_GPU_KERNELS": str(kernels), **(environment or {})}, where=where)


def assert_passed(result, at_least):
    passed = re.search(r"(\d+) passed", result.stdout)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-3000:]
    assert int(passed[1]) >= at_least
    print(result.stdout.splitlines()[-1])
