"""Which backends exist here, why one does not, and which one "auto" takes."""

from __future__ import annotations

import os

import torch

from . import _ops

NAMES = ("cpu", "cuda", "triton", "reference")
VARIABLE = "TVERSKY_KERNELS_BACKEND"
#: What "auto" tries first, read once: os.environ raises and catches two exceptions for a variable that is not set.
PREFERRED = os.environ.get(VARIABLE) or None
#: Logits from which on "auto" takes triton where its kernels are the faster ones: below it a call's time on the host,
#: four times cuda's, is more than what they save.
MANY_LOGITS = 2**24


def available_backends() -> dict[str, bool | str]:
    """The backends: True where one runs here, else the reason why it does not.

    >>> tk.available_backends()
    {'cpu': True, 'cuda': '...', 'triton': '...', 'reference': True}
    """
    return {name: _available(name) for name in NAMES}


def _available(backend: str) -> bool | str:
    if backend == "cpu":
        return _ops.CPU_MISSING is None or _ops.CPU_MISSING
    if backend == "cuda":
        return _on_gpu(_ops.CUDA_MISSING)
    if backend == "triton":
        return True if _interpreted() and _ops.TRITON_MISSING is None else _on_gpu(_ops.TRITON_MISSING)
    return True


def _on_gpu(missing: str | None) -> bool | str:
    if missing is not None:
        return missing
    return True if torch.cuda.is_available() else f"torch {torch.__version__} finds no GPU"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _obstacle(backend: str, device: torch.device, unsupported: str | None) -> str | None:
    # Why a backend cannot compute this case, as the end of an error message; None where it can.
    if backend == "reference":
        return None
    reason = _available(backend)
    if reason is not True:
        return f"is not available: {reason}"
    expected = backend if backend != "triton" else "cpu" if _interpreted() else "cuda"
    if device.type != expected:
        return f"expects tensors on {expected}, got logits on {device}"
    if unsupported is not None:
        return f"does not compute {unsupported}; expected 'auto' or 'reference'"
    return None


def faster_by_triton(logits: torch.Tensor, options, dense: bool) -> bool:
    """Whether, of the two on a GPU, triton was measured to be the faster one for this case (docs/performance.md).

    Label smoothing of class indices where cuda takes its kernels for any target, and 1.9 to 3.6 times as long: with a
    focal exponent or squares, of more than 144 classes, of other layouts, and of sizes that whole loads do not allow.
    """
    return bool(
        logits.is_cuda
        and options.label_smoothing
        and options.ce_weight
        and not dense
        and options.activation == "softmax"
        and logits.dtype != torch.float64
        and logits.numel() >= MANY_LOGITS
        and (
            options.focal_gamma
            or options.squared
            or logits.shape[1] > 144
            or not logits.is_contiguous()
            or logits.stride(1) % 4
        )
    )


def choose(backend: str, device: torch.device, unsupported: str | None, triton_first: bool = False) -> str:
    """The backend to run: the one that is named, or for "auto" the first that can.

    ``unsupported`` says which of the arguments only the reference computes; None where there is none.
    ``triton_first``: of :func:`faster_by_triton`.
    TVERSKY_KERNELS_BACKEND, when the package is imported, names one that "auto" tries first.
    """
    if backend == "auto":
        if PREFERRED not in (None, "auto"):
            if PREFERRED not in NAMES:
                raise ValueError(f"{VARIABLE}: expected auto or one of {', '.join(NAMES)}, got {PREFERRED!r}")
            if _obstacle(PREFERRED, device, unsupported) is None:
                return PREFERRED
        for name in ("cpu",) if device.type == "cpu" else ("triton", "cuda") if triton_first else ("cuda", "triton"):
            if _obstacle(name, device, unsupported) is None:
                return name
        return "reference"
    if backend not in NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(map(repr, NAMES))}, got {backend!r}")
    obstacle = _obstacle(backend, device, unsupported)
    if obstacle is not None:
        raise ValueError(f"backend: {backend!r} {obstacle}")
    return backend
