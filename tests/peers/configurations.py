"""Random configurations of the losses of `compat` and of the libraries whose names they have."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from typing import NamedTuple

import torch

import tversky_kernels as tk


class Configuration(NamedTuple):
    """One loss of a library and a call of it. module: where the library has the class or function."""

    module: str
    name: str
    options: dict
    logits: torch.Tensor
    target: torch.Tensor
    more: tuple = ()

    def theirs(self) -> Callable:
        """The library's loss, ready to call."""
        return self._made(getattr(importlib.import_module(self.module), self.name))

    def ours(self) -> Callable:
        """Ours of that name."""
        return self._made(getattr(getattr(tk.compat, PEERS[self.module]), self.name))

    def _made(self, loss) -> Callable:
        options = {name: _fresh(value) for name, value in self.options.items()}
        if not isinstance(loss, type):
            return lambda z, t: loss(z, t, **options)
        helper = options.get("apply_nonlin")
        if isinstance(helper, str):
            options["apply_nonlin"] = {"softmax": torch.nn.Softmax(1), "sigmoid": torch.sigmoid}[helper]
        made = loss(**options)
        return lambda z, t: made(z, t, *self.more)

    def values(self, loss: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and the gradient of its sum."""
        logits = self.logits.clone().requires_grad_()
        value = loss(logits, self.target.clone())
        (gradient,) = torch.autograd.grad(value.sum(), logits, allow_unused=True)
        return value.detach(), torch.zeros_like(logits) if gradient is None else gradient


#: The libraries' modules, and ours in compat.
PEERS = {
    "monai.losses": "monai",
    "segmentation_models_pytorch.losses": "smp",
    "kornia.losses": "kornia",
    "nnunetv2.training.loss.dice": "nnunet",
    "nnunetv2.training.loss.compound_losses": "nnunet",
}


def _fresh(value):
    # Some of the libraries write into their options.
    return dict(value) if isinstance(value, dict) else value.clone() if isinstance(value, torch.Tensor) else value


class _Draw:
    """Draws, all from one seed."""

    def __init__(self, seed: int):
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def __call__(self, *choices):
        return self.random.choice(choices)

    def space(self, dimensions: int | None = None) -> tuple[int, ...]:
        return tuple(self.random.randint(1, 6) for _ in range(dimensions or self.random.randint(1, 3)))

    def logits(self, samples: int, classes: int, space) -> torch.Tensor:
        scale = self(0.3, 1.0, 4.0, 12.0)
        return scale * torch.randn(samples, classes, *space, generator=self.generator, dtype=torch.float64)

    def labels(self, samples: int, classes: int, space) -> torch.Tensor:
        most = self.random.randint(1, classes)  # some classes may be absent
        return torch.randint(0, most, (samples, *space), generator=self.generator)

    def numbers(self, count: int) -> list[float]:
        return [round(self.random.uniform(0.1, 3.0), 3) for _ in range(count)]

    def mask(self, shape) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator) < 0.3

    def weight(self) -> float:
        return self(0.1, 0.3, 0.5, 0.7, 1.0, 1.5)


def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """(N, C, *spatial) of (N, *spatial)."""
    return torch.nn.functional.one_hot(labels.long(), classes).movedim(-1, 1)


def monai(seed: int) -> Configuration:
    """A loss of MONAI."""
    d = _Draw(seed)
    name = d(
        "TverskyLoss", "DiceLoss", "DiceCELoss", "DiceFocalLoss", "FocalLoss", "GeneralizedDiceLoss",
        "GeneralizedDiceFocalLoss", "MCCLoss",
    )  # fmt: skip
    samples, classes, space = d(1, 2, 3), d(1, 2, 3, 5), d.space()
    labels = d.labels(samples, max(2, classes), space)
    reduction = d("mean", "sum", "mean", "none")
    options: dict = {"include_background": d(True, True, False), "reduction": reduction}
    if classes == 1:
        target = labels[:, None]
        options["sigmoid"] = True
    else:
        options["to_onehot_y"] = d(True, False)
        target = labels[:, None] if options["to_onehot_y"] else one_hot(labels, classes)
        options[d("softmax", "sigmoid")] = True
    if name not in ("FocalLoss", "MCCLoss"):
        options |= {"smooth_nr": d(1e-5, 0.1), "smooth_dr": d(1e-5, 0.1), "batch": d(True, False)}
    elif name == "MCCLoss":
        options |= {"smooth_nr": d(0.0, 1e-5), "smooth_dr": d(1e-5, 0.1), "batch": d(True, False)}
    if name == "FocalLoss":
        options.pop("softmax", None), options.pop("sigmoid", None)
        options |= {"gamma": d(0.0, 0.5, 2.0), "use_softmax": classes > 1 and d(True, False)}
        options["alpha"] = d(None, None, 0.25)
    if name == "TverskyLoss":
        options |= {"alpha": d.weight(), "beta": d.weight()}
    if name == "DiceLoss":
        options |= {"jaccard": d(False, True), "squared_pred": d(False, False, True)}
        target = target.double() if options["squared_pred"] else target  # of which MONAI takes norms
    if name == "DiceCELoss":
        options |= {"lambda_dice": d.weight(), "lambda_ce": d.weight(), "label_smoothing": d(0.0, 0.0, 0.1)}
        options["reduction"] = d("mean", "sum")
    if name == "DiceFocalLoss":
        options |= {"gamma": d(0.0, 2.0), "lambda_dice": d.weight(), "lambda_focal": d.weight(), "alpha": d(None, 0.25)}
    if name.startswith("Generalized"):
        options["w_type"] = d("square", "simple", "uniform")
    if name == "GeneralizedDiceFocalLoss":
        options |= {"gamma": d(0.0, 2.0), "lambda_gdl": d.weight(), "lambda_focal": d.weight()}
    if classes > 1 and name in ("DiceCELoss", "DiceLoss", "DiceFocalLoss", "FocalLoss") and d(True, False):
        kept = classes if options["include_background"] or name == "DiceCELoss" else classes - 1
        # MONAI takes no weights for the one channel that is left, nor for a cross-entropy of other channels.
        if kept > 1 and (name != "DiceCELoss" or options["include_background"]):
            options["weight"] = torch.tensor(d.numbers(kept), dtype=torch.float64)
    if classes > 1 and name in ("TverskyLoss", "DiceLoss", "FocalLoss") and d(1, 0, 0):
        # A label of its own, or a class.
        options["ignore_index"] = ignored = d(255, 0, classes - 1)
        if options["to_onehot_y"] and ignored == 255:
            target = target.masked_fill(d.mask(target.shape), 255)
    elif classes > 1 and name in ("TverskyLoss", "DiceLoss", "DiceCELoss", "GeneralizedDiceLoss") and d(1, 0, 0):
        # A soft target.
        options["to_onehot_y"] = False
        target = d.logits(samples, classes, space).softmax(1)
        if name in ("TverskyLoss", "DiceLoss") and not options.get("squared_pred"):
            options["soft_label"] = d(True, False)
    return Configuration("monai.losses", name, options, d.logits(samples, classes, space), target)


def smp(seed: int) -> Configuration:
    """A loss of segmentation_models_pytorch."""
    d = _Draw(seed)
    name = d("TverskyLoss", "DiceLoss", "JaccardLoss", "FocalLoss", "MCCLoss")
    samples, space = d(1, 2, 3), d.space(2)
    mode = d("binary", "multiclass", "multilabel")
    classes = 1 if mode == "binary" or name == "MCCLoss" else d(1, 2, 4)
    logits = d.logits(samples, classes, space)
    if name == "MCCLoss":
        target = d.labels(samples, 2, space)[:, None]
        return Configuration(
            "segmentation_models_pytorch.losses", name, {"eps": d(1e-5, 0.1)}, logits.sigmoid(), target
        )
    options: dict = {"mode": mode, "from_logits": d(True, True, False)}
    labels = d.labels(samples, max(classes, 1 + (mode != "multiclass")), space)
    if mode == "multiclass":
        target = labels
    elif mode == "binary":
        target = d(labels, labels[:, None], labels[:, None].double())
    else:
        target = torch.stack([d.labels(samples, 2, space) for _ in range(classes)], 1)
    if d(True, False) and not (mode == "multilabel" and name == "FocalLoss"):
        options["ignore_index"] = 255
        target = target.masked_fill(d.mask(target.shape), 255)
        if mode == "multiclass" and name != "FocalLoss":
            target = d(target, target.double())
    if mode != "binary" and d(True, False):
        options["class_weights"] = d.numbers(classes)
    if name == "FocalLoss":
        options |= {"gamma": d(0.0, 0.5, 2.0), "alpha": d(None, None, 0.25), "reduction": d("mean", "mean", "sum")}
        options |= {"normalized": d(False, False, True), "reduced_threshold": d(None, None, 0.5)}
    else:
        options |= {"log_loss": d(False, True), "smooth": d(0.0, 1.0)}
        if name == "TverskyLoss":
            options |= {"alpha": d.weight(), "beta": d.weight(), "gamma": d(1.0, 0.75, 2.0)}
        if mode != "binary" and classes > 1 and d(True, False, False):
            options["classes"] = [0, classes - 1]
    if not options["from_logits"]:
        # Not 0 or 1: there |p - g| has a kink, of which the libraries take the mean slope, the kernels the inner one.
        logits = 0.01 + 0.98 * (logits.softmax(1) if mode == "multiclass" and classes > 1 else logits.sigmoid())
    return Configuration("segmentation_models_pytorch.losses", name, options, logits, target)


def kornia(seed: int) -> Configuration:
    """A loss of kornia."""
    d = _Draw(seed)
    name = d("tversky_loss", "TverskyLoss", "dice_loss", "DiceLoss")
    samples, classes, space = d(1, 2, 3), d(1, 2, 3, 5), d.space(2)
    target = d.labels(samples, classes, space)
    options: dict = {"eps": d(1e-8, 0.1)}
    if name.lower().startswith("tversky"):
        options |= {"alpha": d.weight(), "beta": d.weight()}
    else:
        options["average"] = d("micro", "macro")
        if d(True, False):
            options["weight"] = torch.tensor(d.numbers(classes), dtype=torch.float64)
    if d(True, False):
        ignored = d(-100, 255)
        options["ignore_index"] = ignored
        target = target.masked_fill(d.mask(target.shape), ignored)
        if d(True, False, False):
            target[0] = ignored
    return Configuration("kornia.losses", name, options, d.logits(samples, classes, space), target)


def nnunet(seed: int) -> Configuration:
    """A loss of nnU-Net."""
    d = _Draw(seed)
    name = d("MemoryEfficientSoftDiceLoss", "SoftDiceLoss", "DC_and_CE_loss", "DC_and_BCE_loss")
    samples, classes, space = d(1, 2, 3), d(2, 3, 5), d.space(d(2, 3))
    dice = {"batch_dice": d(True, False), "do_bg": d(True, False), "smooth": d(1e-5, 1.0), "ddp": False}
    logits, labels, more = d.logits(samples, classes, space), d.labels(samples, classes, space), ()
    if name.endswith("DiceLoss"):
        options = {**dice, "apply_nonlin": d("softmax", "sigmoid")}
        target = d(labels[:, None], labels[:, None].float(), one_hot(labels, classes))
        if name == "SoftDiceLoss":
            options["clip_tp"] = d(None, 3.0)
        if d(True, False):
            more = (~d.mask((samples, 1, *space)),)
        return Configuration("nnunetv2.training.loss.dice", name, options, logits, target, more)
    options = {"soft_dice_kwargs": dice, "weight_ce": d.weight(), "weight_dice": d.weight()}
    ignored = d(True, False)
    if name == "DC_and_CE_loss":
        target, options["ce_kwargs"] = labels[:, None], d({}, {"label_smoothing": 0.1})
        if ignored:
            options["ignore_label"] = classes
            target = target.masked_fill(d.mask(target.shape), classes)
    else:
        options |= {"bce_kwargs": {}, "use_ignore_label": ignored}
        target = torch.stack([d.labels(samples, 2, space) for _ in range(classes + ignored)], 1)
    return Configuration("nnunetv2.training.loss.compound_losses", name, options, logits, target, more)


DRAWS = {"monai": monai, "smp": smp, "kornia": kornia, "nnunet": nnunet}


def levels(seed: int):
    """Outputs and targets of nnU-Net's deep supervision, and what its trainer knows: (regions, ignored, batch)."""
    d = _Draw(seed)
    regions, ignored, batch = d(True, False), d(True, False), d(True, False)
    outputs, targets = [], []
    for size in (8, 4, 2):
        outputs.append(d.logits(2, 3, (size, size)))
        if regions:
            targets.append(torch.stack([d.labels(2, 2, (size, size)) for _ in range(3 + ignored)], 1).float())
        else:
            labels = d.labels(2, 3, (size, size))[:, None]
            targets.append(labels.masked_fill(d.mask(labels.shape), 3) if ignored else labels)
    return outputs, targets, (regions, 3 if ignored else None, batch)


def other_inputs(classes: int):
    """Logits and a dense target (2, C, 4, 5) for the libraries whose losses are rows in docs/migration.md."""
    d = _Draw(classes)
    logits = d.logits(2, classes, (4, 5))
    labels = torch.randint(0, max(2, classes), (2, 4, 5), generator=d.generator)
    return logits, labels[:, None] if classes == 1 else one_hot(labels, classes)
