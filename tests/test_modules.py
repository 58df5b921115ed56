from __future__ import annotations

import copy
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


def test_unknown_and_fixed_arguments():
    with pytest.raises(TypeError, match="TverskyLoss: unexpected argument 'colour'"):
        tk.TverskyLoss(colour=1)
    with pytest.raises(TypeError, match="DiceLoss: unexpected argument 'alpha'"):
        tk.DiceLoss(alpha=0.3)
    with pytest.raises(TypeError, match="TverskyLoss: unexpected argument 'logits'"):
        tk.TverskyLoss(logits=LOGITS)
    with pytest.raises(TypeError, match="alpha"):
        tk.dice_loss(LOGITS, TARGET, alpha=0.3)
