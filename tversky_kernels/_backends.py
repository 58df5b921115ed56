"""Which backends exist here, why one does not, and which one "auto" takes."""

from __future__ import annotations

import os

import torch

from . import _ops

NAMES = ("cpu", "cuda", "triton", "reference")
_NOT_YET = "this version of tversky_kernels has no {} kernels yet"


def available_backends() -> dict[str, bool | str]:
    """The backends: True where one runs here, else the reason why it does not.

    >>> tk.available_backends()
    {'cpu': True, 'cuda': '...', 'triton': '...', 'reference': True}
    """
    return {
        "cpu": _ops.CPU_MISSING is None or _ops.CPU_MISSING,
        "cuda": _NOT_YET.format("CUDA"),
        "triton": _NOT_YET.format("Triton"),
        "reference": True,
    }


def _asked_for_auto() -> str:
    asked = os.environ.get("TVERSKY_KERNELS_BACKEND") or "auto"
    if asked != "auto" and asked not in NAMES:
        raise ValueError(f"TVERSKY_KERNELS_BACKEND: expected auto or one of {', '.join(NAMES)}, got {asked!r}")
    return asked


def choose(backend: str, device: torch.device, unsupported: str | None) -> str:
    """The backend to run: the one that is named, or the best for "auto".

    ``unsupported`` says which of the arguments only the reference computes; None where there is none.
    """
    if backend != "auto" and backend not in NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(map(repr, NAMES))}, got {backend!r}")
    if backend == "auto":
        asked = _asked_for_auto()
        usable = device.type == "cpu" and _ops.CPU_MISSING is None and unsupported is None
        if asked in ("auto", "cpu"):
            return "cpu" if usable else "reference"
        backend = asked
    if backend == "reference":
        return backend
    reason = available_backends()[backend]
    if reason is not True:
        raise ValueError(f"backend: {backend!r} is not available: {reason}")
    if device.type != backend:
        raise ValueError(f"backend: {backend!r} expects tensors on {backend}, got logits on {device}")
    if unsupported is not None:
        raise ValueError(f"backend: {backend!r} does not compute {unsupported}; expected 'auto' or 'reference'")
    return backend
