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
from tversky_kernels._arguments import Volumes
from tversky_kernels._options import Options

ROOT = pathlib.Path(__file__).parent.parent
LOGITS_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
TARGET_TYPES = LOGITS_TYPES | {torch.uint8: 5, torch.int8: 6, torch.int16: 7, torch.int32: 8, torch.int64: 9}
OVERLAPS = {"product": 0, "absolute": 1, "squared": 2}
ACTIVATIONS = {"softmax": 0, "sigmoid": 1, "none": 2}
FEATURES = {
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": (AVX512 := {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "avx512_bf16": AVX512 | {"avx512_bf16"},
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


def run(program, logits, target, weight, options, channels_last, span):
    """counts (N, C, 3 or 6) and the gradient for known coefficients, by the driver. options: `Options`."""
    samples, classes, voxels = logits.shape
    dense = target.shape[:2] == (samples, classes) and target.dim() in (3, 4)
    columns, width = (6, 4) if options.ce_weight else (3, 2)
    cross_entropy = 0 if not options.ce_weight else 2 if options.label_smoothing else 1
    stored = logits.transpose(1, 2).contiguous() if channels_last else logits.contiguous()
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    coefficients = torch.linspace(-1, 1, classes * width).to(compute)
    if cross_entropy == 1:
        coefficients.view(classes, width)[:, 3] = 0  # of a smoothing that there is not
    weights = weight.contiguous() if weight is not None else torch.empty(0)
    strides = (1, classes) if channels_last else (voxels, 1)
    ignore_index = options.ignore_index
    header = [samples, classes, voxels, LOGITS_TYPES[logits.dtype], TARGET_TYPES[target.dtype]]
    header += [ACTIVATIONS[options.activation], ignore_index is not None, ignore_index or 0, *strides, *span]
    header += [dense, OVERLAPS[options.overlap], cross_entropy, int(options.focal_gamma)]
    header += [target.shape[-1] if target.dim() > 2 + dense else 0, round(voxels**0.5)]
    data = [bits(x) for x in (stored, target, weights, coefficients)]
    header += [len(d) for d in data]
    result = subprocess.run(program, input=np.array(header, np.int64).tobytes() + b"".join(data), capture_output=True)
    assert result.returncode == 0, (result.returncode, result.stderr.decode()[-3000:])
    size = samples * classes * columns * 8
    counts = torch.frombuffer(bytearray(result.stdout[:size]), dtype=torch.float64)
    gradient = torch.frombuffer(bytearray(result.stdout[size:]), dtype=logits.dtype)
    gradient = gradient.view(samples, voxels, classes).transpose(1, 2) if channels_last else gradient.view(logits.shape)
    return counts.view(samples, classes, columns), gradient, coefficients.view(classes, width).double()


def expected(logits, volumes, options, u):
    z = logits.double()
    if volumes.target.dim() > 2 + volumes.dense:
        z = z.unflatten(2, (round(z.size(2) ** 0.5),) * 2)
    z.requires_grad_()
    counts, _ = reference.sums(z, volumes, options, checks_targets=False)
    # u_background is dL/dFP and u_foreground dL/dTP - dL/dFN, where dL/dFN does not count, for tp + fn is fixed; of
    # squares, where it is dL/dFP, u_foreground is dL/dTP.
    tp, fp, fn = counts[:3]
    value = u[:, 0] * fp + u[:, 1] * tp + (u[:, 0] * fn if options.squared else 0)
    if options.ce_weight:
        value = value + u[:, 2] * counts[3] + u[:, 3] * counts[4]
    (gradient,) = torch.autograd.grad(value.sum(), z)
    return torch.stack(counts, -1).detach(), gradient.flatten(2)


PLAIN = Options(0.5, 0.5, 1.0, 0.0, 0.0, "softmax", True, None, False, "keep", False, False, "mean")
CE = PLAIN._replace(ce_weight=1.0)
CASES = [
    (1, 130, torch.float32, torch.uint8, PLAIN._replace(activation="sigmoid")),
    (2, 2100, torch.float32, torch.uint8, PLAIN),
    (2, 77, torch.bfloat16, torch.int64, PLAIN),
    (3, 1025, torch.float64, torch.int8, PLAIN),
    (4, 999, torch.float16, torch.int16, PLAIN),
    (5, 64, torch.float32, torch.int32, PLAIN._replace(activation="none")),
    (33, 700, torch.float32, torch.int64, PLAIN),
    (7, 531, torch.float16, torch.uint8, PLAIN),
    (118, 150, torch.bfloat16, torch.uint8, PLAIN),
    (1000, 70, torch.float64, torch.int16, PLAIN),
    (2, 1030, torch.float32, torch.uint8, CE),
    (4, 300, torch.bfloat16, torch.int64, CE),
    (14, 500, torch.float32, torch.uint8, CE),
    (3, 500, torch.float32, torch.uint8, CE._replace(focal_gamma=2.0, label_smoothing=0.1)),
    (3, 500, torch.float64, torch.uint8, CE._replace(focal_gamma=2.0, activation="sigmoid")),
    (2, 300, torch.bfloat16, torch.uint8, CE._replace(focal_gamma=2.0)),
    (4, 300, torch.float64, torch.uint8, CE._replace(focal_gamma=3.0)),
    (33, 300, torch.bfloat16, torch.int64, CE._replace(focal_gamma=3.0)),
    (2, 300, torch.float64, torch.uint8, CE._replace(label_smoothing=0.1)),
    (4, 300, torch.float16, torch.uint8, CE._replace(label_smoothing=0.1)),
    (33, 300, torch.bfloat16, torch.int64, CE._replace(label_smoothing=0.1)),
    (5, 500, torch.float32, torch.uint8, CE._replace(squared=True)),
]
DENSE_CASES = [
    (1, 200, torch.float32, torch.uint8, PLAIN._replace(activation="sigmoid")),
    (2, 1100, torch.float32, torch.float32, PLAIN),
    (5, 700, torch.float16, torch.float16, PLAIN._replace(soft_label=True)),
    (14, 300, torch.float32, torch.bfloat16, CE._replace(label_smoothing=0.1)),
    (3, 300, torch.float64, torch.float64, CE._replace(activation="sigmoid", label_smoothing=0.1)),
    (118, 100, torch.float32, torch.int16, PLAIN._replace(activation="none")),
    (3, 300, torch.float32, torch.float32, CE._replace(squared=True)),
]


def check(program, dtypes=tuple(LOGITS_TYPES)):
    for i, (classes, voxels, dtype, target_dtype, options) in enumerate([*CASES, *DENSE_CASES]):
        dense = i >= len(CASES)
        if dtype not in dtypes:
            continue
        for weighted, ignore_index, channels_last, coarse in (
            (False, None, False, False),
            (True, 0, False, True),
            (False, 1, True, False),
        ):
            side, target_side = round(voxels**0.5), round(1.7 * voxels**0.5)
            sizes = (side * side, (target_side, target_side)) if coarse else (voxels, (voxels,))
            logits, _ = inputs(2, classes, sizes[:1], dtype, seed=i)
            _, target = inputs(2, classes, sizes[1], seed=i)
            weight = torch.rand(target.shape) if weighted else None
            if dense:
                target = torch.nn.functional.one_hot(target, max(classes, 2)).movedim(-1, 1)[:, -classes:]
                target = target * 0.7 + 0.1 if target_dtype.is_floating_point else target
            target, options = target.to(target_dtype).contiguous(), options._replace(ignore_index=ignore_index)
            counts, gradient, u = run(program, logits, target, weight, options, channels_last, (0, sizes[0]))
            exact = target.double() if target.is_floating_point() else target
            volumes = Volumes(exact, None if weight is None else weight.double(), dense)
            true_counts, true_gradient = expected(logits, volumes, options, u)
            eps = 1e-13 if dtype == torch.float64 else 1e-6
            assert relative(counts, true_counts) <= eps
            rounding = {torch.float16: 6e-4, torch.bfloat16: 4e-3}.get(dtype, eps)
            assert relative(gradient, true_gradient) <= rounding


@pytest.mark.compiled
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
    # Not optimised, undefined behaviour a trap that says nothing (return code -4; without that flag it says where) and
    # addresses checked by calls: otherwise the compiler takes twice as long, and longer than all the rest.
    flags = [
        "-O0",
        "-g1",
        "-fsanitize=address,undefined",
        "-fsanitize-undefined-trap-on-error",
        "-D_GLIBCXX_ASSERTIONS",
    ]
    flags += ["--param", "asan-instrumentation-with-call-threshold=0"]
    flags += setup_flags.X86_CAPABILITIES[capability] if platform.machine() == "x86_64" else []
    dtypes = [torch.bfloat16] if capability == "avx512_bf16" else LOGITS_TYPES
    check([build("g++", flags, capability, tmp_path / "driver")], dtypes)


def test_aarch64(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip(
            "needs aarch64-linux-gnu-g++ and qemu-aarch64-static (Debian: g++-aarch64-linux-gnu qemu-user-static)"
        )
    check([emulator, str(build(compiler, ["-O3", "-static"], "baseline", tmp_path / "driver"))])
