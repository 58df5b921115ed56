"""The CUDA sources compiled for the host, where fibers are the threads (tests/cuda_on_host)."""

from __future__ import annotations

from processes import ROOT, TORCH, run, run_kernels_of

FAMILIES = ("few", "split_labels", "split_targets", "channels", "tiled", "regions")
SOURCES = (*FAMILIES, "families", "table", "operators")


def compiler_of_host():
    base = ["g++", "-std=c++20", "-x", "c++", "-DTK_CUDA_ON_HOST", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-fPIC"]
    base += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered"]
    return [*base, "-I", ROOT / "tests" / "cuda_on_host", "-isystem", TORCH / "include"]


def build_on_host(sources, out, *flags, only=SOURCES, objects=()):
    base = [*compiler_of_host(), *flags]
    compiled = []
    for name in only:
        compiled.append(out.parent / f"{out.stem}_{name}.o")
        result = run([*base, "-c", sources / f"{name}.cu", "-o", compiled[-1]])
        assert result.returncode == 0, result.stderr[-3000:]
    if not any(o.name.endswith("_ptx.o") for o in objects):
        compiled.append(out.parent / f"{out.stem}_ptx.o")
        source, faster = ROOT / "tests" / "cuda_on_host" / "ptx.cpp", [] if "-O0" in flags else ["-O2"]
        result = run([*base, *faster, "-fwrapv", "-c", source, "-o", compiled[-1]])
        assert result.returncode == 0, result.stderr[-3000:]
    link = ["g++", "-shared", *flags, *compiled, *objects, "-o", out, f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed"]
    result = run([*link, "-ltorch", "-ltorch_cpu"])
    assert result.returncode == 0, result.stderr
    return compiled


def run_compiled_kernels_of(library, ptx, *options, **environment):
    """The tests of the GPU kernels with what nvcc compiled (PTX), run by this library: all, or a TK_SHARE."""
    whole = {"TK_EMULATION_PTX": ":".join(map(str, ptx)), "TK_SHARE": "0/1"}
    return run_kernels_of(library, *options, environment={**whole, **environment})
