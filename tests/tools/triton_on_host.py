"""What Triton compiles for a GPU, without one: its PTX, run on the host by tests/cuda_on_host/ptx.cpp."""

from __future__ import annotations

import ctypes
import inspect

from triton.runtime import driver
from triton_aot import StubDriver

from tversky_kernels import _backends, _ops
from tversky_kernels.triton import launch

SCALARS = {
    "i1": ctypes.c_bool,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}


class OnHost:
    """Stands in for a kernel: a launch compiles it for the GPU and runs what came of it here."""

    def __init__(self, kernel, library: ctypes.CDLL):
        self.kernel, self.library = kernel, library

    def __getitem__(self, grid):
        def run(*arguments, **options):
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            named = {k: v for k, v in options.items() if k in self.kernel.arg_names}
            bound = inspect.signature(self.kernel.fn).bind(*arguments, **named).arguments
            values = []
            for name, kind in compiled.src.signature.items():
                values += scalars(kind, bound[name])
            # Two more parameters point to memory of Triton's own, which these kernels do not have.
            pointers = [ctypes.cast(ctypes.byref(x), ctypes.c_void_p) for x in values] + [None, None]
            error = self.library.tk_launch_ptx(
                compiled.asm["ptx"].encode(),
                compiled.metadata.name.encode(),
                (ctypes.c_uint * 2)(*grid, *(1,) * (2 - len(grid))),
                32 * compiled.metadata.num_warps,
                compiled.metadata.shared,
                (ctypes.c_void_p * len(pointers))(*pointers),
            )
            if error:
                raise RuntimeError(f"{compiled.metadata.name}: {error.decode()}")

        return run


def scalars(kind, value) -> list:
    """A kernel's argument as the values that are handed over; those of a record one by one."""
    if isinstance(kind, tuple):
        return [x for of_kind, of_value in zip(kind, value, strict=True) for x in scalars(of_kind, of_value)]
    if kind == "constexpr":
        return []
    return [ctypes.c_void_p(value.data_ptr()) if kind[0] == "*" else SCALARS[kind](value)]


def install(library: str, arch: str = "90") -> None:
    """From here on the backend "triton" takes tensors on the CPU, and runs what Triton compiles for ``arch``."""
    host = ctypes.CDLL(library)
    host.tk_launch_ptx.restype = ctypes.c_char_p
    driver.set_active(StubDriver(arch))
    launch.KERNELS.update({name: OnHost(kernel, host) for name, kernel in launch.KERNELS.items()})
    for name in (*_ops.NAMES, *_ops.REGION_NAMES):
        _ops._library.impl(f"triton_{name}", getattr(launch, name), "CPU")
    _ops.TRITON_MISSING = None
    _backends._interpreted = lambda: True
