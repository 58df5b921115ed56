"""A few steps of training in MONAI's and Lightning's trainers, and the examples that people copy."""

from __future__ import annotations

import math
import re
import sys

import numpy as np
import pytest
import torch
from common import inputs
from processes import ROOT, run

import tversky_kernels as tk

EXAMPLES = ROOT / "examples"
PATCH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three small volumes with a bright ball, and their labels."""
    import nibabel

    folder, rng = tmp_path_factory.mktemp("volumes"), np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (20, 24, 18)), indexing="ij"))
    for i in range(3):
        centre = rng.uniform(7, 12, 3)[:, None, None, None]
        label = (np.sqrt(((grid - centre) ** 2).sum(0)) < 5).astype(np.uint8)
        image = (label + 0.3 * rng.standard_normal(label.shape)).astype(np.float32)
        for name, x in (("image", image), ("label", label)):
            nibabel.save(nibabel.Nifti1Image(x, np.eye(4)), folder / f"case{i}_{name}.nii.gz")
    return folder


def test_minimal_example(folder):
    assert len((EXAMPLES / "minimal.py").read_text().splitlines()) <= 75
    options = ["--steps", 6, "--patch", PATCH, "--workers", 1]
    done = run([sys.executable, EXAMPLES / "minimal.py", folder, *options])
    assert done.returncode == 0, done.stderr[-3000:]
    loss, dice = (float(x) for x in re.findall(r"(?:loss|volume) ([0-9.]+)", done.stdout))
    assert 0 < loss < 3
    assert 0 <= dice <= 1


@pytest.mark.parametrize("head", ["tversky", "convolution"])
def test_whole_body_example(head, tmp_path):
    import nibabel

    label = np.zeros((20, 24, 18), np.uint8)
    label[4:12, 6:14], label[12:16, 6:14] = 3, 90
    image = (label * 10.0 - 500.0 + np.random.default_rng(0).standard_normal(label.shape)).astype(np.float32)
    for name, x in (("example_ct", image), ("example_seg_fast_force_split", label)):
        nibabel.save(nibabel.Nifti1Image(x, np.eye(4)), tmp_path / f"{name}.nii.gz")
    options = ["--data", tmp_path, "--head", head, "--steps", 3, "--patch", PATCH, "--workers", 0]
    done = run([sys.executable, EXAMPLES / "whole_body.py", *options])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "over 2 structures" in done.stdout
    loss, dice = (float(x) for x in re.findall(r"(?:loss|data) ([0-9.]+)", done.stdout))
    assert 0 < loss < 4
    assert 0 <= dice <= 1


@pytest.mark.parametrize("devices", [1, 2])
def test_lightning(folder, devices, tmp_path):
    pytest.importorskip("lightning")
    options = ["--steps", 4, "--patch", PATCH, "--workers", 0, "--devices", devices, "--accelerator", "cpu"]
    done = run([sys.executable, EXAMPLES / "lightning_module.py", folder, *options], where=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"dice\W+[0-9.]+", done.stdout), done.stdout[-3000:]


def test_monai_bundle(folder, tmp_path):
    pytest.importorskip("ignite")
    bundle = EXAMPLES / "monai_bundle" / "configs"
    options = ["--data", folder, "--steps", 4, "--workers", 0, "--patch", f"[{PATCH},{PATCH},{PATCH}]"]
    files = ["--config_file", bundle / "train.json", "--meta_file", bundle / "metadata.json"]
    done = run([sys.executable, "-m", "monai.bundle", "run", *files, *options], where=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(x) for x in re.findall(r"loss: ([0-9.]+)", done.stdout + done.stderr)]
    assert len(losses) >= 4
    assert all(0 < x < 4 for x in losses)


def meta(x):
    from monai.data import MetaTensor

    return MetaTensor(x.clone(), affine=torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0])), meta={"filename_or_obj": "a"})


LOSSES = {
    "tversky_loss": lambda z, t: tk.tversky_loss(z, t),
    "tversky_ce_loss": lambda z, t: tk.tversky_ce_loss(z, t),
    "dice_loss": lambda z, t: tk.dice_loss(z, t),
    "jaccard_loss": lambda z, t: tk.jaccard_loss(z, t),
    "focal_tversky_loss": lambda z, t: tk.focal_tversky_loss(z, t),
    "generalized_dice_loss": lambda z, t: tk.generalized_dice_loss(z, t),
    "overlap_counts": lambda z, t: (1 - tk.overlap_counts(z, t).tp / 500).prod(),
    "deep_supervision_loss": lambda z, t: tk.deep_supervision_loss([z, z[..., ::2]], t, loss="tversky_ce"),
    "linear_tversky_loss": lambda z, t: tk.linear_tversky_loss(z, torch.eye(3), None, t),
    "voxel_weight": lambda z, t: tk.tversky_loss(z, t, voxel_weight=(t > 0).float()),
    "in place": lambda z, t: tk.tversky_ce_loss(z * 1, t, inplace_backward=True),
    "reference": lambda z, t: tk.tversky_loss(z, t, backend="reference"),
    "TverskyLoss": lambda z, t: tk.TverskyLoss(class_weight=[1.0, 2.0, 3.0])(z, t),
    "monai.DiceCELoss": lambda z, t: tk.compat.monai.DiceCELoss(softmax=True, to_onehot_y=True)(z, t),
    "monai.DiceFocalLoss": lambda z, t: tk.compat.monai.DiceFocalLoss(sigmoid=True, to_onehot_y=True)(z, t),
    "monai.FocalLoss": lambda z, t: tk.compat.monai.FocalLoss(to_onehot_y=True, alpha=0.3)(z, t),
    "monai.GeneralizedDiceLoss": lambda z, t: tk.compat.monai.GeneralizedDiceLoss(softmax=True, to_onehot_y=True)(z, t),
    "nnunet": lambda z, t: tk.compat.nnunet.DC_and_CE_loss({}, {})(z, t),
    "smp": lambda z, t: tk.compat.smp.TverskyLoss("multiclass")(z, t[:, 0]),
    "kornia": lambda z, t: tk.compat.kornia.dice_loss(z, t[:, 0]),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_metatensors(name):
    pytest.importorskip("monai")
    logits, target = inputs(2, 3, (6, 5, 4))
    target = target[:, None].float() if name.startswith("monai") else target[:, None]
    found = []
    for of in (torch.clone, meta):
        z, t = of(logits).requires_grad_(), of(target)
        loss = LOSSES[name](z, t)
        loss.backward()
        found.append((torch.as_tensor(loss).detach(), torch.as_tensor(z.grad)))
    (loss, gradient), (of_meta, gradient_of_meta) = found
    assert of_meta.item() == loss.item()
    assert gradient.any()
    assert torch.equal(gradient_of_meta.as_subclass(torch.Tensor), gradient)


def test_monais_supervised_trainer():
    pytest.importorskip("ignite")
    from monai.data import DataLoader, Dataset
    from monai.engines import SupervisedTrainer

    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 2, 3, padding=1)
    label = torch.zeros(1, 8, 8, 8)
    label[:, 2:6, 2:6, 2:6] = 1
    item = {"image": meta(label + 0.1 * torch.randn_like(label)), "label": meta(label.long())}
    losses = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=6, train_data_loader=DataLoader(Dataset([item] * 4), batch_size=2),
        network=network, optimizer=torch.optim.Adam(network.parameters(), 0.05),
        loss_function=tk.TverskyCELoss(batch=True),
    )  # fmt: skip

    from ignite.engine import Events

    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output[0]["loss"]))
    trainer.run()
    losses = [float(x) for x in losses]
    assert len(losses) == 12
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.7 * losses[0]


def test_notebook():
    """The quickstart runs, its network learns, and the committed pictures are those of these cells."""
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    path = EXAMPLES / "quickstart.ipynb"
    committed = nbformat.read(path, 4)
    notebook = nbformat.read(path, 4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()

    def printed(of):
        return [o["text"] for c in of.cells for o in c.get("outputs", []) if o.get("name") == "stdout"]

    def pictures(of):
        return sum("image/png" in o.get("data", {}) for c in of.cells for o in c.get("outputs", []))

    assert pictures(notebook) == pictures(committed) == 2
    assert len(printed(notebook)) == len(printed(committed))
    dice = [float(x) for x in re.findall(r"0\.\d+", printed(notebook)[-1])]
    assert min(dice) > 0.6, dice
