"""Compiles the Triton kernels for real GPUs without one, as the launchers would specialise them, and reads the
compiler's resource report:

    python tests/tools/triton_aot.py [--arch 80 --arch gfx942] [--quick] [--loops]

Exit code 1: more than a few bytes are spilled (ptxas spills one or two registers where it has plenty left, and
differently in every version).

The launchers run as they are, with tensors on the CPU; a stub driver names the target, and a launch only compiles.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from tversky_kernels.triton import launch

FEW_BYTES = 16


class StubDriver(DriverBase):
    """Says that a GPU of one architecture is there."""

    def __init__(self, arch: str):
        super().__init__()
        self.arch = arch
        amd = arch.startswith("gfx")
        self.target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return self.arch  # compiled kernels are cached by it

    def get_current_stream(self, device=None):
        return 0

    def get_device_interface(self):
        return torch.cuda

    def get_benchmarker(self):
        raise NotImplementedError


def of_cubin(compiled, tool: str, *options: str) -> str:
    """What one of the tools that come with Triton says of the machine code."""
    path = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def resources(compiled, arch: str) -> tuple[int, int]:
    """Registers, and bytes of a thread outside of them: what is spilled."""
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        return int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]), int(
            re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1]
        )
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", of_cubin(compiled, "cuobjdump", "-res-usage"))
    return int(usage[1]), int(usage[2]) + int(usage[3])


def longest_loop(compiled) -> int:
    """Instructions from the target of the farthest backward branch to it, in the machine code."""
    labels, instructions, longest = {}, 0, 0
    for line in of_cubin(compiled, "nvdisasm", "-c").splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = instructions
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*);", line):
            instructions += 1
            branch = re.search(r"BRA.*(\.L_x_\d+)", instruction[1])
            longest = max(longest, instructions - labels.get(branch[1], instructions)) if branch else longest
    return longest


class Collector:
    """Stands in for a kernel: a launch compiles and keeps what came of it."""

    def __init__(self, kernel, found: list):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        def compile_only(*arguments, **options):
            logits = options.get("C", 2) * options.get("BLOCK", 0) / (32 * options["num_warps"])  # of a thread and tile
            self.found.append((self.kernel.__name__, self.kernel.warmup(*arguments, grid=grid, **options), logits))

        return compile_only


def cases(quick: bool):
    """(classes, dtype, label dtype, options): everything that changes the code of a kernel."""
    few = (2, 4, 33, 118, 1000) if quick else (2, 3, 4, 5, 8, 14, 16, 17, 24, 32, 33, 48, 64, 118, 128, 1000)
    dtypes = (torch.float32, torch.bfloat16) if quick else (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for dtype in dtypes:
        for classes in few:
            yield classes, dtype, torch.uint8, {}
        yield 14, dtype, torch.int64, {}
        yield 4, dtype, torch.uint8, {"ignore": True, "weight": True}
        yield 33, dtype, torch.uint8, {"ignore": True, "weight": True}
        for classes in (4, 20):
            yield classes, dtype, torch.uint8, {"channels_last": True}
        for classes in (2, 33, 1000):
            yield classes, dtype, torch.uint8, {"tiny": True}
        for classes in (2, 4, 33):
            yield classes, dtype, torch.uint8, {"ce": 1}
            yield classes, dtype, torch.uint8, {"dense": True}
        yield 4, dtype, torch.uint8, {"ce": 1, "resampled": True, "weight": True}
        yield 4, dtype, torch.uint8, {"ce": 1, "resampled": True, "weight": True, "nearest_exact": True}
        yield 4, dtype, torch.float32, {"dense": True, "overlap": 1, "ce": 2, "focal": 2.0, "ignore": True}
        yield 33, dtype, torch.float32, {"dense": True, "overlap": 1, "ce": 2, "focal": 2.0}
        for classes in (2, 4, 14, 33, 118):
            yield classes, dtype, torch.uint8, {"overlap": 2}
        for classes in (4, 14, 33, 118):
            yield classes, dtype, torch.uint8, {"overlap": 2, "ce": 1}
        for classes in (4, 14, 33):
            yield classes, dtype, torch.uint8, {"overlap": 2, "dense": True, "activation": 1}
        for classes in (33, 118) if quick else (2, 4, 14, 33, 118, 1000):
            yield classes, dtype, torch.uint8, {"ce": 2}
        for classes in (4,) if quick else (2, 4, 33, 1000):
            yield classes, dtype, torch.uint8, {"ce": 1, "focal": 2.0}
            yield classes, dtype, torch.uint8, {"ce": 1, "focal": 1.5}
        yield 4, dtype, torch.uint8, {"ce": 2, "focal": 2.0}
        yield 4, dtype, torch.uint8, {"activation": 1, "ce": 1, "focal": 2.0}
        yield 4, dtype, torch.uint8, {"activation": 1, "ce": 2, "focal": 2.0}
        yield 33, dtype, torch.uint8, {"activation": 1, "ce": 1, "dense": True}
        for activation in (1, 2):
            yield 1, dtype, torch.uint8, {"activation": activation}
            yield 33, dtype, torch.uint8, {"activation": activation}
        for classes in (2, 14, 118):
            yield classes, dtype, torch.uint8, {"regions": 1}
        yield 14, dtype, torch.uint8, {"regions": 1, "ce": 1}
        yield 14, dtype, torch.float32, {"regions": 14, "dense": True, "ce": 2, "focal": 2.0, "overlap": 1}
        yield 3, dtype, torch.uint8, {"regions": 3, "activation": 1, "ce": 1}


def compile_case(classes, dtype, label_dtype, options) -> list:
    found: list = []
    stand_ins = {n: Collector(k, found) for n, k in launch.KERNELS.items()}
    saved = dict(launch.KERNELS)
    space = (2, 2, 2) if options.get("tiny") else (32, 32, 16)  # one program, and a constant in the kernel
    logits = torch.zeros(1 if options.get("tiny") else 2, classes, *space, dtype=dtype)
    if options.get("channels_last"):
        logits = logits.contiguous(memory_format=torch.channels_last_3d)
    space = (48, 64, 32) if options.get("resampled") else space
    target = torch.zeros(len(logits), *((classes,) if options.get("dense") else ()), *space, dtype=label_dtype)
    weight = torch.zeros(len(logits), *space) if options.get("weight") else None
    ignore, ce = 255 if options.get("ignore") else None, options.get("ce", 0)
    arguments = (
        options.get("activation", 0), ignore, options.get("overlap", 0), ce, options.get("focal", 0.0),
        options.get("nearest_exact", False),
    )  # fmt: skip
    try:
        launch.KERNELS.update(stand_ins)
        if options.get("regions"):
            regions = torch.zeros(len(logits), options["regions"], *space, dtype=torch.int16)
            counts = launch.region_count_pass(logits, target, weight, regions, None, 50, *arguments, 1)
            coefficients = counts[..., : 4 if ce else 2]
            launch.region_gradient_pass(coefficients, logits, target, weight, regions, None, *arguments)
            return found
        _, coefficients = launch.tversky_loss(
            logits,
            target,
            weight,
            *arguments,
            1,
            None,
            0.3,
            0.7,
            1.0,
            1e-5,
            1e-5,
            True,
            False,
            0,
            2,
            1.0,
            1.0,
            0.1,
            0,
        )
        grad = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        launch.gradient_pass(grad, coefficients, logits, target, weight, *arguments)
    finally:
        launch.KERNELS.update(saved)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", action="append", help="80, 90, 100, gfx942; default: all")
    parser.add_argument("--quick", action="store_true", help="a few of the specialisations")
    parser.add_argument("--loops", action="store_true", help="the longest loop's instructions a logit (not of gfx)")
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}")
    spilled = 0
    seen: set = set()
    for arch in arguments.arch or ("80", "90", "100", "gfx942"):
        driver.set_active(StubDriver(arch))
        for classes, dtype, label, options in cases(arguments.quick):
            for name, compiled, logits in compile_case(classes, dtype, label, options):
                key = (arch, name, compiled.hash)
                if key in seen:
                    continue
                seen.add(key)
                registers, spill = resources(compiled, arch)
                loads = sorted(set(re.findall(r"ld\.global\.v\d\.b\d+", compiled.asm.get("ptx", ""))))
                about = f"C={classes} {str(dtype)[6:]} {str(label)[6:]} {options or ''}"
                loop = ""
                if arguments.loops and logits and not arch.startswith("gfx"):
                    loop = f", {longest_loop(compiled) / logits:.0f} instructions a logit"
                print(
                    f"{arch:>6} {name:30} {about:40} {registers:3} registers, {spill} B spilled, "
                    f"{compiled.metadata.shared} B shared, {compiled.metadata.num_warps} warps{loop} {' '.join(loads)}"
                )
                spilled += spill > FEW_BYTES
    print(f"{len(seen)} kernels, {spilled} spill more than {FEW_BYTES} bytes")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
