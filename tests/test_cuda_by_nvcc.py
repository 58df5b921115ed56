"""What nvcc made of the CUDA kernels, without a GPU: registers, local memory and load widths, read from the library."""

from __future__ import annotations

import re

import pytest
import torch
from cuda_instructions import LIBRARY, counts, cuda_tool, ptx_files
from processes import run

import tversky_kernels as tk
from tversky_kernels import _ops

KERNELS = 300
#: Two blocks of 256 threads a multiprocessor, and more.
MOST_REGISTERS = 128

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="this build of the package has no CUDA code")


def tool(name):
    return cuda_tool(name) or pytest.skip(f"{name} is not on the PATH, and triton, which has a copy, is not installed")


def assemblies():
    """For each architecture that the library has code for: registers and bytes of local memory of every kernel."""
    result = run([tool("cuobjdump"), "-res-usage", LIBRARY])
    assert result.returncode == 0, result.stderr
    found = {}
    for part in result.stdout.split("Fatbin elf code:")[1:]:
        usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", part)
        kernels = found.setdefault(re.search(r"arch = sm_(\w+)", part)[1], {})
        kernels |= {name: (int(registers), int(stack) + int(local)) for name, registers, stack, local in usage}
    return found


def portable_code(where):
    """The library's PTX, which newer cards compile for themselves, a file for each source."""
    tool("cuobjdump")
    return ptx_files(where) or pytest.skip("this build of the package has no PTX")


@pytest.mark.parametrize("arch", ["80", "90"])
def test_kernels_stay_in_registers(arch):
    kernels = assemblies().get(arch)
    if kernels is None:
        pytest.skip(f"this build of the package has no code for sm_{arch}")
    assert len(kernels) > KERNELS
    for name, (registers, local) in kernels.items():
        assert local == 0, (name, local)
        assert registers <= MOST_REGISTERS, (name, registers)


@pytest.mark.compiled
def test_kernels_stay_in_registers_on_a_newer_card(tmp_path):
    """What the driver makes of the PTX there."""
    kernels = 0
    for path in portable_code(tmp_path):
        result = run([tool("ptxas"), "-v", "-arch=sm_100", path, "-o", path.with_suffix(".cubin")])
        assert result.returncode == 0, result.stderr
        for report in re.split(r"Compiling entry function ", result.stderr)[1:]:
            kernels += 1
            assert re.search(r"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", report), report
            assert int(re.search(r"Used (\d+) registers", report)[1]) <= MOST_REGISTERS, report
    assert kernels > KERNELS


def test_fast_paths_read_and_write_16_bytes_at_once(tmp_path):
    text = "".join(path.read_text() for path in portable_code(tmp_path))

    def bodies_of(kernel):
        bodies = re.findall(rf"\.entry \w*{kernel}\w*\((.*?)\n}}", text, re.S)
        assert bodies, kernel
        return bodies

    ce = "LNS_12CrossEntropyE"  # and the number of one
    for kernel, stores in (
        (rf"20gradient_pass_kernelIfLi4E{ce}0ELb0ELb[01]E", 4),  # four classes in registers, in either layout
        (rf"26split_gradient_pass_kernelIfLi8E{ce}[02]ELb[01]ELi0E", 8),  # many, eight in the registers of each lane
        ("26tiled_gradient_pass_kernelIfL\\w*ActivationE0ELb0E", 1),  # any number through shared memory
    ):
        for body in bodies_of(kernel):
            assert len(re.findall(r"ld\.global\.(?:nc\.)?v4\.(?:f32|b32|u32)", body)) >= max(4, stores)
            assert len(re.findall(r"st\.global\.cs\.v4\.(?:f32|b32|u32)", body)) >= stores
    whole, half = (rf"cp\.async\.c{x}\.shared\.global \[%\w+\], \[%\w+\], {n};" for x, n in (("g", 16), ("a", 8)))
    for kernel, copy, copies in (
        # Four voxels of each class, brought ahead: once before the loop and once in it.
        (rf"23split_count_pass_kernelIfLi8E{ce}[02]ELb[01]ELi0E", whole, 2 * 8),
        (rf"26split_gradient_pass_kernelIN3c108BFloat16ELi8E{ce}[02]ELb[01]ELi0E", half, 2 * 8),
        (r"29dense_split_count_pass_kernelIfLi4ELb[01]E", whole, 2 * 4),
        (r"32dense_split_gradient_pass_kernelIN3c108BFloat16ELi4ELb[01]E", half, 2 * 4),
        # channels_last, in half precision ahead as well
        (rf"26split_gradient_pass_kernelIfLi8E{ce}[01]ELb0ELi[12]E", whole, 8),
        (rf"26split_gradient_pass_kernelIN3c108BFloat16ELi8E{ce}[01]ELb0ELi[12]E", whole, 2 * 4),
    ):
        for body in bodies_of(kernel):
            assert len(re.findall(copy, body)) >= copies


@pytest.mark.compiled
def test_instructions_that_bytes_leave_time_for():
    """A multiprocessor of an H100 issues 39 a logit while 3.0 TB/s bring 4 bytes each: see docs/lab_notes.md."""
    if "90" not in assemblies():
        pytest.skip("this build of the package has no code for sm_90")
    found = counts(arch="90")
    assert len(found) == 288  # kernels, types, classes, layouts, with a cross-entropy and without, squares, smoothing
    for (kernel, dtype, classes, ce, squared, turns), a_logit in found.items():
        bytes_moved = (4 if dtype == "float32" else 2) * (2 if "gradient" in kernel else 1)
        most = 39 / 4 * bytes_moved * (1.5 if "smoothed" in ce else 1.35 if ce else 1.0) * (1.25 if squared else 1.0)
        if kernel.startswith("dense"):  # of which a byte of the target is read besides
            most *= 1.25 * (bytes_moved + 1) / bytes_moved
        if kernel.startswith("split") and classes < 7:  # a voxel's own instructions are divided by fewer classes
            most *= 1.15
        if turns:  # each logit goes through shared memory
            most *= 1.25
        assert a_logit <= most, (kernel, dtype, classes, ce, squared, turns, a_logit)


def test_library_loads_in_this_torch():
    assert _ops.CUDA_MISSING is None
    for name in (*_ops.NAMES, *_ops.REGION_NAMES):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tversky_kernels::{name}", "CUDA")
    if not torch.cuda.is_available():
        assert "finds no GPU" in tk.available_backends()["cuda"]


def test_library_tells_what_it_has_code_for(tmp_path):
    """By which "auto" leaves a card that is too old to another backend."""
    there = {f"sm_{arch}" for arch, kernels in assemblies().items() if kernels}
    there |= {re.search(r"\.sm_(\d+)\.", path.name).expand(r"compute_\1") for path in ptx_files(tmp_path)}
    library = _ops.cuda_library()
    assert set(library.code) == there
    assert library.version >= (11, 8)
