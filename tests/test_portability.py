"""The CPU kernels built by other means than setup.py: with sanitizers, and for aarch64 where a cross compiler is."""

from __future__ import annotations

import pathlib
import platform
import shutil
import subprocess

import numpy as np
import pytest
import setup_flags
import torch
from common import inputs, relative

from tversky_kernels import reference
from tversky_kernels._arguments import check_arguments

ROOT = pathlib.Path(__file__).parent.parent
LOGITS_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
TARGET_TYPES = {torch.uint8: 5, torch.int8: 6, torch.int16: 7, torch.int32: 8, torch.int64: 9}
ACTIVATIONS = {"softmax": 0, "sigmoid": 1, "none": 2}
FEATURES = {
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


def build(compiler, flags, capability, out):
    sources = [ROOT / "csrc" / "cpu" / f"{name}_pass.cpp" for name in ("count", "gradient")]
    command = [compiler, "-std=c++17", *setup_flags.KERNEL_FLAGS, *flags, f"-DTK_CAPABILITY={capability}"]
    command += [ROOT / "tests" / "portability" / "driver.cpp", *sources, "-o", out]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out


def bits(x):
    return x.flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def run(program, logits, target, weight, activation, ignore_index, channels_last, span):
    """counts (N, C, 3) and the gradient for known coefficients, by the driver."""
    samples, classes, voxels = logits.shape
    stored = logits.transpose(1, 2).contiguous() if channels_last else logits.contiguous()
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    coefficients = torch.linspace(-1, 1, classes * 2).to(compute)
    weights = weight.contiguous() if weight is not None else torch.empty(0)
    strides = (1, classes) if channels_last else (voxels, 1)
    header = [samples, classes, voxels, LOGITS_TYPES[logits.dtype], TARGET_TYPES[target.dtype], ACTIVATIONS[activation]]
    header += [ignore_index is not None, ignore_index or 0, *strides, *span]
    data = [bits(x) for x in (stored, target, weights, coefficients)]
    header += [len(d) for d in data]
    result = subprocess.run(program, input=np.array(header, np.int64).tobytes() + b"".join(data), capture_output=True)
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    counts = torch.frombuffer(bytearray(result.stdout[: samples * classes * 24]), dtype=torch.float64)
    gradient = torch.frombuffer(bytearray(result.stdout[samples * classes * 24 :]), dtype=logits.dtype)
    gradient = gradient.view(samples, voxels, classes).transpose(1, 2) if channels_last else gradient.view(logits.shape)
    return counts.view(samples, classes, 3), gradient, coefficients.view(classes, 2).double()


def expected(logits, target, weight, activation, ignore_index, u):
    z = logits.double().requires_grad_()
    volumes, options, _ = check_arguments(
        z, target, None if weight is None else weight.double(), alpha=0.5, beta=0.5, class_weight=None, gamma=1.0,
        smooth_nr=0.0, smooth_dr=0.0, activation=activation, include_background=True, ignore_index=ignore_index,
        batch=False, absent="keep", soft_label=False, reduction="mean", check_target=None,
    )  # fmt: skip
    tp, fp, fn = reference.overlap_counts(z, volumes, options)
    # u_background is dL/dFP and u_foreground dL/dTP - dL/dFN.
    (gradient,) = torch.autograd.grad((u[:, 0] * fp + u[:, 1] * tp).sum(), z)
    return torch.stack((tp, fp, fn), -1).detach(), gradient


def check(program):
    for i, (classes, voxels, dtype, label, activation) in enumerate(
        [
            (1, 130, torch.float32, torch.uint8, "sigmoid"),
            (2, 2100, torch.float32, torch.uint8, "softmax"),
            (2, 77, torch.bfloat16, torch.int64, "softmax"),
            (3, 1025, torch.float64, torch.int8, "softmax"),
            (4, 999, torch.float16, torch.int16, "softmax"),
            (5, 64, torch.float32, torch.int32, "none"),
            (33, 700, torch.float32, torch.int64, "softmax"),
            (7, 531, torch.float16, torch.uint8, "softmax"),
            (118, 150, torch.bfloat16, torch.uint8, "softmax"),
            (1000, 70, torch.float64, torch.int16, "softmax"),
        ]
    ):
        logits, target = inputs(2, classes, (voxels,), dtype, label, seed=i)
        for weighted, ignore_index, channels_last in ((False, None, False), (True, 0, False), (False, 1, True)):
            weight = torch.rand(2, voxels) if weighted else None
            arguments = (logits, target, weight, activation, ignore_index)
            counts, gradient, u = run(program, *arguments, channels_last, (0, voxels))
            true_counts, true_gradient = expected(*arguments, u)
            eps = 1e-13 if dtype == torch.float64 else 1e-6
            assert relative(counts, true_counts) <= eps
            rounding = {torch.float16: 6e-4, torch.bfloat16: 4e-3}.get(dtype, eps)
            assert relative(gradient, true_gradient) <= rounding


@pytest.mark.parametrize("capability", list(FEATURES))
def test_sanitizers(capability, tmp_path):
    """No read or write beyond the tensors and the scratch, no undefined behaviour; scratch starts as NaN."""
    if capability != "baseline":
        if platform.machine() != "x86_64":
            pytest.skip(f"{capability} is of x86-64")
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        has = set(next(line for line in lines if line.startswith("flags")).split())
        if not has >= FEATURES[capability]:
            pytest.skip(f"this processor has no {capability}")
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += setup_flags.X86_CAPABILITIES[capability] if platform.machine() == "x86_64" else []
    check([build("g++", flags, capability, tmp_path / "driver")])


def test_aarch64(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip(
            "needs aarch64-linux-gnu-g++ and qemu-aarch64-static (Debian: g++-aarch64-linux-gnu qemu-user-static)"
        )
    check([emulator, str(build(compiler, ["-O3", "-static"], "baseline", tmp_path / "driver"))])
