"""Our losses under other libraries' names against these libraries, over random configurations: `make test-peers`.

Where a library is not installed that part is skipped. What the libraries gave, for some of the configurations, is in
recorded.json (`python -m peers.record`, in tests/), against which the losses are tested everywhere.
"""

from __future__ import annotations

import importlib
import json
import pathlib

import pytest
import torch

import tversky_kernels as tk
from peers.configurations import DRAWS, levels, other_inputs

CONFIGURATIONS, BLOCK = 500, 50
PACKAGES = {"monai": "monai", "smp": "segmentation_models_pytorch", "kornia": "kornia", "nnunet": "nnunetv2"}
RECORDED = json.loads(pathlib.Path(__file__).with_name("recorded.json").read_text())


def installed(peer):
    try:
        return importlib.import_module(PACKAGES[peer]) is not None
    except (ImportError, RuntimeError):  # torchvision beside a CPU build of torch raises a RuntimeError
        return False


@pytest.mark.parametrize("block", range(0, CONFIGURATIONS, BLOCK))
@pytest.mark.parametrize("peer", DRAWS)
@pytest.mark.filterwarnings("ignore")
def test_random_configurations(peer, block):
    if not installed(peer):
        pytest.skip(f"{PACKAGES[peer]} does not import here: it needs torchvision (make test-peers has an environment)")
    for seed in range(block, block + BLOCK):
        configuration = DRAWS[peer](seed)
        value, gradient = configuration.values(configuration.theirs())
        ours, of_ours = configuration.values(configuration.ours())
        said = f"{peer} {seed}: {configuration.name} {configuration.options} {tuple(configuration.logits.shape)}"
        assert ours.shape == value.shape, said
        if not (value.isfinite().all() and gradient.isfinite().all()):
            # A power below 1 of a loss of 0: theirs has no gradient there, ours the gradient 0.
            assert ours.isfinite().all(), said
            assert of_ours.isfinite().all(), said
            continue
        # They take some of the sums in float32.
        assert (ours - value).abs().max() <= 2e-6 + 2e-5 * value.abs().max(), said
        assert (of_ours - gradient).abs().max() <= 1e-9 + 2e-5 * gradient.abs().max(), said


def summary(value, gradient):
    """A loss and its gradient in five numbers."""
    gradient = gradient.double().flatten()
    along = torch.cos(torch.arange(gradient.numel(), dtype=torch.float64))
    value = value.double().flatten()
    weighted = value @ torch.arange(1, value.numel() + 1, dtype=torch.float64)
    return [x.item() for x in (value.sum(), weighted, gradient @ along, gradient.abs().sum(), gradient.abs().max())]


@pytest.mark.parametrize("peer", RECORDED["losses"])
@pytest.mark.filterwarnings("ignore")
def test_recorded(peer):
    recorded = RECORDED["losses"][peer]
    assert len(recorded) >= 60
    for seed, (name, of_logits, expected) in recorded.items():
        configuration = DRAWS[peer](int(seed))
        assert configuration.name == name
        assert configuration.logits.sum().item() == pytest.approx(of_logits, rel=1e-9, abs=1e-9)
        ours = summary(*configuration.values(configuration.ours()))
        # The sum along a direction may be small by cancellation.
        size = max(abs(x) for x in expected[2:])
        assert ours[:2] == pytest.approx(expected[:2], rel=2e-5, abs=4e-6), (seed, name, configuration.options)
        assert ours[2:] == pytest.approx(expected[2:], rel=1e-4, abs=1e-4 * size + 1e-9), (seed, name)


@pytest.mark.parametrize("seed", RECORDED["levels"])
def test_recorded_losses_of_nnunets_trainer(seed):
    expected = RECORDED["levels"][seed]
    outputs, targets, (regions, ignored, batch) = levels(int(seed))
    weights = [2 / 3, 1 / 3, 0.0]
    smoothing = {"smooth_nr": 5e-6, "smooth_dr": 5e-6}
    options = {"alpha": 0.5, "beta": 0.5, "ce_weight": 1.0, "batch": batch, "include_background": regions, **smoothing}
    if regions and ignored is not None:
        options["ce_weight"] = 3.0
    loss = tk.compat.nnunet.LevelsLoss(options, regions, ignored, weights, offset=-1.0)
    assert loss(outputs, targets).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # The first output as the input of a last layer that is the identity.
    head = torch.nn.Conv2d(3, 3, 1, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        head.bias.zero_()
    with_head = tk.compat.nnunet.LevelsLoss(options, regions, ignored, weights, head, offset=-1.0)
    assert with_head(outputs, targets).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    head.eval()
    head.weight.data.mul_(2)  # not read: in evaluation the first output holds logits
    assert with_head(outputs, targets).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_recorded_losses_of_keras_and_ivadomed():
    expected = RECORDED["others"]
    assert set(expected) == {"keras 1", "keras 3", "ivadomed", "ivadomed focal"}
    # Keras: alpha weighs the false negatives, whatever its words say; one index over all that its axis names.
    logits, target = other_inputs(1)
    keras = {"alpha": 0.7, "beta": 0.2, "smooth_nr": 0.0, "smooth_dr": 1e-7, "batch": True}
    loss = tk.tversky_loss(logits, target, activation="sigmoid", **keras)
    assert loss.item() == pytest.approx(expected["keras 1"], rel=1e-6)
    logits, target = other_inputs(3)
    tp, fp, fn = (x.sum() for x in tk.overlap_counts(logits, target))
    assert (1 - tp / (tp + 0.7 * fp + 0.2 * fn + 1e-7)).item() == pytest.approx(expected["keras 3"], rel=1e-6)
    # ivadomed: over the batch; its Tversky loss is minus the index, its gamma the reciprocal of ours.
    ivadomed = {"alpha": 0.2, "beta": 0.7, "smooth_nr": 1.0, "smooth_dr": 1.0, "batch": True}
    assert tk.tversky_loss(logits, target, **ivadomed).item() - 1 == pytest.approx(expected["ivadomed"], rel=1e-6)
    focal = tk.tversky_loss(logits, target, **ivadomed, gamma=1 / 1.33)
    assert focal.item() == pytest.approx(expected["ivadomed focal"], rel=1e-6)
