"""Writes recorded.json: what the installed libraries give for configurations that the tests draw again.

cd tests && python -m peers.record        in the environment of `make test-peers`
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import warnings
from types import SimpleNamespace

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from peers.configurations import DRAWS, levels, other_inputs

LOSSES, LEVELS = 60, 12
DISTRIBUTIONS = {"monai": "monai", "smp": "segmentation-models-pytorch", "kornia": "kornia", "nnunet": "nnunetv2"}


def trainer_loss(regions, ignored, batch):
    """The loss that nnU-Net's trainer makes for itself."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    labels = SimpleNamespace(has_regions=regions, ignore_label=ignored)
    knows = SimpleNamespace(
        label_manager=labels,
        configuration_manager=SimpleNamespace(batch_dice=batch),
        is_ddp=False,
        enable_deep_supervision=True,
        _do_i_compile=lambda: False,
        _get_deep_supervision_scales=lambda: [1, 0.5, 0.25],
    )
    return nnUNetTrainer._build_loss(knows)


def by_keras() -> dict[str, float]:
    """Keras's Tversky loss of one channel, and of several: one index for all."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    (z, t), (zs, ts) = other_inputs(1), other_inputs(3)
    loss = keras.losses.Tversky(alpha=0.2, beta=0.7, dtype="float64")
    return {"keras 1": float(loss(t.double(), z.sigmoid())), "keras 3": float(loss(ts.double(), zs.softmax(1)))}


def by_ivadomed(file: pathlib.Path) -> dict[str, float]:
    """ivadomed's losses of several channels."""
    spec = importlib.util.spec_from_file_location("ivadomed_losses", file)
    losses = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("loguru", SimpleNamespace(logger=None))  # which it imports and the losses do not use
    sys.modules.setdefault("scipy", SimpleNamespace())
    spec.loader.exec_module(losses)
    z, t = other_inputs(3)
    p = z.softmax(1)
    focal = losses.FocalTverskyLoss(alpha=0.2, beta=0.7, gamma=1.33, smooth=1.0)
    tversky = losses.TverskyLoss(alpha=0.2, beta=0.7, smooth=1.0)
    return {"ivadomed": tversky(p, t).item(), "ivadomed focal": focal(p, t).item()}


def main() -> None:
    """Records."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ivadomed", metavar="FILE", type=pathlib.Path)
    given = parser.parse_args()
    from peers.test_peers import summary

    recorded = {"versions": {k: importlib.metadata.version(v) for k, v in DISTRIBUTIONS.items()}, "losses": {}}
    for peer in ("smp", "kornia", "nnunet"):  # MONAI is there wherever the tests run
        found = recorded["losses"].setdefault(peer, {})
        for seed in range(LOSSES * 2):
            configuration = DRAWS[peer](seed)
            value, gradient = configuration.values(configuration.theirs())
            if len(found) < LOSSES and value.isfinite().all() and gradient.isfinite().all():
                of_logits = configuration.logits.sum().item()
                found[str(seed)] = (
                    configuration.name,
                    of_logits,
                    [float(f"{x:.9g}") for x in summary(value, gradient)],
                )
    recorded["levels"] = {}
    for seed in range(LEVELS):
        outputs, targets, knows = levels(seed)
        recorded["levels"][str(seed)] = float(f"{trainer_loss(*knows)(outputs, targets).item():.9g}")
    path = pathlib.Path(__file__).with_name("recorded.json")
    recorded["others"] = json.loads(path.read_text()).get("others", {})
    if importlib.util.find_spec("keras") is not None:
        recorded["others"] |= by_keras()
        recorded["versions"]["keras"] = importlib.metadata.version("keras")
    if given.ivadomed is not None:
        recorded["others"] |= by_ivadomed(given.ivadomed)
    path.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"wrote {path.name}: {recorded['versions']}")


if __name__ == "__main__":
    main()
