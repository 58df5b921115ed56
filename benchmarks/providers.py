"""The losses that are compared: each from its own package, asked for the same thing, and held to its own definition.

A provider makes, for a case, ``loss(logits, target) -> scalar``. ``truth`` are the arguments of
`tversky_kernels.reference.tversky_ce_loss` that define what it should return; a provider whose value disagrees is
marked wrong and gets no figures. A task is what they are all asked for.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable

import torch

import tversky_kernels as tk
from benchmarks.cases import Case

TVERSKY, DICE_CE, SQUARED, SMOOTHED, FOCAL = TASKS = ("tversky", "dice_ce", "squared", "smoothed", "focal")
ALPHA, BETA, SMOOTH = 0.3, 0.7, 1e-5
PACKAGES = {
    "MONAI": "monai",
    "smp": "segmentation-models-pytorch",
    "kornia": "kornia",
    "exacta": "exacta",
    "nnU-Net": "nnunetv2",
}
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[Case], Loss]
    truth: dict = dataclasses.field(default_factory=dict)
    task: str = TVERSKY
    #: What is added to the truth: a loss that returns -Dice is 1 less.
    offset: float = 0.0
    #: The cases' variants that it takes, besides the plain one.
    takes: tuple[str, ...] = ()
    #: The only device on which it is measured; None: on all.
    device: str | None = None

    @property
    def package(self) -> str:
        """Whose loss it is, as pip calls it."""
        return PACKAGES.get(self.name.split()[0], "torch" if self.name.startswith("lean") else "tversky_kernels")

    @property
    def version(self) -> str:
        """The package and its version; the package alone where it is not installed."""
        try:
            return f"{self.package} {importlib.metadata.version(self.package)}"
        except importlib.metadata.PackageNotFoundError:
            return self.package

    def suits(self, case: Case) -> bool:
        return set(case.variant) <= set(self.takes) and self.device in (None, case.device)


def _tversky_of_counts(tp, fp, fn):
    return (1 - (tp + SMOOTH) / (tp + ALPHA * fp + BETA * fn + SMOOTH)).mean()


def lean_gather(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The leanest eager loss we know: no one-hot, only the softmax is of the volume's size."""
    samples, classes = logits.shape[:2]
    p = logits.softmax(1).flatten(2)
    label = target.flatten(1).long()
    zeros = p.new_zeros(samples, classes)
    right = p.gather(1, label[:, None])[:, 0]
    tp = zeros.scatter_add(1, label, right)
    there = zeros.scatter_add(1, label, torch.ones_like(right))
    return _tversky_of_counts(tp, p.sum(-1) - tp, there - tp)


def lean_mask(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The same with a mask, which a compiler fuses into the sums."""
    p = logits.softmax(1).flatten(2)
    is_class = target.flatten(2) == torch.arange(p.size(1), device=p.device)[:, None]
    zero = p.new_zeros(())
    tp = torch.where(is_class, p, zero).sum(-1)
    return _tversky_of_counts(tp, torch.where(is_class, zero, p).sum(-1), torch.where(is_class, 1 - p, zero).sum(-1))


EVERYTHING = ("dense", "sigmoid", "channels_last")


def _lean(function: Loss, compiled: bool = False) -> Callable[[Case], Loss]:
    def make(case: Case) -> Loss:
        torch._dynamo.reset()
        return torch.compile(function) if compiled else function

    return make


class _OutputOfNetwork(torch.autograd.Function):
    # The leaf that is timed as something that has been computed, without a copy: a leaf may not be overwritten.
    @staticmethod
    def forward(ctx, x):
        return x.new_empty(0).set_(x.detach())

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def _as_of_network(loss: Loss, inplace: bool) -> Loss:
    return (lambda z, t: loss(_OutputOfNetwork.apply(z), t)) if inplace else loss


def _ours(backend: str, inplace: bool = False) -> Callable[[Case], Loss]:
    def make(case: Case) -> Loss:
        options = {"backend": backend, "inplace_backward": inplace, "activation": case.activation}
        return _as_of_network(tk.TverskyLoss(alpha=ALPHA, beta=BETA, **options), inplace)

    return make


def our_dice_ce(backend: str, inplace: bool = False, **changed) -> Callable[[Case], Loss]:
    """Our Dice and cross-entropy, with these options besides."""
    options = {"alpha": 0.5, "beta": 0.5, **HALF, "backend": backend, "inplace_backward": inplace, **changed}
    return lambda case: _as_of_network(tk.TverskyCELoss(**{"activation": case.activation, **options}), inplace)


def _monai(name: str, activation: str | None = None, **options) -> Callable[[Case], Loss]:
    def make(case: Case) -> Loss:
        import monai.losses

        form = {activation or case.activation: True, "to_onehot_y": case.form == "index"}
        loss = getattr(monai.losses, name)(**form, **options)
        if options.get("squared_pred") and case.form == "dense":
            return lambda z, t: loss(z, t.to(z.dtype))  # it takes the norm of the target, which integers have not
        return loss

    return make


def _smp(case: Case) -> Loss:
    from segmentation_models_pytorch.losses import TverskyLoss

    loss = TverskyLoss("multiclass", alpha=ALPHA, beta=BETA, smooth=SMOOTH)
    return lambda z, t: loss(z, t[:, 0].long())  # its one_hot takes int64


def _kornia(case: Case) -> Loss:
    from kornia.losses import tversky_loss

    # It takes two spatial dimensions and int64.
    return lambda z, t: tversky_loss(z.flatten(3), t[:, 0].flatten(2).long(), ALPHA, BETA, SMOOTH)


def _exacta(name: str, compiled: bool = False, **options) -> Callable[[Case], Loss]:
    def make(case: Case) -> Loss:
        import exacta.losses

        loss = getattr(exacta.losses, name)(**options)
        torch._dynamo.reset()
        loss = torch.compile(loss) if compiled else loss
        return lambda z, t: loss(z, t[:, 0])

    return make


def _nnunet(compiled: bool = False) -> Callable[[Case], Loss]:
    def make(case: Case) -> Loss:
        from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

        dice = {"batch_dice": False, "smooth": SMOOTH, "do_bg": True, "ddp": False}
        loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
        torch._dynamo.reset()
        if compiled:
            loss.dc = torch.compile(loss.dc)  # as its trainer does
        return loss

    return make


#: A Dice loss with smoothing 2 s is a Tversky loss at 1/2, 1/2 with s.
HALF = {"smooth_nr": SMOOTH / 2, "smooth_dr": SMOOTH / 2}
DICE = {"alpha": 0.5, "beta": 0.5, **HALF}
WITH_CE = {"ce_weight": 1.0}
SQUARES = {"squared": True}
SMOOTHING = {"label_smoothing": 0.1}
#: MONAI's focal loss is always that of a sigmoid.
FOCAL_CE = {"activation": "sigmoid", "focal_gamma": 2.0}

PROVIDERS = {
    p.name: p
    for p in (
        Provider("ours", _ours("auto"), takes=EVERYTHING),
        Provider("ours, in place", _ours("auto", inplace=True), takes=EVERYTHING),
        Provider("ours, cuda", _ours("cuda"), takes=EVERYTHING, device="cuda"),
        Provider("ours, triton", _ours("triton"), takes=EVERYTHING, device="cuda"),
        Provider("our reference", _ours("reference"), takes=EVERYTHING),
        Provider("lean eager, gather", _lean(lean_gather)),
        Provider("lean eager, mask", _lean(lean_mask)),
        Provider("lean compiled, gather", _lean(lean_gather, compiled=True)),
        Provider("lean compiled, mask", _lean(lean_mask, compiled=True)),
        Provider("MONAI TverskyLoss", _monai("TverskyLoss", alpha=ALPHA, beta=BETA), takes=EVERYTHING),
        Provider("MONAI DiceLoss", _monai("DiceLoss"), DICE, takes=EVERYTHING),
        Provider("smp TverskyLoss", _smp, {"batch": True, "absent": "zero"}),
        Provider("kornia tversky_loss", _kornia, {"absent": "skip"}),
        Provider("exacta TverskyLoss", _exacta("TverskyLoss", alpha=ALPHA, beta=BETA)),
        # On a card it has kernels of its own, and compiling adds nothing.
        Provider(
            "exacta TverskyLoss, compiled",
            _exacta("TverskyLoss", compiled=True, alpha=ALPHA, beta=BETA),
            device="cpu",
        ),
        Provider("our Dice + CE", our_dice_ce("auto"), DICE | WITH_CE, DICE_CE),
        Provider("our Dice + CE, in place", our_dice_ce("auto", inplace=True), DICE | WITH_CE, DICE_CE),
        *(
            Provider(f"our Dice + CE, {backend}", our_dice_ce(backend), DICE | WITH_CE, DICE_CE, device="cuda")
            for backend in ("cuda", "triton")
        ),
        Provider("our Dice alone", our_dice_ce("auto", ce_weight=0.0), DICE, DICE_CE),
        Provider("our Dice alone, in place", our_dice_ce("auto", inplace=True, ce_weight=0.0), DICE, DICE_CE),
        Provider("our reference, Dice + CE", our_dice_ce("reference"), DICE | WITH_CE, DICE_CE),
        Provider("MONAI DiceCELoss", _monai("DiceCELoss"), DICE | WITH_CE, DICE_CE),
        Provider("nnU-Net DC_and_CE_loss", _nnunet(), DICE | WITH_CE, DICE_CE, offset=-1.0),
        Provider("nnU-Net DC_and_CE_loss, compiled", _nnunet(True), DICE | WITH_CE, DICE_CE, offset=-1.0),
        Provider("exacta DiceCELoss", _exacta("DiceCELoss"), DICE | WITH_CE, DICE_CE),
        *(
            Provider(
                name,
                our_dice_ce(backend, inplace, ce_weight=0.0, **SQUARES),
                DICE | SQUARES,
                SQUARED,
                takes=EVERYTHING,
            )
            for name, backend, inplace in (
                ("our squared Dice", "auto", False),
                ("our squared Dice, in place", "auto", True),
                ("our reference, squared Dice", "reference", False),
            )
        ),
        *(
            Provider(name, our_dice_ce(backend, inplace, **changed), DICE | WITH_CE | changed, task)
            for task, changed, ours in (
                (SMOOTHED, SMOOTHING, "Dice + smoothed CE"),
                (FOCAL, FOCAL_CE, "Dice + focal CE"),
            )
            for name, backend, inplace in (
                (f"our {ours}", "auto", False),
                (f"our {ours}, in place", "auto", True),
                (f"our reference, {ours}", "reference", False),
            )
        ),
        Provider("MONAI DiceCELoss, smoothed", _monai("DiceCELoss", **SMOOTHING), DICE | WITH_CE | SMOOTHING, SMOOTHED),
        Provider("MONAI DiceFocalLoss", _monai("DiceFocalLoss", "sigmoid"), DICE | WITH_CE | FOCAL_CE, FOCAL),
        Provider(
            "MONAI DiceLoss, squared", _monai("DiceLoss", squared_pred=True), DICE | SQUARES, SQUARED, takes=EVERYTHING
        ),
    )
}
