"""The report of `python -m tversky_kernels`: versions and backends, a check of their numbers, a small benchmark."""

from __future__ import annotations

import importlib
import importlib.metadata
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from . import _backends, _ops, reference
from ._memory import peak_bytes
from .functional import tversky_ce_loss, tversky_loss

CAPABILITIES = ("portable code", "AVX2", "AVX-512", "AVX-512 with bfloat16")
PACKAGES = ("tversky_kernels", "torch", "triton", "numpy", "monai", "nnunetv2", "lightning")
#: How far a loss and a gradient may be from the reference in float64, relative to the largest: per dtype.
TOLERANCES = {torch.float32: (2e-6, 2e-5), torch.bfloat16: (2e-6, 1e-2), torch.float64: (1e-12, 1e-10)}
CHECKED_SPACE = (9, 10, 11)


def facts() -> dict[str, str]:
    """The versions, the processor, the card and the backends, in words."""
    found = {"Python": f"{platform.python_version()}, {platform.platform()}"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package in ("tversky_kernels", "triton"):
                found[package] = "no metadata: not installed"
    found["processor"] = f"{_processor()}, {torch.get_num_threads()} threads"
    if _ops.CPU_MISSING is None:
        found["CPU kernels"] = CAPABILITIES[torch.ops.tversky_kernels.cpu_capability(None)]
    if _ops.CUDA_MISSING is None:
        library = _ops.cuda_library()
        found["CUDA kernels"] = f"for {', '.join(library.code)}, compiled by CUDA {'.'.join(map(str, library.version))}"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        of_torch = f"torch's CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}"
        found["card"] = f"{card.name}, compute capability {card.major}.{card.minor}, {of_torch}"
    else:
        found["card"] = "none that torch finds"
    for backend, state in _backends.available_backends().items():
        found[f"backend {backend}"] = "runs here" if state is True else f"no: {state}"
    if _backends.PREFERRED is not None:
        found[_backends.VARIABLE] = _backends.PREFERRED
    return found


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _device_of(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") and not _backends._interpreted() else "cpu"


def self_check() -> Iterator[tuple[str, str, bool, str]]:
    """Losses and gradients of each backend that runs here: its name, the case, whether it is right, how far it is."""
    generator = torch.Generator().manual_seed(0)
    for backend, state in _backends.available_backends().items():
        if state is not True or backend == "reference":
            continue
        for dtype in TOLERANCES:
            for case, classes, options in (
                ("Tversky", 4, {}),
                ("Tversky + cross-entropy", 14, {"ce_weight": 1.0}),
                ("sigmoid, dense target", 3, {"activation": "sigmoid", "gamma": 0.75}),
            ):
                logits = (3 * torch.randn(2, classes, *CHECKED_SPACE, generator=generator)).to(dtype)
                target = torch.randint(0, classes, (2, *CHECKED_SPACE), generator=generator)
                if "activation" in options:
                    target = torch.nn.functional.one_hot(target, classes).movedim(-1, 1).contiguous()
                right, far = _compare(logits, target, options, backend, TOLERANCES[dtype])
                yield backend, f"{case}, {str(dtype).removeprefix('torch.')}", right, far


def _compare(logits, target, options: dict, backend: str, tolerance) -> tuple[bool, str]:
    function, truth = (tversky_ce_loss, reference.tversky_ce_loss)
    options = {"ce_weight": 0.0, **options}
    z = logits.double().requires_grad_()
    expected = truth(z, target, **options)
    (expected_gradient,) = torch.autograd.grad(expected, z)
    device = _device_of(backend)
    z = logits.to(device).requires_grad_()
    try:
        loss = function(z, target.to(device), backend=backend, **options)
        (gradient,) = torch.autograd.grad(loss, z)
    except Exception as error:  # it is to be told, whatever it is, and the next case tried
        return False, f"{type(error).__name__}: {error}"
    of_loss = abs(loss.item() - expected.item()) / abs(expected.item())
    off = (gradient.cpu().double() - expected_gradient).abs().max() / expected_gradient.abs().max()
    right = of_loss <= tolerance[0] and off.item() <= tolerance[1]
    return right, f"loss off by {of_loss:.0e}, gradient by {off.item():.0e}"


def _lean(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    # A plain loss that suits a compiler: it can fuse the mask into the sums.
    p = logits.softmax(1).flatten(2)
    is_class = target.flatten(2) == torch.arange(p.size(1), device=p.device)[:, None]
    zero = p.new_zeros(())
    tp = torch.where(is_class, p, zero).sum(-1)
    fp, fn = torch.where(is_class, zero, p).sum(-1), torch.where(is_class, 1 - p, zero).sum(-1)
    return (1 - (tp + 1e-5) / (tp + 0.3 * fp + 0.7 * fn + 1e-5)).mean()


def candidates() -> dict[str, Callable | str]:
    """The losses that are compared, by name, or why one is not."""
    found: dict[str, Callable | str] = {
        "tversky_kernels": tversky_loss,
        "tversky_kernels, in place": lambda z, t: tversky_loss(z, t, inplace_backward=True),
        "plain PyTorch (the reference)": lambda z, t: tversky_loss(z, t, backend="reference"),
        "torch.compile of a lean loss": torch.compile(_lean),
    }
    try:
        losses = importlib.import_module("monai.losses")
        found["MONAI TverskyLoss"] = losses.TverskyLoss(softmax=True, to_onehot_y=True, alpha=0.3, beta=0.7)
        found["MONAI DiceLoss"] = losses.DiceLoss(softmax=True, to_onehot_y=True)
    except ImportError:
        found["MONAI"] = "not installed"
    return found


def benchmark(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, rounds: int, progress=iter):
    """Rows (name, milliseconds, spread, MiB) of forward and backward, taking turns; a reason in place of numbers.

    spread: the quartiles' distance by the median. MiB: the peak beyond logits and target, the gradient with it.
    progress: wraps what is gone through, as tqdm does.
    """
    target = torch.randint(0, shape[1], (shape[0], 1, *shape[2:]), device=device, dtype=torch.uint8)
    source = torch.randn(shape, device=device, dtype=dtype)

    def step(loss):
        # A leaf may not be overwritten: so the logits are the result of an operation, which is not timed.
        logits = source.clone().requires_grad_() * 1
        _wait(device)
        start = time.perf_counter()
        torch.autograd.grad(loss(logits, target), logits)
        _wait(device)
        return (time.perf_counter() - start) * 1e3

    def memory(loss):
        logits = source.clone().requires_grad_() * 1
        return peak_bytes(lambda: torch.autograd.grad(loss(logits, target), logits), device) / 2**20

    losses, peaks = candidates(), {}
    times: dict[str, list[float]] = {}
    for name, loss in losses.items():
        if not isinstance(loss, str):
            try:
                step(loss)
                peaks[name], times[name] = memory(loss), []
            except Exception as error:  # torch.compile without a compiler, too little memory, a library's own
                losses[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    for _ in progress(range(rounds)):
        for name, taken in times.items():
            taken.append(step(losses[name]))
    for name, loss in losses.items():
        if isinstance(loss, str):
            yield name, loss, None, None
        else:
            quartiles = statistics.quantiles(times[name], n=4)
            yield name, quartiles[1], (quartiles[2] - quartiles[0]) / quartiles[1], peaks[name]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
