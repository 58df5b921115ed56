"""The Triton kernels without a GPU: in Triton's interpreter, compiled ahead of time for several GPUs, and what was
compiled (PTX) run on the host.

Bugs are planted to see that they are found.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import signal
import sys

import pytest
from processes import ROOT, TORCH, assert_passed, run, run_kernels_of

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpreter_is_broken():
    """Arrays of one element are no longer numbers to numpy, which Triton 3.6 takes them for."""
    if importlib.util.find_spec("triton") is None:
        return False
    import numpy
    import triton

    triton_version, numpy_version = (
        tuple(int(x) for x in re.findall(r"\d+", package.__version__)[:2]) for package in (triton, numpy)
    )
    return triton_version < (3, 7) and numpy_version >= (2, 4)


needs_interpreter = pytest.mark.skipif(interpreter_is_broken(), reason="Triton 3.6's interpreter needs numpy < 2.4")
INTERPRETED = {"TRITON_INTERPRET": "1"}


@needs_triton
@needs_interpreter
def test_triton_kernels_in_the_interpreter():
    assert_passed(run_kernels_of("interpreter", environment=INTERPRETED), 200)


@needs_triton
@pytest.mark.compiled
@pytest.mark.parametrize("arch", ["80", "90", "100", "gfx942"])
def test_triton_kernels_compile_without_spills(arch, tmp_path):
    result = run(
        [sys.executable, "tests/tools/triton_aot.py", "--arch", arch, "--quick"], {"TRITON_CACHE_DIR": str(tmp_path)}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if " registers, " in line]
    assert len(lines) > 40
    if not arch.startswith("gfx"):
        # Four voxels a thread are read at once.
        for dtype, load in (("float32", "ld.global.v4.b32"), ("bfloat16", "ld.global.v2.b32")):
            wide = [x for x in lines if re.search(rf"all_classes_\w+_kernel +C=(4|33) {dtype} uint8 +\d", x)]
            assert len(wide) == 4
            assert all(load in x for x in wide), wide
        # The 40 bytes of a voxel's 20 classes are aligned to 8 of them.
        aligned = [x for x in lines if re.search(r"all_classes_\w+_kernel +C=20 bfloat16 uint8 .'channels_last'", x)]
        assert len(aligned) == 2
        assert all("ld.global.v2.b32" in x and "global.v4" not in x for x in aligned), aligned


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """What runs PTX on the host."""
    library = tmp_path_factory.mktemp("emulator") / "ptx.so"
    command = ["g++", "-std=c++20", "-O2", "-fwrapv", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += ["-isystem", TORCH / "include", ROOT / "tests" / "cuda_on_host" / "ptx.cpp", "-o", library]
    result = run(command)
    assert result.returncode == 0, result.stderr[-3000:]
    return library


@needs_triton
@pytest.mark.compiled
def test_what_triton_compiles_on_the_host(emulator, tmp_path):
    """For sm_90; each test takes a second for the compiler."""
    tests = "(test_softmax and (33 or 5) and not float64) or test_channels_last or test_nearly_perfect"
    tests += " or (test_many_classes and spatial0 and (118 or 1000)) or test_label_smoothing"
    tests += " or test_nothing_beyond or test_regions"
    environment = {"TRITON_CACHE_DIR": str(tmp_path)}
    assert_passed(run_kernels_of(f"triton:{emulator}", "-k", tests, environment=environment), 50)


PLANTED = {
    "a voxel too few": ("inside = offsets < voxels", "inside = offsets < voxels - 1"),
    "a class too many": ("there = there & (c < C)[:, None]", "there = there & (c <= C)[:, None]"),
    "missing classes are not cleared": ('z = tl.where((c < C)[:, None], z, float("-inf"))', "z = z"),
    "the second tile's classes": ("return first + tl.arange(0, CLASSES)", "return first * 0 + tl.arange(0, CLASSES)"),
}


@needs_triton
@needs_interpreter
@pytest.mark.parametrize("bug", list(PLANTED))
def test_planted_bugs_are_found(bug, tmp_path):
    """The interpreter's tests can fail."""
    right, wrong = PLANTED[bug]
    for folder in ("tversky_kernels", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    found = [path for path in (tmp_path / "tversky_kernels" / "triton").glob("*.py") if right in path.read_text()]
    assert found
    for path in found:
        path.write_text(path.read_text().replace(right, wrong))
    tests = ("-x", "-k", "beyond or (test_softmax and float32) or many_blocks")
    result = run_kernels_of("interpreter", *tests, environment=INTERPRETED, where=tmp_path)
    # Some write where they should not, and the process dies of it.
    assert result.returncode in (1, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS), result.stdout[-2000:]
