"""Which backends exist here, why one does not, and which one "auto" takes."""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig

import torch

from . import _ops

NAMES = ("cpu", "cuda", "triton", "blocks", "reference")
VARIABLE = "TVERSKY_KERNELS_BACKEND"
#: What "auto" tries first, read once: os.environ raises and catches two exceptions for a variable that is not set.
PREFERRED = os.environ.get(VARIABLE) or None
#: From so many logits on "auto" takes triton where its kernels are faster. Below, its calls cost more on the host (four
#: times cuda's) than its kernels save.
MANY_LOGITS = 2**24
#: The oldest compute capability that Triton compiles for.
OLDEST_FOR_TRITON = (7, 0)
#: Whether Triton finds a C compiler for its launchers. Without one "auto" must not leave cuda for triton.
TRITON_CAN_COMPILE = bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")) and os.path.exists(
    os.path.join(sysconfig.get_config_var("INCLUDEPY") or "", "Python.h")
)
#: What the CUDA kernels take at the least with any arguments; more where a voxel of all classes has room.
MOST_CLASSES_OF_CUDA = 2000
MOST_CLASSES_OF_CUDA_IN_FLOAT64 = 1000


def available_backends() -> dict[str, bool | str]:
    """The backends: True where one runs here, on the current device, else the reason why it does not.

    >>> tk.available_backends()
    {'cpu': True, 'cuda': '...', 'triton': '...', 'reference': True}
    """
    return {name: _available(name) for name in NAMES}


def _available(backend: str, index: int | None = None) -> bool | str:
    # index: of the GPU; None is the current one.
    if backend == "cpu":
        return _ops.CPU_MISSING is None or _ops.CPU_MISSING
    if backend == "cuda":
        for_rocm = f"torch {torch.__version__} is built for ROCm" if torch.version.hip is not None else None
        return _on_gpu(_ops.CUDA_MISSING or for_rocm, index, _too_old_for_cuda)
    if backend == "triton":
        if _interpreted() and _ops.TRITON_MISSING is None:
            return True
        return _on_gpu(_ops.TRITON_MISSING, index, _too_old_for_triton)
    return True


# torch.compile calls this function while it traces and takes its result for a constant. torch.compiler's
# assume_constant_result sets the same attribute, but imports all of the compiler.
_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _on_gpu(missing, index, too_old) -> bool | str:
    if missing is not None:
        return missing
    if index is None and torch.cuda.is_available():
        index = torch.cuda.current_device()
    card = _card(index)
    return f"torch {torch.__version__} finds no GPU" if card is None else too_old(*card) or True


@functools.cache
def _card(index: int | None) -> tuple[str, tuple[int, int]] | None:
    # Its name and compute capability; None where there is none. A call asks torch only once.
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(index)
    return found.name, (found.major, found.minor)


@functools.cache
def _too_old_for_cuda(name: str, capability: tuple[int, int]) -> str | None:
    code, version, of_driver = _ops.cuda_library()
    ready = tuple(entry for entry in code if not entry.startswith("compute"))
    older = (0, 0) < of_driver < version
    compiled_by = f"it was compiled by CUDA {_dotted(version)}, the driver here runs CUDA {_dotted(of_driver)}"
    if older and of_driver[0] < version[0]:
        return compiled_by
    if has_code_for(ready if older else code, capability):  # a newer CUDA's PTX is what an older driver does not run
        return None
    if has_code_for(code, capability):
        return f"{compiled_by}, and only its PTX is for {name}"
    return f"it was compiled for {', '.join(code)}, not for the compute capability {_dotted(capability)} of {name}"


def _too_old_for_triton(name: str, capability: tuple[int, int]) -> str | None:
    if torch.version.hip is not None or capability >= OLDEST_FOR_TRITON:
        return None
    return (
        f"Triton takes a compute capability of {_dotted(OLDEST_FOR_TRITON)} or more, {name} has {_dotted(capability)}"
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def has_code_for(code: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether a card of that compute capability runs one of these, like sm_80 (machine code: for it and what is newer
    of the same major number) and compute_90 (PTX, which the driver compiles: for it and all that is newer)."""
    for kind, number in (entry.split("_") for entry in code):
        oldest = divmod(int(number), 10)
        if oldest <= capability and (kind == "compute" or oldest[0] == capability[0]):
            return True
    return False


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def beyond_cuda(logits: torch.Tensor) -> str | None:
    """What of a case the CUDA kernels alone do not compute, as the end of an error message; None: nothing."""
    if not logits.is_cuda:
        return None
    most = MOST_CLASSES_OF_CUDA_IN_FLOAT64 if logits.dtype == torch.float64 else MOST_CLASSES_OF_CUDA
    return None if logits.shape[1] <= most else f"more than {most} classes of {logits.dtype}"


def _obstacle(backend: str, device: torch.device, unsupported: str | None, by_cuda: str | None) -> str | None:
    # Why a backend cannot compute this case, as the end of an error message; None where it can.
    if backend == "reference":
        return None
    reason = _available(backend, device.index)
    if reason is not True:
        return f"is not available: {reason}"
    if backend == "blocks":
        if torch.compiler.is_compiling() or device.type == "meta":
            return "computes a block after the other, which is not traced; expected 'auto' or 'reference'"
        return None if unsupported is None else f"does not compute {unsupported}; expected 'auto' or 'reference'"
    expected = backend if backend != "triton" else "cpu" if _interpreted() else "cuda"
    if device.type != expected:
        return f"expects tensors on {expected}, got logits on {device}"
    if backend == "cuda":
        unsupported = unsupported or by_cuda
    if unsupported is not None:
        return f"does not compute {unsupported}; expected 'auto' or 'reference'"
    return None


def faster_by_triton(logits: torch.Tensor, options, dense: bool, regional: bool = False) -> bool:
    """Whether triton is the faster one of the two on a GPU for this case (docs/performance.md).

    With regions, by the instructions of the compiled kernels: where neighbours are in one region, cuda's take three to
    seven times as many. By measurement, with label smoothing of class indices where cuda takes its kernels for any
    target, and 1.9 to 3.6 times as long: with a focal exponent or squares, of more than 144 classes, of other layouts,
    and of sizes that whole loads do not allow.
    """
    if not logits.is_cuda or logits.numel() < MANY_LOGITS:
        return False
    if regional:
        return True
    return bool(
        options.label_smoothing
        and options.ce_weight
        and not dense
        and options.activation == "softmax"
        and logits.dtype != torch.float64
        and (
            options.focal_gamma
            or options.squared
            or logits.shape[1] > 144
            or not logits.is_contiguous()
            or logits.stride(1) % 4
        )
    )


def check_name(backend: str) -> None:
    """Raises where no backend has this name."""
    if backend != "auto" and backend not in NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(map(repr, NAMES))}, got {backend!r}")


def choose(
    backend: str,
    device: torch.device,
    unsupported: str | None,
    triton_first: bool = False,
    unsupported_by_cuda: str | None = None,
) -> str:
    """The backend to run: the one that is named, or for "auto" the first that can.

    ``unsupported`` says which of the arguments only the reference computes; None where there is none.
    ``triton_first``: of :func:`faster_by_triton`. ``unsupported_by_cuda``: of :func:`beyond_cuda`.
    TVERSKY_KERNELS_BACKEND, when the package is imported, names one that "auto" tries first.
    """
    if backend == "auto":
        if PREFERRED not in (None, "auto"):
            if PREFERRED not in NAMES:
                raise ValueError(f"{VARIABLE}: expected auto or one of {', '.join(NAMES)}, got {PREFERRED!r}")
            if _obstacle(PREFERRED, device, unsupported, unsupported_by_cuda) is None:
                return PREFERRED
        first = triton_first and TRITON_CAN_COMPILE
        of_device = ("cpu",) if device.type == "cpu" else ("triton", "cuda") if first else ("cuda", "triton")
        for name in (*of_device, "blocks"):
            if _obstacle(name, device, unsupported, unsupported_by_cuda) is None:
                return name
        return "reference"
    check_name(backend)
    obstacle = _obstacle(backend, device, unsupported, unsupported_by_cuda)
    if obstacle is not None:
        raise ValueError(f"backend: {backend!r} {obstacle}")
    return backend
