"""Hard counts and the metrics of them, beside scikit-learn's and MONAI's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from common import inputs

import tversky_kernels as tk
from tversky_kernels import metrics


def confusion(target, predicted, classes, weight=None):
    """tp, fp, fn, tn of each class by scikit-learn."""
    multilabel_confusion_matrix = pytest.importorskip("sklearn.metrics").multilabel_confusion_matrix

    weight = None if weight is None else weight.flatten().numpy()
    found = multilabel_confusion_matrix(
        target.flatten().numpy(), predicted.flatten().numpy(), labels=range(classes), sample_weight=weight
    )
    return [torch.from_numpy(found[:, i, j].astype(float)) for i, j in ((1, 1), (0, 1), (1, 0), (0, 0))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block", [16, 1 << 20])
def test_softmax_is_scikit_learns(dtype, weighted, block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    logits, target = inputs(2, 5, (6, 7, 3), dtype)
    weight = torch.randint(0, 4, (2, 6, 7, 3)).double() if weighted else None
    found = tk.hard_counts(logits, target, voxel_weight=weight)
    assert found.tp.dtype == (torch.float64 if weighted else torch.int64)
    for n in range(2):
        expected = confusion(target[n], logits[n].argmax(0), 5, None if weight is None else weight[n])
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x[n].double(), y)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_every_type(kind):
    logits, target = inputs(2, 2, (6, 7))
    for shape in (target, target.unsqueeze(1)):
        found = tk.hard_counts(logits, shape.to(kind))
        assert all(torch.equal(x, y) for x, y in zip(found, tk.hard_counts(logits, target), strict=True))


def test_of_equal_logits_the_lowest_class_is_predicted():
    label = torch.tensor([[0, 1, 2, 2]])
    found = tk.hard_counts(torch.zeros(1, 3, 4), label)
    assert found.tp.tolist() == [[1, 0, 0]]
    assert found.fp.tolist() == [[3, 0, 0]]
    assert found.fn.tolist() == [[0, 1, 2]]
    assert found.tn.tolist() == [[0, 3, 2]]


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
@pytest.mark.parametrize("classes", [1, 3])
def test_channels_are_thresholded_as_monai_does(activation, threshold, classes):
    get_confusion_matrix = pytest.importorskip("monai.metrics.confusion_matrix").get_confusion_matrix

    logits, _ = inputs(2, classes, (5, 6, 7))
    dense = (torch.rand(2, classes, 5, 6, 7) < 0.4).to(torch.uint8)
    logits = logits.sigmoid() if activation == "none" else logits
    probability = logits if activation == "none" else logits.sigmoid()
    found = tk.hard_counts(logits, dense, activation=activation, threshold=threshold)
    expected = get_confusion_matrix((probability >= threshold).float(), dense.float())  # tp, fp, tn, fn
    for x, i in zip(found, (0, 1, 3, 2), strict=True):
        assert torch.equal(x.double(), expected[..., i].double())
    if classes == 1:
        of_labels = tk.hard_counts(logits, dense[:, 0], activation=activation, threshold=threshold)
        assert all(torch.equal(x, y) for x, y in zip(found, of_labels, strict=True))


def test_labels_are_one_hot_rows():
    logits, target = inputs(2, 4, (5, 6))
    one_hot = torch.nn.functional.one_hot(target, 4).movedim(-1, 1)
    weight = torch.rand(2, 5, 6)
    for options in ({}, {"activation": "sigmoid"}, {"voxel_weight": weight}):
        for x, y in zip(
            tk.hard_counts(logits, target, **options), tk.hard_counts(logits, one_hot, **options), strict=True
        ):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_what_is_ignored_counts_nowhere(activation):
    logits, target = inputs(2, 3, (5, 6))
    ignored = target.clone()
    ignored[:, :2] = 255
    found = tk.hard_counts(logits, ignored, ignore_index=255, activation=activation)
    expected = tk.hard_counts(logits[:, :, 2:], target[:, 2:], activation=activation)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    weight = torch.ones(2, 5, 6)
    weight[:, :2] = 0
    weighted = tk.hard_counts(logits, target, voxel_weight=weight, activation=activation)
    assert all(torch.equal(x, y.double()) for x, y in zip(weighted, expected, strict=True))


def test_tables_of_parts_add_up():
    logits, target = inputs(1, 3, (4, 6, 8))
    whole = tk.hard_counts(logits, target)
    parts = [tk.hard_counts(logits[..., at : at + 2], target[..., at : at + 2]) for at in range(0, 8, 2)]
    added = tk.HardCounts(*(sum(x) for x in zip(*parts, strict=True)))
    assert all(torch.equal(x, y) for x, y in zip(whole, added, strict=True))


def test_layouts_are_read():
    logits, target = inputs(2, 3, (4, 6, 8))
    expected = tk.hard_counts(logits, target)
    for z in (
        logits.contiguous(memory_format=torch.channels_last_3d),
        logits.transpose(2, 4).contiguous().transpose(2, 4),
    ):
        assert all(torch.equal(x, y) for x, y in zip(tk.hard_counts(z, target), expected, strict=True))
    none = tk.hard_counts(logits[..., :0], target[..., :0])
    assert none.tn.tolist() == [[0, 0, 0]] * 2


def test_metrics_are_scikit_learns():
    theirs = pytest.importorskip("sklearn.metrics")

    logits, target = inputs(1, 4, (9, 8))
    counts = tk.hard_counts(logits, target)
    y, p = target.flatten().numpy(), logits.argmax(1).flatten().numpy()
    each = {"average": None, "labels": range(4)}
    for found, expected in (
        (metrics.dice(counts), theirs.f1_score(y, p, **each)),
        (metrics.iou(counts), theirs.jaccard_score(y, p, **each)),
        (metrics.sensitivity(counts), theirs.recall_score(y, p, **each)),
        (metrics.precision(counts), theirs.precision_score(y, p, **each)),
        (metrics.f_beta(counts, 2), theirs.fbeta_score(y, p, beta=2, **each)),
    ):
        np.testing.assert_allclose(found[0], expected, rtol=1e-12)
    specificity = [theirs.recall_score(y != c, p != c) for c in range(4)]
    np.testing.assert_allclose(metrics.specificity(counts)[0], specificity, rtol=1e-12)


def test_dice_is_monais():
    DiceMetric = pytest.importorskip("monai.metrics").DiceMetric

    logits, target = inputs(3, 4, (6, 5, 7))
    target[0][target[0] == 2] = 0
    dice = DiceMetric(include_background=True, num_classes=4, reduction="none")
    expected = dice(logits.argmax(1, keepdim=True), target.unsqueeze(1))
    found = metrics.dice(tk.hard_counts(logits, target))
    known = ~torch.isnan(expected)  # MONAI leaves out a class that the target lacks, also where it is predicted
    torch.testing.assert_close(found[known], expected[known].double(), rtol=1e-6, atol=0)


def test_a_class_that_is_absent():
    label = torch.zeros(1, 6, dtype=torch.uint8)
    logits = torch.zeros(1, 3, 6)
    logits[:, 0] = 1
    counts = tk.hard_counts(logits, label)
    assert math.isnan(metrics.dice(counts)[0, 1])
    assert metrics.dice(counts, absent=1.0).tolist() == [[1.0, 1.0, 1.0]]
    assert metrics.sensitivity(counts, absent=0.0).tolist() == [[1.0, 0.0, 0.0]]
    assert math.isnan(metrics.specificity(counts)[0, 0])
    assert math.isnan(metrics.precision(counts)[0, 1])
    assert metrics.iou(counts, absent=-1).tolist() == [[1.0, -1.0, -1.0]]


def test_nothing_of_the_volumes_size():
    from tversky_kernels._memory import peak_bytes

    logits, target = torch.randn(1, 4, 128, 128, 96), torch.randint(0, 4, (1, 128, 128, 96), dtype=torch.uint8)
    peak = peak_bytes(lambda: tk.hard_counts(logits, target), logits.device)
    assert peak < target.numel() * 4  # an arg-max alone takes twice that


def test_bad_input():
    logits, target = inputs(2, 3, (4, 5))
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 3\), got 3"):
        tk.hard_counts(logits, target + 1)
    with pytest.raises(ValueError, match=r"threshold: expected a finite number in \(0, 1\], got 1\.5"):
        tk.hard_counts(logits, target, threshold=1.5)
    with pytest.raises(ValueError, match="threshold: expected"):
        tk.hard_counts(logits, target, activation="sigmoid", threshold=0)
    with pytest.raises(ValueError, match="activation: expected one of"):
        tk.hard_counts(logits, target, activation="relu")
    with pytest.raises(ValueError, match=r"target: expected 0 and 1 in a dense target, got 0\.5"):
        tk.hard_counts(logits, torch.full((2, 3, 4, 5), 0.5))
    with pytest.raises(ValueError, match="beta: expected"):
        metrics.f_beta(tk.hard_counts(logits, target), -1)
    found = tk.hard_counts(logits, target + 1, check_target=False)
    kept = target + 1 < 3
    assert (found.tp + found.fn).sum() == kept.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_kernel_counts_as_torchs_operators_do(capability, dtype, monkeypatch):
    """Ties, NaN, ignored labels, weights of 0, any layout, few classes and many."""
    for seed, (classes, space) in enumerate(
        [(2, (64, 64)), (3, (7, 9)), (5, (33, 40)), (40, (5, 6, 7)), (4, (1,))] * 4
    ):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(2, classes, *space, generator=generator).to(dtype)
        target = torch.randint(0, classes, (2, *space), generator=generator, dtype=torch.uint8)
        logits = logits.round() if seed % 2 else logits
        logits[torch.rand(logits.shape, generator=generator) < 0.02 * (seed % 3)] = torch.nan
        if seed % 4 == 3:
            logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
        options = {"ignore_index": 1 if seed % 3 == 1 else None}
        if seed % 5 == 2:
            options["voxel_weight"] = torch.rand(2, *space, generator=generator) > 0.5
        found = tk.hard_counts(logits, target, **options)
        with monkeypatch.context() as patch:
            patch.setattr(tk.metrics, "CPU_MISSING", "not now")
            expected = tk.hard_counts(logits, target, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), seed


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_by_region(activation, by_class):
    """Each region as a volume by itself; a region that is negative counts nowhere."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 9, 11, generator=generator)
    target = torch.randint(0, 3, (2, 9, 11), generator=generator)
    shape = (2, 3, 9, 11) if by_class else (2, 9, 11)
    regions = torch.randint(-1, 4, shape, generator=generator)
    how = {"activation": activation, "ignore_index": 2}
    found = tk.hard_counts(logits, target, regions=regions, num_regions=5, **how)
    assert found.tp.shape == (2, 5, 3)
    assert found.tp.dtype == torch.int64
    for r in range(5):
        for c in range(3):
            weight = (regions[:, c] if by_class else regions) == r
            expected = tk.hard_counts(logits, target, voxel_weight=weight, **how)
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a[:, r, c].double(), b[:, c])
    with pytest.raises(ValueError, match="regions: expected values below num_regions = 3, got 3"):
        tk.hard_counts(logits, target, regions=regions, num_regions=3)
    assert tk.metrics.dice(found).shape == (2, 5, 3)
