"""Losses of regions: a region is to the loss what a sample is; and tk.regions, which makes them of a label map."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from common import inputs, loss_and_gradient, relative
from scipy import ndimage

import tversky_kernels as tk
from tversky_kernels._memory import peak_bytes
from tversky_kernels._ops import ops

BACKENDS = ["cpu", "blocks", "reference"]


def volumes(samples=2, classes=3, space=(6, 7, 9), count=4, by_class=False, dtype=torch.float64):
    logits, target = inputs(samples, classes, space, dtype)
    generator = torch.Generator().manual_seed(1)
    shape = (samples, classes, *space) if by_class else (samples, *space)
    return logits, target, torch.randint(-1, count, shape, generator=generator)


def loop(loss, logits, target, regions, count, **options):
    """The loss of each sample and region by itself, (N, R, C'), and which of these have a voxel: by voxel weights."""
    rows = []
    for n in range(logits.size(0)):
        of_sample = []
        for r in range(count):
            here = slice(n, n + 1)
            weight = regions[here] == r
            of_region = loss(logits[here], target[here], voxel_weight=weight, reduction="none", **options)
            of_sample.append(of_region[0])
        rows.append(torch.stack(of_sample))
    counted = torch.stack([(regions == r).flatten(1).any(1) for r in range(count)], 1)
    return torch.stack(rows), counted


@pytest.mark.parametrize("options", [{}, {"include_background": False}, {"gamma": 0.75}, {"activation": "sigmoid"}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_region_is_what_a_sample_is(backend, options):
    logits, target, regions = volumes(count=5)
    regions[0][regions[0] == 2] = 1  # region 2 of the first sample has no voxel
    logits.requires_grad_()
    rows, counted = loop(tk.reference.tversky_loss, logits, target, regions, 5, **options)
    each = rows * counted[..., None]
    expected = {
        "none": each,
        "sum": each.sum(),
        "mean": (each.flatten(1).sum(1) / (counted.sum(1) * rows.size(2))).mean(),
    }
    for reduction, value in expected.items():
        how = {"regions": regions, "num_regions": 5, "reduction": reduction, "backend": backend, **options}
        found = tk.tversky_loss(logits, target, **how)
        torch.testing.assert_close(found, value)
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        (true,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, true)
        assert (gradient.movedim(1, -1)[regions < 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_batch_is_summed_by_region(backend):
    logits, target, regions = volumes()
    counts = tk.overlap_counts(logits, target, regions=regions, num_regions=4, backend=backend)
    assert counts.tp.shape == (2, 4, 3)
    summed = tk.overlap_counts(logits, target, regions=regions, num_regions=4, batch=True, backend=backend)
    assert summed.fp.shape == (1, 4, 3)
    torch.testing.assert_close(summed.fp, counts.fp.sum(0, keepdim=True))
    of_batch = tk.tversky_loss(logits, target, regions=regions, batch=True, reduction="none", backend=backend)
    tp, fp, fn = (x.sum(0) for x in counts)
    torch.testing.assert_close(of_batch, 1 - (tp + 1e-5) / (tp + 0.3 * fp + 0.7 * fn + 1e-5))


def test_a_patient_weighs_the_same_with_one_lesion_or_fifty():
    logits, target, _ = volumes()
    regions = torch.zeros(2, 6, 7, 9, dtype=torch.int32)
    regions[1] = torch.arange(6 * 7 * 9).view(6, 7, 9) % 50
    one = tk.tversky_loss(logits[:1], target[:1], regions=regions[:1])
    fifty = tk.tversky_loss(logits[1:], target[1:], regions=regions[1:])
    torch.testing.assert_close(tk.tversky_loss(logits, target, regions=regions), (one + fifty) / 2)
    nothing = torch.full_like(regions[:1], -1)
    both = torch.cat([regions[1:], nothing])
    torch.testing.assert_close(tk.tversky_loss(logits[[1, 0]], target[[1, 0]], regions=both), fifty)
    assert tk.tversky_loss(logits[:1], target[:1], regions=nothing) == 0


@pytest.mark.parametrize("loss", [tk.tversky_loss, tk.tversky_ce_loss])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_region_is_the_plain_loss(backend, loss):
    for dtype, classes in ((torch.float32, 2), (torch.float32, 9), (torch.float64, 4)):
        logits, target, _ = volumes(classes=classes, dtype=dtype)
        plain = loss_and_gradient(loss, logits, target, backend=backend)
        found = loss_and_gradient(loss, logits, target, regions=torch.zeros_like(target), backend=backend)
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_partition_for_each_class(backend):
    """A class's row is that of the class's own partition."""
    logits, target, regions = volumes(by_class=True)
    found = tk.tversky_loss(logits, target, regions=regions, num_regions=4, reduction="none", backend=backend)
    for c in range(3):
        one = tk.tversky_loss(logits, target, regions=regions[:, c], num_regions=4, reduction="none", backend=backend)
        torch.testing.assert_close(found[..., c], one[..., c])


@pytest.mark.parametrize("by_class", [False, True])
def test_every_instruction_set(capability, by_class):
    """Vectors and blocks of one region, of several, and of many; labels that do not count."""
    for classes, space, dtype in (
        (2, (9, 40), torch.float32),
        (5, (9, 40), torch.float32),
        (4, (3, 131), torch.float64),
    ):
        logits, target, _ = volumes(2, classes, space, dtype=dtype)
        for run in (1, 5, 23, 1000):
            ids = torch.arange(target[0].numel()).view(space) // run % 40 - 1
            regions = ids.expand(2, *space)
            if by_class:
                regions = torch.stack([(ids + c) % 40 - 1 for c in range(classes)]).expand(2, classes, *space)
            options = {"regions": regions, "num_regions": 40, "ignore_index": 1, "reduction": "none"}
            for loss in (tk.tversky_loss, tk.tversky_ce_loss):
                loss_, gradient = loss_and_gradient(loss, logits, target, backend="cpu", **options)
                true_loss, true_gradient = loss_and_gradient(
                    loss, logits.double(), target, backend="reference", **options
                )
                eps = 1e-12 if dtype == torch.float64 else 2e-6
                assert relative(loss_, true_loss) <= eps
                assert relative(gradient, true_gradient) <= eps


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives(backend, by_class):
    logits, target, regions = volumes(2, 3, (2, 3), 3, by_class)
    logits.requires_grad_()
    for loss in (tk.tversky_loss, tk.tversky_ce_loss):

        def of(z, loss=loss):
            return loss(z, target, regions=regions, num_regions=3, reduction="none", backend=backend)

        assert torch.autograd.gradcheck(of, logits)
        assert torch.autograd.gradgradcheck(of, logits)


def test_operators():
    logits, target, regions = volumes()
    passes = (0, None, 0, 1, 0.0, False)
    ids = regions.unsqueeze(1)
    torch.library.opcheck(ops.region_count_pass.default, (logits, target, None, ids, None, 4, *passes, 2))
    coefficients = torch.rand(2, 4, 3, 4, dtype=torch.float64)
    torch.library.opcheck(ops.region_gradient_pass.default, (coefficients, logits, target, None, ids, None, *passes))
    torch.library.opcheck(ops.region_gradient_pass_.default, (logits, coefficients, target, None, ids, None, *passes))


def test_the_last_layer_and_deep_supervision():
    logits, target, regions = volumes()
    how = {"regions": regions, "num_regions": 4}
    features = torch.randn(2, 5, 6, 7, 9, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    z = torch.einsum("nkxyz,ck->ncxyz", features, weight) + bias.view(3, 1, 1, 1)
    for loss, function in (("tversky", tk.tversky_loss), ("tversky_ce", tk.tversky_ce_loss)):
        for backend in BACKENDS:
            found = tk.linear_tversky_loss(features, weight, bias, target, loss=loss, backend=backend, **how)
            expected = function(z, target, **how)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(
                torch.autograd.grad(found, (features, weight)),
                torch.autograd.grad(expected, (features, weight), retain_graph=True),
            )
    levels = [logits, logits[:, :, ::2, ::2, ::2].contiguous()]
    found = tk.deep_supervision_loss(levels, target, [0.5, 0.5], **how)
    half = [torch.nn.functional.interpolate(x[:, None].double(), levels[1].shape[2:])[:, 0] for x in (target, regions)]
    coarse = tk.tversky_loss(levels[1], half[0].long(), regions=half[1].long(), num_regions=4)
    torch.testing.assert_close(found, 0.5 * tk.tversky_loss(logits, target, **how) + 0.5 * coarse)


def test_modules():
    logits, target, regions = volumes()
    criterion = tk.TverskyLoss(num_regions=4)
    expected = tk.tversky_loss(logits, target, regions=regions, num_regions=4)
    assert criterion(logits, target, regions=regions) == expected
    assert tk.TverskyLoss()(logits, target, regions=regions, num_regions=4) == expected
    assert criterion(logits, target) == tk.tversky_loss(logits, target)  # calls without regions remain
    with pytest.raises(TypeError, match="unexpected argument 'region' of a call"):
        criterion(logits, target, region=regions)


def test_compiled():
    logits, target, regions = volumes(dtype=torch.float32)

    def loss(z, ids):
        return tk.tversky_ce_loss(z, target, regions=ids, num_regions=4)

    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(
        loss_and_gradient(lambda z, t: compiled(z, regions), logits, target),
        loss_and_gradient(lambda z, t: loss(z, regions), logits, target),
    )
    with pytest.raises(Exception, match="num_regions: expected how many regions there are"):
        torch.compile(lambda z: tk.tversky_loss(z, target, regions=regions), fullgraph=True, backend="eager")(logits)


def test_the_same_bits_for_any_number_of_threads(threads):
    logits, target, _ = volumes(1, 5, (64, 64, 20), dtype=torch.float32)
    regions = torch.arange(target.numel()).view(target.shape) // 50 % 90
    found = []
    for number in (1, 2, 3):
        threads(number)
        found.append(loss_and_gradient(tk.tversky_loss, logits, target, regions=regions, num_regions=90))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_memory():
    """One gradient, and rows."""
    logits, target, _ = volumes(1, 4, (32, 32, 32), dtype=torch.float32)
    logits.requires_grad_()
    regions = torch.arange(target.numel(), dtype=torch.int16).view(target.shape) // 700

    def step():
        loss = tk.tversky_loss(logits, target, regions=regions, num_regions=50)
        torch.autograd.grad(loss, logits)

    rows = 50 * 4 * 4 * 8
    assert peak_bytes(step, logits.device) <= logits.nbytes + 40 * rows


def test_in_place():
    logits, target, regions = volumes(dtype=torch.float32)
    expected = loss_and_gradient(tk.tversky_loss, logits, target, regions=regions, num_regions=4)
    leaf = logits.clone().requires_grad_()
    z = leaf * 1
    loss = tk.tversky_loss(z, target, regions=regions, num_regions=4, inplace_backward=True)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close((loss.detach(), gradient), expected, rtol=0, atol=0)
    torch.testing.assert_close(z.detach(), expected[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"regions": [0]}, TypeError, "regions: expected a tensor, got list"),
        ({"regions": "float"}, TypeError, "regions: expected uint8, int8, int16, int32 or int64, got torch.float64"),
        ({"regions": "short"}, ValueError, r"regions: for logits \(2, 3, 6, 7, 9\) expected \(2, 6, 7, 9\), \(2, 1, 6"),
        ({"regions": "right", "num_regions": 3}, ValueError, "regions: expected values below num_regions = 3, got 3"),
        (
            {"regions": "right", "num_regions": 0},
            ValueError,
            r"num_regions: expected an integer in \[1, 2\^31\), got 0",
        ),
        ({"regions": "right", "num_regions": 2.0}, TypeError, "num_regions: expected an integer or None, got 2.0"),
        ({"num_regions": 3}, ValueError, "num_regions: expected None without regions, got 3"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(options, error, message, backend):
    logits, target, regions = volumes()
    given = {"float": regions.double(), "short": regions[:, 1:], "right": regions}
    if isinstance(options.get("regions"), str):
        options = {**options, "regions": given[options["regions"]]}
    with pytest.raises(error, match=message):
        tk.tversky_loss(logits, target, backend=backend, **options)


def test_bad_regions_are_not_silent():
    logits, target, regions = volumes()
    for backend in BACKENDS:
        loss = tk.tversky_loss(logits, target, regions=regions, num_regions=3, backend=backend, check_target=False)
        assert torch.isnan(loss)


# ---- tk.regions


def lesions(shape=(24, 25, 26), number=12, labels=2, seed=0):
    """Boxes of labels 1 to `labels`."""
    random = np.random.default_rng(seed)
    label = np.zeros(shape, np.int64)
    for _ in range(number):
        at, size = [random.integers(0, s - 4) for s in shape], random.integers(1, 4, len(shape))
        label[tuple(slice(a, a + s) for a, s in zip(at, size, strict=True))] = random.integers(1, labels + 1)
    return label


@pytest.mark.parametrize("shape", [(200,), (30, 31), (24, 25, 26), (6, 7, 8, 9)])
@pytest.mark.parametrize("connectivity", [1, None])
def test_components(shape, connectivity, monkeypatch):
    label = lesions(shape)
    touching = ndimage.generate_binary_structure(len(shape), connectivity or len(shape))
    found = []
    for without in (False, True):
        if without:
            monkeypatch.setitem(sys.modules, "cc3d", None)
        regions, count = tk.regions.components(label, connectivity=connectivity)
        parts = [ndimage.label(label == c, touching)[0] for c in (1, 2)]
        assert count == 1 + sum(x.max() for x in parts)
        assert ((regions > 0) == (label > 0)).all()
        pairs = {tuple(x) for x in np.stack([regions, *parts], -1).reshape(-1, 3)}
        assert len(pairs) == count  # the same partition
        first = [np.flatnonzero(regions == r)[0] for r in range(1, count)]
        assert first == sorted(first)
        found.append(regions)
    assert (found[0] == found[1]).all()


def test_components_of_each_class_and_of_batches():
    label = torch.from_numpy(np.stack([lesions(seed=s) for s in (0, 1)]))
    regions, count = tk.regions.components(label, per_class=True, batch=True)
    assert regions.shape == (2, 3, 24, 25, 26)
    assert isinstance(regions, torch.Tensor)
    assert (regions[:, 0] == 0).all()
    counts = []
    for n in range(2):
        for c in (1, 2):
            one, number = tk.regions.components(label[n].numpy() == c)
            assert (regions[n, c].numpy() == one).all()
            counts.append(number)
    assert count == max(counts)
    tk.tversky_loss(torch.randn(2, 3, 24, 25, 26), label, regions=regions, num_regions=count)


def nearest_component(label, connectivity=None):
    """CC-Metrics' partition: the distance to each component by itself; and at how many components it is the least."""
    regions, count = tk.regions.components(label)
    distances = np.stack([ndimage.distance_transform_edt(regions != r) for r in range(1, count)])
    return distances.argmin(0), (distances == distances.min(0)).sum(0)


@pytest.mark.parametrize("shape", [(30, 31), (24, 25, 26)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_voronoi_is_cc_metrics(shape, seed):
    label = lesions(shape, labels=1, seed=seed)
    expected, how_many = nearest_component(label)
    regions, count = tk.regions.voronoi(label)
    assert count == expected.max() + 1
    assert (regions == expected)[how_many == 1].all()
    assert (how_many == 1).mean() > 0.8


def test_voronoi_without_lesions_and_with_ignored_voxels():
    regions, count = tk.regions.voronoi(np.zeros((4, 5), bool))
    assert count == 1
    assert (regions == 0).all()
    label = torch.zeros(4, 5, dtype=torch.int64)
    label[0, 0], label[3, 4], label[1] = 1, 2, 255
    regions, count = tk.regions.voronoi(label, ignore_index=255)
    assert count == 2
    assert (regions[1] == -1).all()
    assert regions[0, 0] == 0
    assert regions[3, 4] == 1
    wide, _ = tk.regions.voronoi(np.array([[1, 0, 0, 0, 0, 1]]).T.repeat(2, 1), spacing=(1.0, 3.0))
    assert wide[:, 0].tolist() == [0, 0, 0, 1, 1, 1] or wide.max() == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"label": [1]}, TypeError, "label: expected an array or a CPU tensor of bool or integers, got list"),
        ({"label": np.zeros(3)}, TypeError, "got float64"),
        ({"label": np.array([0, -1])}, ValueError, "label: expected labels >= 0 or the ignore_index, got -1"),
        (
            {"label": np.zeros((2, 3), int), "connectivity": 3},
            ValueError,
            "connectivity: expected 1 to 2, or None, got 3",
        ),
        ({"label": np.zeros((2, 3), int), "spacing": (1.0,)}, ValueError, "spacing: expected 2 numbers, got 1"),
    ],
)
def test_bad_labels(arguments, error, message):
    with pytest.raises(error, match=message):
        tk.regions.voronoi(**arguments)


def test_in_monais_data_loading():
    monai = pytest.importorskip("monai")
    label = torch.from_numpy(lesions()).float()[None]  # as LoadImaged leaves it
    item = {"image": label * 2, "label": monai.data.MetaTensor(label)}
    for kind, function in (("voronoi", tk.regions.voronoi), ("components", tk.regions.components)):
        transforms = monai.transforms.Compose([tk.regions.AddRegionsd("label", kind=kind)])
        batch = next(iter(monai.data.DataLoader(monai.data.Dataset([item, item], transforms), batch_size=2)))
        expected, number = function(label[0].long())
        assert batch["num_regions"].tolist() == [number] * 2
        assert torch.equal(batch["regions"][1], expected)
        logits = torch.randn(2, 3, *label.shape[1:])
        target = batch["label"].as_subclass(torch.Tensor).long()
        how = {"regions": batch["regions"], "num_regions": int(batch["num_regions"].max())}
        assert torch.isfinite(tk.tversky_loss(logits, target, **how))
    assert repr(transforms.transforms[0]) == "AddRegionsd('label', kind='components')"
    with pytest.raises(ValueError, match="kind: expected one of 'voronoi', 'components', got 'nearest'"):
        tk.regions.AddRegionsd("label", kind="nearest")


# ---- Losses of lesions


def blob_loop(logits, label, regions, per_class):
    """The authors' formula: a Dice loss for each lesion, the others masked out of the probabilities."""
    p, samples = logits.softmax(1), []
    for n in range(len(label)):
        losses = []
        for c in range(1, logits.size(1)):
            ids = regions[n, c] if per_class else regions[n]
            for r in ids.unique():
                blob = (ids == r) & (label[n] == c)
                if r == 0 or not blob.any():
                    continue
                masked, g = p[n, c] * ((ids == 0) | (ids == r)), blob.double()
                losses.append(1 - (2 * (masked * g).sum() + 2e-5) / (masked.sum() + g.sum() + 2e-5))
        if losses:
            samples.append(torch.stack(losses).mean())
    return torch.stack(samples).mean()


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_blob_loss(backend, per_class):
    label = torch.from_numpy(np.stack([lesions(seed=0), lesions(number=0), lesions(number=1)]))
    regions, count = tk.regions.components(label, per_class=per_class, batch=True, classes=3 if per_class else None)
    logits = torch.randn(3, 3, 24, 25, 26, dtype=torch.float64, requires_grad=True)
    whole = tk.dice_loss(logits, label, include_background=False)
    ce = torch.nn.functional.cross_entropy(logits, label)
    expected = 2 * whole + blob_loop(logits, label, regions, per_class) + 0.5 * ce
    how = {"regions": regions, "num_regions": count, "ce_weight": 0.5, "backend": backend}
    found = tk.blob_loss(logits, label, **how)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-6, atol=1e-12)
    assert tk.BlobLoss(ce_weight=0.5)(logits, label, regions=regions, num_regions=count) == tk.blob_loss(
        logits, label, **{**how, "backend": "auto"}
    )


@pytest.mark.parametrize("per_class", [False, True])
def test_cc_loss(per_class):
    label = torch.from_numpy(np.stack([lesions(seed=0), lesions(number=0)]))
    regions, count = tk.regions.voronoi(label, per_class=per_class, batch=True, classes=3 if per_class else None)
    logits = torch.randn(2, 3, 24, 25, 26, dtype=torch.float64)
    how = {"regions": regions, "num_regions": count}
    expected = tk.dice_loss(logits, label, include_background=False)
    expected = expected + 0.5 * tk.dice_loss(logits, label, include_background=False, **how)
    torch.testing.assert_close(tk.cc_loss(logits, label, region_weight=0.5, **how), expected)
    assert tk.CCLoss(region_weight=0.5)(logits, label, **how) == tk.cc_loss(logits, label, region_weight=0.5, **how)


@pytest.mark.parametrize("by_class", [False, True])
def test_generalised_dice_by_region(by_class):
    logits, target, regions = volumes(by_class=by_class)
    how = {"regions": regions, "num_regions": 5}  # the last has no voxel
    rows = tk.generalized_dice_loss(logits, target, reduction="none", **how)
    assert rows.shape == (2, 5)
    torch.testing.assert_close(tk.generalized_dice_loss(logits, target, **how), rows[:, :4].mean())
    torch.testing.assert_close(tk.generalized_dice_loss(logits, target, reduction="sum", **how), rows.sum())
    if not by_class:
        expected, _ = loop(lambda *a, **o: tk.generalized_dice_loss(*a, **o)[:, None], logits, target, regions, 4)
        torch.testing.assert_close(rows[:, :4], expected[..., 0])
    assert torch.isnan(tk.generalized_dice_loss(logits, target, regions=regions, num_regions=3, check_target=False))


def test_lesion_losses_without_regions():
    logits, target, _ = volumes()
    with pytest.raises(ValueError, match="regions: expected the region of each voxel"):
        tk.blob_loss(logits, target, regions=None)
    assert torch.isfinite(tk.blob_loss(logits, target, regions=torch.zeros_like(target)))  # no lesion
    for loss in (tk.blob_loss, tk.cc_loss):  # no sample
        assert loss(logits[:0], target[:0], regions=target[:0], num_regions=2) == 0
