"""The losses of `compat` against the libraries' own where they are installed, else against their formulas.

MONAI is in the extra "examples". segmentation_models_pytorch and nnunetv2 need torchvision, which does not import
beside a CPU build of torch; with them in an environment of their own the same tests run against them.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from common import inputs, loss_and_gradient

import tversky_kernels as tk

SPACE = (6, 5, 4)


def theirs_or(module, name, formula):
    """The class of another library, or a function that makes what the formula says."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError):
        return formula


def one_hot(target, classes):
    return torch.nn.functional.one_hot(target, classes).movedim(-1, 1)


def check(ours, theirs, logits, target, *more, rtol=1e-9, atol=None):
    loss, gradient = loss_and_gradient(lambda z, t: ours(z, t, *more), logits, target)
    expected = loss_and_gradient(lambda z, t: theirs(z, t, *more), logits, target)
    torch.testing.assert_close(loss, expected[0], rtol=rtol, atol=atol or 1e-2 * rtol, check_dtype=False)
    torch.testing.assert_close(gradient, expected[1], rtol=1e3 * rtol, atol=1e-9)


# ---- MONAI


@pytest.mark.parametrize(
    "options",
    [
        {"softmax": True, "to_onehot_y": True},
        {"softmax": True, "to_onehot_y": True, "batch": True, "include_background": False},
        {"softmax": True, "to_onehot_y": True, "reduction": "none", "smooth_nr": 0.0, "smooth_dr": 0.1},
        {"softmax": True, "to_onehot_y": True, "reduction": "sum", "ignore_index": 255},
        {"softmax": True, "to_onehot_y": True, "ignore_index": 1},
        {"sigmoid": True, "dense": True},
        {"sigmoid": True, "dense": True, "soft_label": True},
        {"softmax": True, "dense": True, "ignore_index": 2},
        {"tanh": True, "to_onehot_y": True},
        {"to_onehot_y": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["TverskyLoss", "DiceLoss", "JaccardLoss", "squared DiceLoss", "squared JaccardLoss"])
def test_monai_overlap_losses(name, options):
    losses = pytest.importorskip("monai.losses")
    options = dict(options)
    rtol = 1e-9
    if name.startswith("squared "):
        name, options["squared_pred"] = name.removeprefix("squared "), True
        rtol = 1e-7  # MONAI takes the norms of its one-hot float32
    logits, target = inputs(2, 4, SPACE, torch.float64)
    if options.pop("tanh", False):
        options["other_act"] = torch.tanh
    if options.get("ignore_index") == 255:
        target[:, 1] = 255
    target = target[:, None]
    if options.pop("dense", False):
        target = one_hot(target[:, 0], 4).double()
        target = 0.8 * target + 0.05 if options.get("soft_label") else target
    if name == "TverskyLoss":
        options |= {"alpha": 0.3, "beta": 0.7}
    elif name == "JaccardLoss":
        options["jaccard"] = True
    else:
        options["weight"] = [1.0, 2.0, 3.0] if options.get("include_background") is False else [0.5, 1.0, 2.0, 3.0]
    name = "DiceLoss" if name == "JaccardLoss" else name
    ours, theirs = getattr(tk.compat.monai, name)(**options), getattr(losses, name)(**options)
    if options.get("reduction") == "none":
        for classes in (2, 4):
            z, t = logits[:, :classes], target.clamp(max=classes - 1)
            if "weight" in options:
                continue
            assert ours(z, t).shape == theirs(z, t).shape
        ours_sum, theirs_sum = (lambda z, t, f=f: f(z, t).sum() for f in (ours, theirs))
        check(ours_sum, theirs_sum, logits, target, rtol=rtol)
    else:
        check(ours, theirs, logits, target, rtol=rtol)


@pytest.mark.parametrize(
    "options",
    [
        {"softmax": True, "to_onehot_y": True},
        {"softmax": True, "to_onehot_y": True, "batch": True, "include_background": False, "weighted": True},
        {"softmax": True, "to_onehot_y": True, "label_smoothing": 0.1, "lambda_dice": 0.5, "lambda_ce": 2.0},
        {"softmax": True, "to_onehot_y": True, "reduction": "sum", "jaccard": True},
        {"softmax": True, "dense": True},
        {"sigmoid": True, "to_onehot_y": True},
        {"sigmoid": True, "dense": True, "weighted": True},
        {"to_onehot_y": True},
        {"softmax": True, "to_onehot_y": True, "squared_pred": True, "smooth_nr": 0.0, "weighted": True},
        {"softmax": True, "dense": True, "squared_pred": True, "batch": True},
        {"sigmoid": True, "to_onehot_y": True, "squared_pred": True},
    ],
    ids=str,
)
def test_monai_dice_ce(options):
    losses = pytest.importorskip("monai.losses")
    options = dict(options)
    logits, target = inputs(2, 4, SPACE, torch.float64)
    target = target[:, None]
    if options.pop("dense", False):
        target = one_hot(target[:, 0], 4).double()
    if options.pop("weighted", False):
        options["weight"] = torch.tensor([0.5, 1.0, 2.0, 3.0]).double()
    rtol = 1e-7 if options.get("squared_pred") else 1e-9  # MONAI takes the norms of its one-hot float32
    check(tk.compat.monai.DiceCELoss(**options), losses.DiceCELoss(**options), logits, target, rtol=rtol)


DICE_FOCAL = [
    {"sigmoid": True, "to_onehot_y": True},
    {"sigmoid": True, "dense": True, "weight": [0.5, 1.0, 2.0, 3.0], "gamma": 1.5, "squared_pred": True},
    {"sigmoid": True, "to_onehot_y": True, "include_background": False, "weight": [1.0, 2.0, 3.0], "batch": True},
    {"softmax": True, "to_onehot_y": True, "lambda_dice": 0.5, "lambda_focal": 20.0},
    {"softmax": True, "dense": True, "include_background": False, "reduction": "sum", "gamma": 0.0},
    {"sigmoid": True, "to_onehot_y": True, "reduction": "sum", "jaccard": True, "weight": 0.5},
    {"to_onehot_y": True},
]


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        *((4, options) for options in DICE_FOCAL),
        (1, {"sigmoid": True}),
        (1, {"sigmoid": True, "include_background": False, "reduction": "sum", "weight": 0.5}),
        (1, {"squared_pred": True}),
    ],
    ids=str,
)
def test_monai_dice_focal(channels, options):
    losses = pytest.importorskip("monai.losses")
    options = dict(options)
    logits, target = inputs(2, channels, SPACE, torch.float64)
    target = target[:, None].double() if channels == 1 else target[:, None]
    if options.pop("dense", False):
        target = one_hot(target[:, 0], 4).double()
    ours, theirs = tk.compat.monai.DiceFocalLoss(**options), losses.DiceFocalLoss(**options)
    logits = logits.float().double()  # MONAI's focal loss is computed in float32
    loss, gradient = loss_and_gradient(ours, logits, target)
    expected = loss_and_gradient(theirs, logits, target)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weight", [None, torch.tensor([3.0]).double()])
@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_monai_dice_ce_of_one_channel(weight, sigmoid, dtype):
    losses = pytest.importorskip("monai.losses")
    logits, target = inputs(2, 1, SPACE, torch.float64)
    options = {"sigmoid": sigmoid, "weight": weight}
    theirs = losses.DiceCELoss(**options)
    check(tk.compat.monai.DiceCELoss(**options), theirs, logits, target[:, None].to(dtype))


def test_monai_takes_float_labels_and_half_logits():
    logits, target = inputs(2, 4, SPACE)
    criterion = tk.compat.monai.DiceCELoss(softmax=True, to_onehot_y=True, inplace_backward=True)
    expected = criterion(logits, target[:, None])
    assert torch.equal(criterion(logits, target[:, None].float()), expected)
    torch.testing.assert_close(criterion(logits.half(), target[:, None]), expected, rtol=1e-3, atol=0)
    z = logits.requires_grad_().half()
    (gradient,) = torch.autograd.grad(criterion(z, target[:, None]), z)
    assert gradient.data_ptr() == z.data_ptr()


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_monai_dice_focal_in_place(activation):
    """Fused it overwrites the logits; two losses of them do not."""
    logits, target = inputs(2, 4, SPACE)
    options = {activation: True, "to_onehot_y": True}
    expected = loss_and_gradient(tk.compat.monai.DiceFocalLoss(**options), logits, target[:, None])
    z = logits.requires_grad_() * 1
    loss = tk.compat.monai.DiceFocalLoss(**options, inplace_backward=True)(z, target[:, None])
    (gradient,) = torch.autograd.grad(loss, z)
    assert (gradient.data_ptr() == z.data_ptr()) == (activation == "sigmoid")
    torch.testing.assert_close(gradient, expected[1])


FOCAL = [
    {"to_onehot_y": True},
    {"to_onehot_y": True, "gamma": 0.0, "reduction": "sum", "weight": [0.5, 1.0, 2.0, 3.0]},
    {"to_onehot_y": True, "include_background": False, "weight": [1.0, 2.0, 3.0], "gamma": 3.0},
    {"to_onehot_y": True, "use_softmax": True},
    {"to_onehot_y": True, "use_softmax": True, "weight": [0.5, 1.0, 2.0, 3.0], "reduction": "sum"},
    {"to_onehot_y": True, "use_softmax": True, "include_background": False, "alpha": 0.3},
    {"to_onehot_y": True, "use_softmax": True, "alpha": 0.3},
    {"to_onehot_y": True, "use_softmax": True, "alpha": [0.1, 0.2, 0.3, 0.4], "weight": 2.0},
    {"to_onehot_y": True, "alpha": 0.25},
    {"to_onehot_y": True, "alpha": [0.1, 0.2, 0.3, 0.4], "reduction": "none"},
    {"to_onehot_y": True, "ignore_index": 1},
    {"to_onehot_y": True, "ignore_index": 255, "reduction": "sum"},
    {"dense": True, "ignore_index": 2},
    {"dense": True, "use_softmax": True, "reduction": "none"},
    {"soft": True},
    {"soft": True, "alpha": 0.25, "reduction": "sum"},
    {"soft": True, "ignore_index": 2},
    {"soft": True, "use_softmax": True},
]


@pytest.mark.parametrize("options", FOCAL, ids=str)
def test_monai_focal(options):
    losses = pytest.importorskip("monai.losses")
    options = dict(options)
    logits, target = inputs(2, 4, SPACE, torch.float64)
    logits = logits.float().double()
    if options.get("ignore_index") == 255:
        target[:, 1] = 255
    target = target[:, None]
    dense, soft = options.pop("dense", False), options.pop("soft", False)
    if dense or soft:
        target = one_hot(target[:, 0], 4).double()
        target = 0.8 * target + 0.05 if soft else target
    ours, theirs = tk.compat.monai.FocalLoss(**options), losses.FocalLoss(**options)
    assert ours(logits, target).shape == theirs(logits, target).shape
    ours_of, theirs_of = ((lambda z, t, f=f: f(z, t).sum()) for f in (ours, theirs))
    loss, gradient = loss_and_gradient(ours_of, logits, target)
    expected = loss_and_gradient(theirs_of, logits, target)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"alpha": 0.25}, {"gamma": 1.0, "sigmoid": True}], ids=str
)
@pytest.mark.parametrize("soft", [False, True])
def test_monai_dice_focal_of_soft_and_hard_targets(options, soft, dtype):
    losses = pytest.importorskip("monai.losses")
    logits, target = inputs(2, 4, SPACE)
    target = one_hot(target, 4).to(dtype)
    if soft:
        target = 0.7 * target + 0.1
    options = {"sigmoid": True} | options
    ours, theirs = (f(**options) for f in (tk.compat.monai.DiceFocalLoss, losses.DiceFocalLoss))
    assert ours(logits, target).shape == theirs(logits, target.float()).shape
    loss, gradient = loss_and_gradient(lambda z, t: ours(z, t).mean(), logits, target)
    expected = loss_and_gradient(lambda z, t: theirs(z, t.float()).mean(), logits, target)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["TverskyLoss", "DiceLoss"])
@pytest.mark.parametrize("options", [{"softmax": True}, {"sigmoid": True, "include_background": False}, {}], ids=str)
@pytest.mark.parametrize("ignored", [0, 2, 9])
def test_monai_ignored_channel_of_a_soft_target(name, options, ignored):
    """The mask is as soft as the target's channel is."""
    losses = pytest.importorskip("monai.losses")
    logits, target = inputs(2, 4, SPACE, torch.float64)
    target = 0.8 * one_hot(target, 4).double() + 0.05
    options = {**options, "ignore_index": ignored}
    check(getattr(tk.compat.monai, name)(**options), getattr(losses, name)(**options), logits, target, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_monai_weight_of_one_channel_in_half_precision(dtype):
    """A weight that half precision does not have is neither rounded nor infinite."""
    logits, target = inputs(2, 1, SPACE, torch.float32)
    logits = logits.to(dtype)
    criterion = tk.compat.monai.DiceCELoss(sigmoid=True, weight=torch.tensor([100_003.0]))
    found, gradient = loss_and_gradient(criterion, logits, target[:, None])
    expected = loss_and_gradient(criterion, logits.float(), target[:, None])
    torch.testing.assert_close(found, expected[0], rtol=1e-6, atol=0, check_dtype=False)
    assert gradient.isfinite().all()


def test_monai_checkpoints_and_attributes():
    """Weights go from MONAI's state_dict to ours and back, strictly; attributes are where they are there."""
    losses = pytest.importorskip("monai.losses")
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0])
    for name, options in (
        ("DiceCELoss", {"softmax": True, "to_onehot_y": True}),
        ("DiceFocalLoss", {"sigmoid": True, "to_onehot_y": True}),
        ("DiceLoss", {"softmax": True, "to_onehot_y": True}),
        ("FocalLoss", {"to_onehot_y": True}),
    ):
        theirs = getattr(losses, name)(weight=weight, **options)
        ours = getattr(tk.compat.monai, name)(weight=torch.ones(4), **options)
        assert ours.state_dict().keys() == theirs.state_dict().keys(), name
        ours.load_state_dict(theirs.state_dict(), strict=True)
        logits, target = inputs(2, 4, SPACE)
        torch.testing.assert_close(ours(logits, target[:, None]), theirs(logits, target[:, None]), rtol=1e-5, atol=0)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert isinstance(ours, torch.nn.modules.loss._Loss)
        for attribute in ("dice", "cross_entropy", "binary_cross_entropy", "focal", "reduction", "class_weight"):
            assert hasattr(ours, attribute) == hasattr(theirs, attribute), (name, attribute)
    criterion = tk.compat.monai.DiceFocalLoss(sigmoid=True, to_onehot_y=True)
    criterion.reduction, criterion.gamma = "sum", 1.0
    other = tk.compat.monai.DiceFocalLoss(sigmoid=True, to_onehot_y=True, reduction="sum", gamma=1.0)
    assert torch.equal(criterion(logits, target[:, None]), other(logits, target[:, None]))


def test_monai_warnings():
    monai, logits = tk.compat.monai, torch.randn(1, 1, 4, 4)
    target = torch.randint(0, 2, (1, 1, 4, 4)).float()
    for criterion in (monai.DiceLoss, monai.TverskyLoss, monai.FocalLoss):
        with pytest.warns(UserWarning, match="single channel prediction, `to_onehot_y=True` ignored"):
            criterion(to_onehot_y=True)(logits, target)
        with pytest.warns(UserWarning, match="single channel prediction, `include_background=False` ignored"):
            criterion(include_background=False)(logits, target)


def test_monai_errors():
    monai = tk.compat.monai
    logits, target = inputs(2, 4, SPACE)
    with pytest.raises(ValueError, match="reduction: expected 'mean' or 'sum'"):
        monai.DiceCELoss(reduction="none")
    with pytest.raises(ValueError, match="weight: expected 3 numbers, one a class, got 4"):
        monai.DiceFocalLoss(sigmoid=True, to_onehot_y=True, include_background=False, weight=[1, 2, 3, 4])(
            logits, target[:, None]
        )
    with pytest.raises(ValueError, match="expected at most one of sigmoid"):
        monai.TverskyLoss(sigmoid=True, softmax=True)
    with pytest.raises(TypeError, match="other_act: expected None or a callable, got str"):
        monai.TverskyLoss(other_act="relu")
    with pytest.raises(ValueError, match="reduction: expected one of 'mean'"):
        monai.TverskyLoss(reduction="average")
    for error in (ValueError, AssertionError):  # MONAI's is the second
        for criterion in (monai.TverskyLoss(softmax=True), monai.DiceLoss(softmax=True), monai.FocalLoss()):
            with pytest.raises(error, match="ground truth has different shape"):
                criterion(logits, target[:, None])
    with pytest.raises(ValueError, match="target: with to_onehot_y=True expected class indices"):
        monai.TverskyLoss(softmax=True, to_onehot_y=True)(logits, one_hot(target, 4))
    with pytest.raises(ValueError, match="weight: expected 3 numbers, one a class, got 4"):
        monai.DiceLoss(softmax=True, to_onehot_y=True, include_background=False, weight=[1, 2, 3, 4])(
            logits, target[:, None]
        )
    with pytest.raises(ValueError, match="target: for an input"):
        monai.DiceCELoss(softmax=True, to_onehot_y=True)(logits, target)
    with pytest.warns(UserWarning, match="single channel prediction, `softmax=True` ignored"):
        monai.TverskyLoss(softmax=True)(logits[:, :1].sigmoid(), (target[:, None] > 0).float())


@pytest.mark.parametrize("options", [{}, {"include_background": False}, {"batch": True}, {"reduction": "sum"}], ids=str)
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(
    "name", ["TverskyLoss", "DiceLoss", "weighted DiceLoss", "MCCLoss", "DiceCELoss", "DiceFocalLoss"]
)
def test_monai_without_space(name, labels, options):
    """(B, C): MONAI sums over samples and channels, for torch's sum over no dimensions is over all."""
    losses = pytest.importorskip("monai.losses")
    logits, target = inputs(3, 4, (), torch.float64)
    target = target[:, None] if labels else one_hot(target, 4).double()
    options = {**options, "softmax": True, "to_onehot_y": labels}
    if name.startswith("weighted "):
        name = name.removeprefix("weighted ")
        options["weight"] = torch.arange(1.0, 4.0 + (options.get("include_background", True)))
    if name in ("DiceCELoss", "DiceFocalLoss") and labels:
        target = target.long()
    ours, theirs = (getattr(m, name)(**options) for m in (tk.compat.monai, losses))
    check(ours, theirs, logits, target, rtol=1e-6)
    if name in ("TverskyLoss", "DiceLoss") and "reduction" not in options:
        ours, theirs = (getattr(m, name)(**options, reduction="none") for m in (tk.compat.monai, losses))
        assert ours(logits, target).shape == theirs(logits, target).shape
        torch.testing.assert_close(ours(logits, target), theirs(logits, target), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("name", ["TverskyLoss", "DiceLoss"])
def test_monai_soft_labels_of_negative_inputs(name, labels, batch):
    """MONAI sums |p| there."""
    losses = pytest.importorskip("monai.losses")
    logits, target = inputs(2, 3, SPACE, torch.float64)
    more = {"ignore_index": 255} if labels else {}
    if labels:
        target[:, 1] = 255
    target = target[:, None] if labels else 0.8 * one_hot(target, 3).double() + 0.05
    options = {"other_act": torch.tanh, "soft_label": True, "to_onehot_y": labels, "batch": batch, **more}
    check(*(getattr(m, name)(**options) for m in (tk.compat.monai, losses)), logits, target, rtol=1e-6)


# ---- segmentation_models_pytorch


def smp_formula(mode, classes=None, log_loss=False, from_logits=True, smooth=0.0, ignore_index=None, eps=1e-7,
                alpha=0.5, beta=0.5, gamma=1.0, class_weights=None):  # fmt: skip
    def loss(z, t):
        p = z if not from_logits else z.softmax(1) if mode == "multiclass" else z.sigmoid()
        channels = 1 if mode == "binary" else z.size(1)
        p = p.reshape(z.size(0), channels, -1)
        if mode == "multiclass":
            kept = torch.ones_like(t) if ignore_index is None else t != ignore_index
            g = one_hot((t * kept).flatten(1), channels) * kept.flatten(1)[:, None]
            p = p * kept.flatten(1)[:, None]
        else:
            g = t.reshape(p.shape)
            kept = torch.ones_like(g) if ignore_index is None else g != ignore_index
            p, g = p * kept, g * kept
        total, wanted, apart = p.sum((0, 2)), g.sum((0, 2)), (p - g).abs().sum((0, 2))
        tp = (total + wanted - apart) / 2
        index = (tp + smooth) / (tp + alpha * (total - tp) + beta * (wanted - tp) + smooth).clamp_min(eps)
        each = (-index.clamp_min(eps).log() if log_loss else 1 - index) * (wanted > 0)
        w = torch.ones_like(each) if class_weights is None else torch.tensor(class_weights).to(each)
        if classes is not None:
            each, w = each[classes], w[classes]
        return ((each * w).sum() / w.sum()) ** gamma

    return loss


@pytest.mark.parametrize("name", ["TverskyLoss", "DiceLoss", "JaccardLoss"])
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "multiclass"},
        {"mode": "multiclass", "ignore_index": 255, "smooth": 1.0},
        {"mode": "multiclass", "classes": [1, 3], "log_loss": True},
        {"mode": "multiclass", "class_weights": [0.5, 1.0, 2.0, 3.0], "gamma": 1.5},
        {"mode": "multilabel"},
        {"mode": "multilabel", "ignore_index": 2},
        {"mode": "binary"},
        {"mode": "binary", "ignore_index": 255},
        {"mode": "multilabel", "from_logits": False},
    ],
    ids=str,
)
def test_smp(name, options):
    options = dict(options)
    if name != "TverskyLoss":
        options.pop("gamma", None)
    fixed = {"TverskyLoss": {"alpha": 0.3, "beta": 0.7}, "DiceLoss": {}, "JaccardLoss": {"alpha": 1.0, "beta": 1.0}}

    def formula(**o):
        return smp_formula(**{**fixed[name], **o})

    theirs = theirs_or("segmentation_models_pytorch.losses", name, formula)
    options |= fixed[name] if name == "TverskyLoss" else {}
    logits, target = inputs(3, 4, SPACE[:2], torch.float64)
    target[target == 2] = 0  # a class that is absent
    if options["mode"] == "multilabel":
        target = (torch.rand(3, 4, *SPACE[:2]) < 0.4).long()
        target[:, 2] = 0
        target[:, 0, 1] = options.get("ignore_index", 0)
    elif options["mode"] == "binary":
        logits, target = logits[:, :1].contiguous(), (target > 0).long()
    if options.get("ignore_index") == 255:
        target[:, 1] = 255
    logits = logits.sigmoid() if options.get("from_logits") is False else logits
    check(getattr(tk.compat.smp, name)(**options), theirs(**options), logits, target, rtol=1e-6)


def test_smp_errors():
    smp = tk.compat.smp
    for kind in (ValueError, AssertionError):  # ours, and theirs
        with pytest.raises(kind, match="mode: expected one of 'binary'"):
            smp.DiceLoss("ternary")
        with pytest.raises(kind, match="classes, class_weights: expected None with mode='binary'"):
            smp.DiceLoss("binary", classes=[0])
        with pytest.raises(kind, match="y_true: expected 2 samples as y_pred has, got 1"):
            smp.DiceLoss(smp.MULTICLASS_MODE)(torch.randn(2, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="colour"):
        smp.JaccardLoss("binary", colour=1)
    with pytest.raises(ValueError, match="ignore_index: expected None with mode='multilabel'"):
        smp.FocalLoss(smp.MULTILABEL_MODE, ignore_index=255)
    with pytest.raises(ValueError, match="target: expected labels in \\[0, 1\\), got 1"):
        smp.DiceLoss("multiclass")(torch.randn(1, 1, 2, 2), torch.tensor([[[0, 1], [255, 0]]]))


def test_smp_takes_labels_as_floats_and_one_class():
    smp = tk.compat.smp
    logits, target = inputs(2, 3, SPACE[:2], torch.float64)
    target[:, 1] = 255
    loss = smp.TverskyLoss("multiclass", ignore_index=255)
    assert torch.equal(loss(logits, target.double()), loss(logits, target))
    # One class of a softmax is certain: half of the counted voxels have it.
    target = torch.tensor([[[0, 255], [0, 0]]])
    z = torch.randn(1, 1, 2, 2, requires_grad=True)
    loss = smp.DiceLoss("multiclass", ignore_index=255)(z, target)
    assert loss.item() == 0.0
    loss.backward()
    assert not z.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_smp_has_the_predictions_dtype(dtype):
    smp, target = tk.compat.smp, torch.randint(0, 3, (2, 4, 5))
    logits = torch.randn(2, 3, 4, 5, dtype=dtype, requires_grad=True)
    for loss in (smp.TverskyLoss("multiclass", gamma=0.75), smp.FocalLoss("multiclass")):
        assert loss(logits, target).dtype == dtype
    assert smp.MCCLoss()(logits[:, :1].sigmoid(), (target > 0).long()).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert smp.DiceLoss("multiclass")(logits, target).dtype == (dtype if dtype.itemsize > 2 else torch.float32)


def test_smp_power_of_a_loss_of_0_has_the_gradient_0():
    z = torch.randn(2, 1, 4, 4, requires_grad=True)
    tk.compat.smp.TverskyLoss("binary", gamma=0.75)(z, torch.zeros(2, 4, 4)).backward()  # nothing is there
    assert not z.grad.any()


# ---- kornia


def test_kornia_errors():
    kornia, (logits, target) = tk.compat.kornia, inputs(2, 3, SPACE)
    with pytest.raises(ValueError, match="average: expected one of 'micro', 'macro', got 'weighted'"):
        kornia.dice_loss(logits, target, average="weighted")
    with pytest.raises(ValueError, match="weight: expected a tensor of 3 numbers"):
        kornia.dice_loss(logits, target, weight=torch.ones(2))
    with pytest.raises(ValueError, match="target: expected labels in"):
        kornia.tversky_loss(logits, target + 7, 0.3, 0.7)
    with pytest.raises(ValueError, match="alpha: expected a finite number >= 0, got -1"):
        kornia.TverskyLoss(-1, 1)
    with pytest.raises(ValueError, match=r"target: expected \(2, \*\(6, 5, 4\)\)"):
        kornia.tversky_loss(logits[:, :1], target[:1], 0.3, 0.7)


def test_kornia_of_a_sample_that_is_ignored_is_1():
    kornia, (logits, target) = tk.compat.kornia, inputs(2, 3, SPACE)
    target[0] = -100
    alone = kornia.tversky_loss(logits[1:], target[1:], 0.3, 0.7)
    both = kornia.tversky_loss(logits, target, 0.3, 0.7)
    assert both.item() == pytest.approx((1 + alone.item()) / 2, rel=1e-6)


# ---- nnU-Net


def softmax_helper_dim1(x):
    return torch.softmax(x, 1)


def nnunet_dice_formula(apply_nonlin=None, batch_dice=False, do_bg=True, smooth=1.0, ddp=True):
    def loss(z, t, loss_mask=None):
        p = z if apply_nonlin is None else apply_nonlin(z)
        t = t[:, None] if t.dim() != z.dim() else t
        g = t.to(p.dtype) if t.shape == z.shape else one_hot(t[:, 0].long(), z.size(1)).to(p.dtype)
        w = torch.ones_like(p) if loss_mask is None else loss_mask
        axes = tuple(range(2, z.dim()))
        both, total = (p * g * w).sum(axes), ((p + g) * w).sum(axes)
        if not do_bg:
            both, total = both[:, 1:], total[:, 1:]
        if batch_dice:
            both, total = both.sum(0), total.sum(0)
        return -((2 * both + smooth) / (total + smooth).clamp_min(1e-8)).mean()

    return loss


def nnunet_ce_formula(soft_dice_kwargs, ce_kwargs, weight_ce=1, weight_dice=1, ignore_label=None, dice_class=None):
    def loss(z, t):
        mask = torch.ones_like(t, dtype=torch.bool) if ignore_label is None else t != ignore_label
        dice = nnunet_dice_formula(softmax_helper_dim1, **soft_dice_kwargs)
        options = dict(ce_kwargs) | ({} if ignore_label is None else {"ignore_index": ignore_label})
        ce = torch.nn.functional.cross_entropy(z, t[:, 0].long(), **options) if mask.any() else 0.0
        return weight_ce * ce + weight_dice * dice(z, torch.where(mask, t, 0), mask)

    return loss


def nnunet_bce_formula(bce_kwargs, soft_dice_kwargs, weight_ce=1, weight_dice=1, use_ignore_label=False,
                       dice_class=None):  # fmt: skip
    def loss(z, t):
        mask = (1 - t[:, -1:].to(z.dtype)) if use_ignore_label else None
        g = (t[:, :-1] if use_ignore_label else t).to(z.dtype)
        ce = torch.nn.functional.binary_cross_entropy_with_logits(z, g, reduction="none")
        ce = ce.mean() if mask is None else (ce * mask).sum() / mask.sum().clip(min=1e-8)
        return weight_ce * ce + weight_dice * nnunet_dice_formula(torch.sigmoid, **soft_dice_kwargs)(z, g, mask)

    return loss


DICE = "nnunetv2.training.loss.dice"
COMPOUND = "nnunetv2.training.loss.compound_losses"
DICE_OPTIONS = [
    {},
    {"batch_dice": True, "do_bg": False, "smooth": 1e-5, "ddp": False},
    {"smooth": 0.0, "batch_dice": True, "ddp": False},
]


@pytest.mark.parametrize("options", DICE_OPTIONS, ids=str)
@pytest.mark.parametrize("nonlinearity", [softmax_helper_dim1, torch.sigmoid, None, torch.tanh])
@pytest.mark.parametrize("masked", [False, True])
def test_nnunet_dice(options, nonlinearity, masked):
    theirs = theirs_or(DICE, "MemoryEfficientSoftDiceLoss", nnunet_dice_formula)
    logits, target = inputs(2, 4, SPACE, torch.float64)
    mask = (torch.rand(2, 1, *SPACE) < 0.7,) if masked else ()
    ours = tk.compat.nnunet.MemoryEfficientSoftDiceLoss(nonlinearity, **options)
    logits = logits.sigmoid() if nonlinearity is None else logits
    for t in (target, target[:, None].float(), one_hot(target, 4)):
        check(ours, theirs(nonlinearity, **options), logits, t, *mask, rtol=1e-6)


@pytest.mark.parametrize("dice", DICE_OPTIONS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_ce": 0.5, "weight_dice": 2.0},
        {"ignore_label": 3},
        {"ce_kwargs": {"weight": torch.tensor([0.5, 1.0, 2.0, 3.0]).double(), "label_smoothing": 0.1}},
    ],
    ids=str,
)
def test_nnunet_dice_and_ce(dice, options):
    options = {"ce_kwargs": {}, **options}
    logits, target = inputs(2, 4, SPACE, torch.float64)
    ours = tk.compat.nnunet.DC_and_CE_loss(dice, **options)
    dice_class = theirs_or(DICE, "MemoryEfficientSoftDiceLoss", None)
    theirs = theirs_or(COMPOUND, "DC_and_CE_loss", nnunet_ce_formula)(
        dice, **{**options, "ce_kwargs": dict(options["ce_kwargs"])}, dice_class=dice_class
    )
    for t in (target[:, None], target[:, None].float(), target[:, None].to(torch.int16)):
        check(ours, theirs, logits, t, rtol=1e-6)
    if options.get("ignore_label"):
        check(ours, theirs, logits, torch.full_like(target, 3)[:, None], rtol=1e-6)


@pytest.mark.parametrize("dice", DICE_OPTIONS, ids=str)
@pytest.mark.parametrize("ignored", [False, True])
def test_nnunet_dice_and_bce(dice, ignored):
    logits, _ = inputs(2, 3, SPACE, torch.float64)
    target = (torch.rand(2, 3 + ignored, *SPACE) < 0.4).to(torch.uint8)
    ours = tk.compat.nnunet.DC_and_BCE_loss({}, dice, 0.5, 2.0, use_ignore_label=ignored)
    theirs = theirs_or(COMPOUND, "DC_and_BCE_loss", nnunet_bce_formula)
    # Its sum is a difference, in float32, and may be nearly 0.
    check(ours, theirs({}, dice, 0.5, 2.0, use_ignore_label=ignored), logits, target, rtol=1e-6, atol=5e-7)


def nnunet_trainer(name, regions, ignored, network=None):
    """A trainer without a data set, which knows what its loss needs."""
    from types import SimpleNamespace

    trainer = getattr(tk.compat.nnunet, name) if isinstance(name, str) else name
    made = object.__new__(trainer)
    made.label_manager = SimpleNamespace(
        has_regions=regions, ignore_label=ignored, has_ignore_label=ignored is not None, num_segmentation_heads=3,
        all_labels=[0, 1, 2], foreground_regions=[(1, 2), (2,), 1],
    )  # fmt: skip
    made.configuration_manager = SimpleNamespace(batch_dice=True)
    made.is_ddp, made.enable_deep_supervision, made.network = False, True, network
    made._do_i_compile = lambda: False
    made._get_deep_supervision_scales = lambda: [1, 0.5, 0.25]
    return made


def nnunet_or_skip():
    reason = "nnunetv2 is not installed: it needs torchvision, an environment of its own (make test-peers)"
    pytest.importorskip("nnunetv2", reason=reason, exc_type=ImportError)


def test_nnunet_trainer():
    nnunet_or_skip()
    import numpy as np

    for regions, ignored in ((False, None), (False, 3), (True, None), (True, 3)):
        trainer = nnunet_trainer("nnUNetTrainerTverskyKernels", regions, ignored)
        ours, theirs = trainer._build_loss(), type(trainer).__mro__[1]._build_loss(trainer)
        np.testing.assert_allclose(ours.weight_factors, theirs.weight_factors)
        logits = [inputs(2, 3, (s, s), seed=s)[0] for s in (8, 4, 2)]
        if regions:
            target = [(torch.rand(2, 3 + (ignored is not None), *z.shape[2:]) < 0.4).float() for z in logits]
        else:
            target = [torch.randint(0, 3, (2, 1, *z.shape[2:])) for z in logits]
        torch.testing.assert_close(ours(logits, target), theirs(logits, target), rtol=1e-5, atol=1e-6)
        # With the last layer within: the first output is that layer's input while it trains.
        head = torch.nn.Conv2d(4, 3, 1)
        network = torch.nn.Module()
        network.decoder = torch.nn.Module()
        network.decoder.seg_layers = torch.nn.ModuleList([torch.nn.Conv2d(8, 3, 1), head])
        features = torch.randn(2, 4, 8, 8)
        with torch.no_grad():
            logits[0] = head(features)
        within = nnunet_trainer("nnUNetTrainerTverskyKernels_Head", regions, ignored, network)._build_loss()
        assert head(features) is features
        value = within([head(features), *logits[1:]], target)
        torch.testing.assert_close(value, theirs(logits, target), rtol=1e-5, atol=1e-6)
        value.backward()
        assert head.weight.grad.any()
        head.eval()
        torch.testing.assert_close(within([head(features), *logits[1:]], target), value, rtol=1e-5, atol=1e-6)


def test_nnunet_trainers_by_name():
    nnunet_or_skip()
    from types import SimpleNamespace

    import numpy as np

    from tversky_kernels.compat._trainer_names import FAMILY

    assert len(FAMILY) == 6 * 3 * 2 * 2
    for name in FAMILY:
        assert getattr(tk.compat.nnunet, name).__name__ == name
        assert getattr(tk.compat.nnunet, name) is getattr(tk.compat.nnunet, name)
    trainer = nnunet_trainer("nnUNetTrainerTverskyCE_2_8_Sample_Weighted", False, None)
    cases = {"a": np.array([[[[-1, 0, 0, 0], [1, 1, 2, 0]]]]), "b": np.array([[[[0, 0, 1, 2]]]])}
    dataset = SimpleNamespace(identifiers=list(cases), load_case=lambda case: (None, cases[case], None, {}))
    trainer.get_tr_and_val_datasets = lambda: (dataset, None)
    loss = trainer._build_loss()
    share = np.array([1 / 7, 1 / 3, 1 / 2])
    np.testing.assert_allclose(loss.options["ce_class_weight"], share / share.mean())
    assert (loss.options["alpha"], loss.options["beta"], loss.options["batch"]) == (0.2, 0.8, False)
    assert not loss.options["include_background"]
    trainer = nnunet_trainer("nnUNetTrainerFocalTversky_Weighted", True, None)
    trainer.get_tr_and_val_datasets = lambda: (dataset, None)
    loss = trainer._build_loss()
    share = np.array([1 / 5, 1 / 2, 1 / 3])  # of the regions (1, 2), 2 and 1
    np.testing.assert_allclose(loss.options["class_weight"], share / share.mean())
    assert (loss.options["gamma"], loss.options["batch"]) == (0.75, True)
    no_head = nnunet_trainer("nnUNetTrainerTversky_3_7_Head", False, None, torch.nn.Conv2d(1, 3, 1))
    with pytest.raises(RuntimeError, match="take the trainer without _Head"):
        no_head._build_loss()


def test_nnunet_finds_the_trainers(tmp_path, capsys):
    nnunet = tk.compat.nnunet
    nnunet.main(["--install", str(tmp_path / "trainers")])
    assert "nnUNet_extTrainer=" in capsys.readouterr().out
    (file,) = (tmp_path / "trainers").iterdir()
    nnunet.main(["--install", str(tmp_path / "trainers")])  # once more changes nothing
    file.write_text("mine")
    with pytest.raises(SystemExit):
        nnunet.main(["--install", str(tmp_path / "trainers")])
    assert file.read_text() == "mine"
    assert "was not written by this command" in capsys.readouterr().err
    nnunet.main(["--list"])
    assert "nnUNetTrainerTversky_2_8_Batch_Head" in capsys.readouterr().out.split()


def test_nnunet_finds_the_trainers_itself(tmp_path, monkeypatch):
    nnunet_or_skip()
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    tk.compat.nnunet.main(["--install", str(tmp_path)])
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    name = "nnUNetTrainerTversky_3_7_Batch"
    assert recursive_find_trainer_class_by_name(name) is getattr(tk.compat.nnunet, name)
    with pytest.raises(RuntimeError, match="Could not find"):
        recursive_find_trainer_class_by_name("nnUNetTrainerTversky_9_9")


def test_nnunet_levels():
    levels = tk.compat.nnunet.LevelsLoss({}, weights=[1.0, 0.0])
    with pytest.raises(ValueError, match="output: expected 2 levels, got 1 and 2 targets"):
        levels([torch.zeros(1, 2, 4)], [torch.zeros(1, 1, 4)] * 2)
    logits, target = inputs(2, 3, SPACE)
    alone = tk.compat.nnunet.LevelsLoss({"alpha": 0.3, "beta": 0.7, "ce_weight": 2.0}, ignore_label=1)
    expected = tk.tversky_ce_loss(logits, target, alpha=0.3, beta=0.7, ce_weight=2.0, ignore_index=1)
    assert torch.equal(alone(logits, target[:, None].float()), expected)


def test_nnunet_errors():
    nnunet = tk.compat.nnunet
    with pytest.raises(TypeError, match="ce_kwargs: expected weight and label_smoothing, got 'colour'"):
        nnunet.DC_and_CE_loss({}, {"colour": 1})
    with pytest.raises(TypeError, match="bce_kwargs: expected none, got 'weight'"):
        nnunet.DC_and_BCE_loss({"weight": 1}, {})
    with pytest.raises(AttributeError, match="has no attribute 'DC_and_topk_loss'"):
        _ = nnunet.DC_and_topk_loss


WEIGHTINGS = [{}, {"weight_mode": "same"}, {"weight_mode": "two"}, {"weights": [3.0, 0.5, 0.2]}]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("interp_mode", ["nearest-exact", "nearest"])
def test_monai_deep_supervision(weighting, interp_mode):
    losses = pytest.importorskip("monai.losses")
    options = {"softmax": True, "to_onehot_y": True}
    theirs = losses.DeepSupervisionLoss(losses.DiceCELoss(**options), **weighting)
    ours = tk.compat.monai.DeepSupervisionLoss(tk.compat.monai.DiceCELoss(**options), **weighting)
    assert ours.interp_mode == theirs.interp_mode == "nearest-exact"
    ours.interp_mode = theirs.interp_mode = interp_mode
    levels = [inputs(2, 3, shape)[0].requires_grad_() for shape in ((12, 9, 8), (6, 5, 4), (3, 2, 2))]
    target = inputs(2, 3, (12, 9, 8))[1][:, None]
    expected, found = theirs(levels, target.float()), ours(levels, target)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(x, levels) for x in (found, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours(levels[0], target), theirs(levels[0], target))
    ours.interp_mode = "trilinear"
    with pytest.raises(ValueError, match="interp_mode: expected one of 'nearest-exact', 'nearest', got 'trilinear'"):
        ours(levels, target)


OF_COUNTS = [
    {"softmax": True, "to_onehot_y": True},
    {"softmax": True, "to_onehot_y": True, "include_background": False, "batch": True, "reduction": "sum"},
    {"sigmoid": True, "dense": True, "reduction": "none"},
    {"sigmoid": True, "dense": True, "reduction": "none", "batch": True},
    {"tanh": True, "to_onehot_y": True, "smooth_nr": 0.1, "smooth_dr": 0.2},
]


@pytest.mark.parametrize("options", OF_COUNTS, ids=str)
@pytest.mark.parametrize("name", ["square", "simple", "uniform", "soft", "MCCLoss", "GeneralizedDiceFocalLoss"])
def test_monai_losses_of_counts(name, options):
    losses = pytest.importorskip("monai.losses")
    options = dict(options)
    logits, target = inputs(2, 4, SPACE, torch.float64)
    logits = logits.float().double()
    target[0] = target[0].clamp(max=2)  # a class that one sample lacks
    if options.pop("tanh", False):
        options["other_act"] = torch.tanh
    target = target[:, None]
    if options.pop("dense", False):
        target = one_hot(target[:, 0], 4).double()
    kind = name if name.endswith("Loss") else "GeneralizedDiceLoss"
    if name == "soft":
        options["soft_label"] = True
    elif kind == "GeneralizedDiceLoss":
        options["w_type"] = name
    elif kind == "GeneralizedDiceFocalLoss":
        options |= {"lambda_gdl": 0.5, "lambda_focal": 2.0}
    ours, theirs = getattr(tk.compat.monai, kind)(**options), getattr(losses, kind)(**options)
    if "other_act" in options and (name == "soft" or kind == "MCCLoss"):
        return  # probabilities below 0: see docs/migration.md
    assert ours(logits, target).shape == theirs(logits, target).shape
    ours_of, theirs_of = ((lambda z, t, f=f: f(z, t).sum()) for f in (ours, theirs))
    loss, gradient = loss_and_gradient(ours_of, logits, target)
    expected = loss_and_gradient(theirs_of, logits, target)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [{"softmax": True, "to_onehot_y": True}, {"sigmoid": True}, {}], ids=str)
def test_monai_masked_losses(options):
    losses = pytest.importorskip("monai.losses")
    logits, target = inputs(2, 4, SPACE, torch.float64)
    target = target[:, None] if options.get("to_onehot_y") else one_hot(target, 4).double()
    for mask in ((torch.rand(2, 1, *SPACE) < 0.7).double(), (torch.rand(1, 1, *SPACE) < 0.7).double()):
        ours, theirs = tk.compat.monai.MaskedDiceLoss(**options), losses.MaskedDiceLoss(**options)
        check(ours, theirs, logits, target, mask, rtol=1e-6)
        ours = tk.compat.monai.MaskedLoss(tk.compat.monai.TverskyLoss, **options)
        theirs = losses.MaskedLoss(losses.TverskyLoss, **options)
        check(ours, theirs, logits, target, mask, rtol=1e-6)
    with pytest.raises(ValueError, match=r"mask: for an input \(2, 4, 6, 5, 4\) expected \(1 or 2, 1, \*spatial\)"):
        ours(logits, target, mask.expand(1, 3, *SPACE))
    with pytest.warns(UserWarning, match="No mask value specified"):
        ours(logits, target)


def test_monai_aliases():
    losses = pytest.importorskip("monai.losses")
    for name in ("Dice", "dice_ce", "dice_focal", "generalized_dice", "generalized_dice_focal"):
        assert getattr(tk.compat.monai, name).__name__ == getattr(losses, name).__name__
