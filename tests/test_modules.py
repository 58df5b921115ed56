from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from common import inputs

import tversky_kernels as tk

LOGITS, TARGET = inputs(2, 3, (4, 5))

PAIRS = [
    (tk.TverskyLoss, tk.tversky_loss, {"alpha": 0.2, "beta": 0.8, "gamma": 0.75}),
    (tk.DiceLoss, tk.dice_loss, {"batch": True, "smooth_nr": 0.0}),
    (tk.JaccardLoss, tk.jaccard_loss, {"include_background": False}),
    (tk.FocalTverskyLoss, tk.focal_tversky_loss, {"class_weight": [1, 2, 3]}),
    (tk.FocalTverskyLoss, tk.focal_tversky_loss, {"gamma": 2.0}),
]


@pytest.mark.parametrize(("module", "function", "options"), PAIRS)
def test_module_is_the_function(module, function, options):
    weight = torch.rand(2, 4, 5)
    criterion = module(**options)
    assert torch.equal(criterion(LOGITS, TARGET), function(LOGITS, TARGET, **options))
    assert torch.equal(
        criterion(LOGITS, TARGET, voxel_weight=weight), function(LOGITS, TARGET, voxel_weight=weight, **options)
    )
    for again in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(again(LOGITS, TARGET), criterion(LOGITS, TARGET))
    assert criterion.state_dict() == {}
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(criterion)


def test_names_are_thin():
    same = tk.tversky_loss
    assert torch.equal(tk.dice_loss(LOGITS, TARGET), same(LOGITS, TARGET, alpha=0.5, beta=0.5))
    assert torch.equal(tk.jaccard_loss(LOGITS, TARGET), same(LOGITS, TARGET, alpha=1.0, beta=1.0))
    assert torch.equal(tk.focal_tversky_loss(LOGITS, TARGET), same(LOGITS, TARGET, gamma=0.75))


def test_tensors_move_with_the_module():
    criterion = tk.TverskyLoss(class_weight=torch.tensor([1.0, 2.0, 3.0]))
    assert dict(criterion.named_buffers()).keys() == {"class_weight"}
    assert criterion.to("meta").class_weight.device.type == "meta"


#: Every option of every module, and another value for it than its default.
OTHER = {
    "alpha": 0.9, "beta": 0.2, "gamma": 2.0, "smooth_nr": 0.5, "smooth_dr": 0.5, "activation": "sigmoid",
    "class_weight": [1.0, 2.0, 3.0], "include_background": False, "ignore_index": 1, "batch": True, "absent": "skip",
    "soft_label": True, "squared": True, "reduction": "sum", "tversky_weight": 0.3, "ce_weight": 0.3,
    "ce_class_weight": [1.0, 2.0, 3.0], "label_smoothing": 0.2, "focal_gamma": 2.0, "weight": "simple",
    "weights": [1.0, 0.5], "resample": "nearest-exact", "loss": "tversky_ce",
}  # fmt: skip
RUN = {"process_group": None, "sample_group": None, "grad_reduction": "sum", "inplace_backward": True}
RUN |= {"check_target": False, "backend": "reference", "num_regions": 7}  # of calls with regions
MODULES = {
    "TverskyLoss": (tk.TverskyLoss, {}),
    "DiceLoss": (tk.DiceLoss, {}),
    "JaccardLoss": (tk.JaccardLoss, {}),
    "FocalTverskyLoss": (tk.FocalTverskyLoss, {}),
    "TverskyCELoss": (tk.TverskyCELoss, {}),
    "GeneralizedDiceLoss": (tk.GeneralizedDiceLoss, {}),
    "DeepSupervisionLoss": (tk.DeepSupervisionLoss, {"loss": "tversky_ce"}),
    "TverskyHead": (lambda **o: tk.TverskyHead(4, 3, dimensions=2, **o), {"loss": "tversky_ce"}),
}


def call(criterion, seed=0):
    torch.manual_seed(seed)
    _, target = inputs(2, 3, (4, 5))
    target[:, 0] = 0
    target[1] = target[1].clamp(max=1)
    if isinstance(criterion, tk.TverskyHead):
        torch.nn.init.normal_(criterion.weight)
        torch.nn.init.normal_(criterion.bias)
        return criterion(torch.randn(2, 4, 4, 5), target)
    if isinstance(criterion, tk.DeepSupervisionLoss):
        return criterion([torch.randn(2, 3, 4, 5), torch.randn(2, 3, 1, 2)], target)
    return criterion(torch.randn(2, 3, 4, 5), target)


@pytest.mark.parametrize("name", list(MODULES))
def test_every_option_takes_effect_when_it_is_set(name):
    make, fixed = MODULES[name]
    options = [o for o in make()._options if o not in ("dimensions",)]
    assert {"reduction", "smooth_nr", "backend", "check_target"} <= set(options)
    for option in options:
        base = dict(fixed)
        if option == "squared":
            base.update({} if name in ("DiceLoss", "JaccardLoss") else {"alpha": 0.5, "beta": 0.5})
        if option in ("focal_gamma", "label_smoothing", "ce_class_weight"):
            base.update(ce_weight=1.0)
        value = RUN[option] if option in RUN else OTHER[option]
        if option == "loss":
            base.pop("loss", None)
        given, late = make(**base, **{option: value}), make(**base)
        before = call(late)
        setattr(late, option, value)
        assert getattr(late, option) == value
        assert torch.equal(call(late), call(given)), option
        if option not in (*RUN, "soft_label"):  # of labels that form is the same
            assert not torch.equal(call(late), before), option
        again = pickle.loads(pickle.dumps(late))
        assert torch.equal(call(again), call(late))
        assert f"{option}=" in repr(late)


@pytest.mark.parametrize("name", list(MODULES))
def test_what_is_set_is_checked(name):
    criterion = MODULES[name][0](**MODULES[name][1])
    for option, value, message in (
        ("smooth_nr", -1.0, "smooth_nr: expected"),
        ("reduction", "none at all", "reduction: expected"),
        ("backend", "gpu", "backend: expected"),
    ):
        good = getattr(criterion, option)
        with pytest.raises(ValueError, match=message):
            setattr(criterion, option, value)
        assert getattr(criterion, option) == good
        with pytest.raises(ValueError, match=message):
            MODULES[name][0](**{**MODULES[name][1], option: value})
    call(criterion)


@pytest.mark.parametrize("name", list(MODULES))
def test_signatures_show_the_options(name):
    make, options = MODULES[name]
    parameters = inspect.signature(type(make(**options))).parameters
    assert set(options) <= set(parameters)
    for option in ("reduction", "batch", "backend", "sample_group", "inplace_backward"):
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[option].default == getattr(make(**options), option)
    assert not {"logits", "target", "voxel_weight", "options"} & set(parameters)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"alpha": [0.1, -0.2]}, ValueError, r"alpha\[1\]: expected a finite number >= 0, got -0.2"),
        ({"alpha": torch.tensor([0.1, float("nan")])}, ValueError, r"alpha\[1\]: expected a finite number"),
        (
            {"class_weight": torch.ones(2, 2)},
            TypeError,
            "class_weight: expected a number, or one a class",
        ),
        ({"gamma": torch.ones(2)}, TypeError, "gamma: expected a number or a 0-d tensor"),
        ({"gamma": torch.zeros(())}, ValueError, "gamma: expected a finite number > 0"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an integer or None"),
        ({"check_target": "yes"}, TypeError, "check_target: expected None, True or False"),
        ({"squared": True}, ValueError, "squared: expected alpha and beta to be one number, got 0.3 and 0.7"),
        ({"squared": True, "alpha": 0.5, "beta": 0.5, "soft_label": True}, ValueError, "squared: expected False with"),
        ({"grad_reduction": "average"}, ValueError, "grad_reduction: expected one of 'mean', 'sum'"),
    ],
    ids=str,
)
def test_options_are_checked_when_a_module_is_made(options, kind, message):
    with pytest.raises(kind, match=message):
        tk.TverskyLoss(**options)


def test_repr_is_short():
    criterion = tk.TverskyLoss(alpha=[0.1] * 118, class_weight=torch.ones(118), gamma=0.75)
    assert repr(criterion) == "TverskyLoss(alpha=[0.1, 0.1, 0.1, ...118], class_weight=tensor of 118, gamma=0.75)"


def test_what_may_not_be_together_is_known_when_a_module_is_made():
    with pytest.raises(ValueError, match="activation: expected 'softmax' or 'sigmoid' for a cross-entropy"):
        tk.TverskyCELoss(activation="none")
    tk.TverskyCELoss(activation="none", ce_weight=0.0)
    tk.DeepSupervisionLoss(activation="none")
    with pytest.raises(ValueError, match="activation: expected 'softmax' or 'sigmoid' for a cross-entropy"):
        tk.DeepSupervisionLoss(loss="tversky_ce", activation="none")
    tk.DiceLoss(squared=True)
    # Without reading a tensor that has no values, or whose gradient is wanted.
    tk.TverskyLoss(alpha=torch.ones(3, device="meta"), gamma=torch.nn.Parameter(torch.ones(())))


def test_a_schedule():
    criterion = tk.TverskyCELoss(alpha=0.3)
    for ce_weight in (1.0, 0.5, 0.0):
        criterion.ce_weight = ce_weight
        assert torch.equal(criterion(LOGITS, TARGET), tk.tversky_ce_loss(LOGITS, TARGET, ce_weight=ce_weight))


def weighted():
    w = torch.tensor([0.5, 1.0, 2.0])
    monai, nnunet, smp = tk.compat.monai, tk.compat.nnunet, tk.compat.smp
    return {
        "TverskyLoss": lambda: tk.TverskyLoss(class_weight=w.clone()),
        "alpha": lambda: tk.TverskyLoss(alpha=w.clone() / 3, beta=0.5),
        "TverskyCELoss": lambda: tk.TverskyCELoss(ce_class_weight=w.clone()),
        "TverskyHead": lambda: tk.TverskyHead(4, 3, dimensions=2, class_weight=w.clone()),
        "DeepSupervisionLoss": lambda: tk.DeepSupervisionLoss(weights=torch.tensor([1.0, 0.5]), class_weight=w.clone()),
        "monai.DiceLoss": lambda: monai.DiceLoss(softmax=True, to_onehot_y=True, weight=w.clone()),
        "monai.DiceCELoss": lambda: monai.DiceCELoss(softmax=True, to_onehot_y=True, weight=w.clone()),
        "monai.DiceFocalLoss": lambda: monai.DiceFocalLoss(softmax=True, to_onehot_y=True, weight=w.clone()),
        "nnunet.DC_and_CE_loss": lambda: nnunet.DC_and_CE_loss({}, {"weight": w.clone()}),
        "smp.TverskyLoss": lambda: smp.TverskyLoss("multiclass", class_weights=[0.5, 1.0, 2.0], classes=[0, 2]),
        "smp.FocalLoss": lambda: smp.FocalLoss("multiclass", class_weights=[0.5, 1.0, 2.0]),
        "kornia.DiceLoss": lambda: tk.compat.kornia.DiceLoss(weight=w.clone()),
    }


@pytest.mark.parametrize("name", list(weighted()))
def test_class_weights_come_back_from_a_checkpoint(name):
    """Also where a module is made without memory and gets it later; what is not in the checkpoint is an error."""

    def value(criterion):
        if name.startswith(("monai", "nnunet")):
            return criterion(LOGITS, TARGET[:, None])
        return criterion(LOGITS, TARGET) if name.startswith(("smp", "kornia")) else call(criterion)

    original = weighted()[name]()
    expected, state = value(original), original.state_dict()
    assert state
    with torch.device("meta"):
        again = weighted()[name]()
    again = again.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for x in (*again.buffers(), *again.parameters()):
            x.fill_(77)
    again.load_state_dict(state, strict=True)
    assert torch.equal(value(again), expected)
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict({}, strict=True)


def test_what_was_a_tensor_may_become_a_number_and_the_other_way():
    criterion = tk.TverskyLoss(class_weight=[1.0, 2.0, 3.0])
    expected = criterion(LOGITS, TARGET)
    criterion.class_weight = torch.tensor([1.0, 2.0, 3.0])
    assert "class_weight" in criterion.state_dict()
    assert torch.equal(criterion(LOGITS, TARGET), expected)
    criterion.class_weight = None
    assert criterion.state_dict() == {}
    assert torch.equal(criterion(LOGITS, TARGET), tk.tversky_loss(LOGITS, TARGET))
    criterion.alpha = torch.nn.Parameter(torch.tensor(0.3))
    criterion(LOGITS, TARGET).backward()
    assert criterion.alpha.grad is not None
    criterion.alpha = 0.3
    assert list(criterion.parameters()) == []


@pytest.mark.parametrize("name", ["monai.TverskyLoss", "monai.DiceLoss", "monai.DiceCELoss", "monai.DiceFocalLoss"])
def test_options_of_monais_names_take_effect_when_they_are_set(name):
    make = getattr(tk.compat.monai, name.split(".")[1])
    fixed = {"to_onehot_y": True, "softmax": True}
    other = {
        "include_background": False, "softmax": False, "reduction": "sum", "smooth_nr": 0.5, "smooth_dr": 0.5,
        "batch": True, "alpha": 0.9, "beta": 0.1, "squared_pred": True, "jaccard": True, "lambda_dice": 0.3,
        "lambda_ce": 0.2, "lambda_focal": 0.2, "gamma": 1.0, "label_smoothing": 0.2, "backend": "reference",
        "inplace_backward": True,
    }  # fmt: skip
    for option, value in other.items():
        try:
            given = make(**{**fixed, option: value})
        except (TypeError, ValueError):
            assert option in ("alpha", "beta", "squared_pred", "jaccard") or option.startswith(
                ("lambda", "gamma", "label")
            )
            continue
        late = make(**fixed)
        setattr(late, option, value)
        logits = LOGITS.clone().requires_grad_() * 1
        logits = logits.softmax(1) if option == "softmax" else logits
        assert torch.equal(late(logits, TARGET[:, None]), given(logits, TARGET[:, None])), option


def test_unknown_and_fixed_arguments():
    with pytest.raises(TypeError, match="TverskyLoss: unexpected argument 'colour'"):
        tk.TverskyLoss(colour=1)
    with pytest.raises(TypeError, match="DiceLoss: unexpected argument 'alpha'"):
        tk.DiceLoss(alpha=0.3)
    with pytest.raises(TypeError, match="TverskyLoss: unexpected argument 'logits'"):
        tk.TverskyLoss(logits=LOGITS)
    with pytest.raises(TypeError, match="alpha"):
        tk.dice_loss(LOGITS, TARGET, alpha=0.3)
