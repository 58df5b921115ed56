"""Kernels of the GPU in place of a backend for tensors on the CPU."""

from __future__ import annotations

import torch

from tversky_kernels import _ops


def use(where: str) -> str:
    """From here on a backend, whose name is returned, is the library at this path, or for "triton:" and a path what
    Triton compiles, run by that library."""
    if where.startswith("triton:"):
        import triton_on_host

        triton_on_host.install(where.removeprefix("triton:"))
        return "triton"
    library = torch.library.Library("tversky_kernels_cuda_on_host", "DEF")
    for schema in _ops.SCHEMAS:
        library.define(schema)
    use.library = library  # what it defines goes with it
    torch.ops.load_library(where)
    host = torch.ops.tversky_kernels_cuda_on_host
    passes = {name: getattr(host, name) for name in (*_ops.NAMES, *_ops.REGION_NAMES)}
    _ops.OPERATORS["cpu"] = _ops.OPERATORS["cpu"]._replace(**passes)
    return "cpu"
