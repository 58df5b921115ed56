"""nnU-Net itself with our trainers: plans, two short epochs, validation, prediction. Minutes: `make test-peers`."""

from __future__ import annotations

import math

import pytest

try:
    import nnunetv2  # noqa: F401
except (ImportError, RuntimeError):
    reason = "nnunetv2 does not import here: it needs torchvision (make test-peers has an environment)"
    pytest.skip(reason, allow_module_level=True)

from peers.nnunet_run import run


@pytest.mark.slow
@pytest.mark.parametrize("regions", [False, True])
def test_nnunet_trains_validates_and_predicts(tmp_path, regions):
    ours = [
        "nnUNetTrainerTverskyKernels",
        "nnUNetTrainerTverskyKernels_Head",
        "nnUNetTrainerTversky_2_8_Batch_Weighted",
    ]
    theirs, *done = run(tmp_path, ["nnUNetTrainer", *ours], regions, ignore=regions)
    for of in done:
        assert of["predicted"], of
        assert len(of["train_loss"]) == len(of["val_loss"]) == 2, of
        assert of["train_loss"][1] < of["train_loss"][0], of
        assert math.isfinite(of["dice"]), of
    # The same loss; batches and their augmentation are drawn by processes whose order is not fixed.
    for of in done[:2]:
        assert of["train_loss"][0] == pytest.approx(theirs["train_loss"][0], abs=0.25), (of, theirs)


@pytest.mark.parametrize("ignored", [None, 3])
@pytest.mark.parametrize("regions", [False, True])
def test_the_parameters_get_nnunets_gradients(regions, ignored):
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from test_compat import nnunet_trainer

    torch.manual_seed(0)
    network = PlainConvUNet(
        1, 3, (8, 16, 16), torch.nn.Conv3d, 3, [1, 2, 2], 1, 3, 1, conv_bias=True, norm_op=torch.nn.InstanceNorm3d,
        nonlin=torch.nn.LeakyReLU, deep_supervision=True,
    )  # fmt: skip
    image = torch.randn(2, 1, 16, 16, 16)
    if regions:
        target = [(torch.rand(2, 3 + (ignored is not None), s, s, s) < 0.4).float() for s in (16, 8)]
    else:
        target = [torch.randint(0, 3 if ignored is None else 4, (2, 1, s, s, s)).float() for s in (16, 8)]
    found = {}
    for name in ("nnUNetTrainerTverskyKernels", "theirs", "nnUNetTrainerTverskyKernels_Head"):
        trainer = nnunet_trainer("nnUNetTrainerTverskyKernels" if name == "theirs" else name, regions, ignored, network)
        trainer._get_deep_supervision_scales = lambda: [1, 0.5]
        trainer._level_weights = lambda: [2 / 3, 1 / 3]
        loss = trainer._build_loss()
        if name == "theirs":
            trainer._get_deep_supervision_scales = lambda: [1, 0.5, 0.25]
            loss = type(trainer).__mro__[1]._build_loss(trainer)
            assert loss.weight_factors[:2] == pytest.approx([2 / 3, 1 / 3])
        network.zero_grad()
        value = loss(network(image), target)
        value.backward()
        found[name] = (value.item(), {k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None})
    expected, gradients = found.pop("theirs")
    for name, (value, ours) in found.items():
        assert value == pytest.approx(expected, rel=1e-5), name
        assert set(ours) == set(gradients), name
        for parameter, gradient in gradients.items():
            scale = max(gradient.abs().max().item(), 1e-3)
            torch.testing.assert_close(
                ours[parameter], gradient, rtol=1e-3, atol=2e-4 * scale, msg=f"{name} {parameter}"
            )
