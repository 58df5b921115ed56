"""The CUDA kernels by nvcc, without a GPU: registers, spills and load widths as the compiler reports them."""

from __future__ import annotations

import pathlib
import re
import shutil

import pytest
import torch
from processes import ROOT, TORCH, run

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_cuda_kernels_compile_without_spills(arch, tmp_path):
    flags = ["-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "--expt-relaxed-constexpr"]
    flags += ["--extended-lambda", "-isystem", TORCH / "include", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    flags += ["--keep", "--keep-dir", tmp_path, "-Xptxas=-v,--warn-on-spills", "-cubin"]
    kernels = {}
    for name in ("count_pass", "gradient_pass", "table"):
        source = ROOT / "csrc" / "cuda" / f"{name}.cu"
        result = run([NVCC, *flags, source, "-o", tmp_path / f"{name}.cubin"])
        assert result.returncode == 0, result.stderr
        for entry in re.split(r"Compiling entry function ", result.stderr)[1:]:
            kernels[entry.split("'")[1]] = entry
    assert len(kernels) > 150
    for name, report in kernels.items():
        assert re.search(r"0 bytes spill stores, 0 bytes spill loads", report), (name, report)
        registers = int(re.search(r"Used (\d+) registers", report)[1])
        assert registers <= 128, (name, registers)  # two blocks of 256 threads and more
    # The fast paths read and write 16 bytes at once.
    (ptx,) = tmp_path.glob("gradient_pass*.ptx")
    text = ptx.read_text()
    for kernel, stores in (
        ("20gradient_pass_kernelIfLi4ELb0E", 4),  # four classes in registers
        ("26split_gradient_pass_kernelIfLi8ELb0E", 8),  # many, eight in the registers of each lane
        ("26tiled_gradient_pass_kernelIfL\\w*ActivationE0ELb0E", 1),  # any number through shared memory
    ):
        (body,) = re.findall(rf"\.entry \w*{kernel}\w*\((.*?)\n}}", text, re.S)
        assert len(re.findall(r"ld\.global\.(?:nc\.)?v4\.(?:f32|b32|u32)", body)) >= max(4, stores)
        assert len(re.findall(r"st\.global\.cs\.v4\.(?:f32|b32|u32)", body)) >= stores


@needs_nvcc
def test_library_with_cuda_code_loads_in_this_torch():
    import tversky_kernels as tk
    from tversky_kernels import _ops

    if not (pathlib.Path(tk.__file__).parent / "_C_cuda.so").exists():
        pytest.skip("this build of the package has no CUDA code")
    assert _ops.CUDA_MISSING is None
    for name in _ops.NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tversky_kernels::{name}", "CUDA")
    if not torch.cuda.is_available():
        assert "finds no GPU" in tk.available_backends()["cuda"]
