"""Several processes: parts of one batch or volume, or different samples, give what one process gives on the whole.

Each scenario below runs on every rank and returns something; the test compares it with one process. They share two
starts of processes, of two and of four, for a start takes longer than all of them.
"""

from __future__ import annotations

import datetime
import functools
import os
import time
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor
import torch.multiprocessing
from common import inputs, loss_and_gradient
from torch.nn.parallel import DistributedDataParallel

import tversky_kernels as tk

CLASSES = 3
LOGITS, TARGET = inputs(4, CLASSES, (6, 8, 5), torch.float64)
WEIGHT = torch.rand(4, 6, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OPTIONS = {"alpha": 0.2, "beta": 0.8, "gamma": 0.75}
COMPOUND = {**OPTIONS, "ce_class_weight": [1.0, 2.0, 3.0], "label_smoothing": 0.1, "ce_weight": 0.5}
#: Samples of each rank, unequal.
SHARDS = {2: [slice(0, 1), slice(1, 4)], 4: [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 4)]}
#: The part of a volume of each rank, along the last dimension but one; the last of four has none.
SLABS = {2: [slice(0, 3), slice(3, 8)], 4: [slice(0, 3), slice(3, 4), slice(4, 8), slice(8, 8)]}


def dice_of_counts(logits, target, **options):
    tp, fp, fn = tk.overlap_counts(logits, target, **options)
    return ((fp + fn + 1e-5) / (2 * tp + fp + fn + 1e-5)).mean()


def deep(logits, target, weights=(0.7, 0.3), **options):
    return tk.deep_supervision_loss([logits, logits[:, :, ::2]], target, weights, **OPTIONS, **options)


LOSSES = {
    "tversky": functools.partial(tk.tversky_loss, **OPTIONS),
    "compound": functools.partial(tk.tversky_ce_loss, **COMPOUND),
    "sum": functools.partial(tk.tversky_ce_loss, reduction="sum", **COMPOUND),
    "skip": functools.partial(tk.tversky_loss, absent="skip", include_background=False),
    "tensors": functools.partial(tk.tversky_loss, alpha=torch.tensor([0.1, 0.2, 0.3]), gamma=torch.tensor(0.75)),
    "reference": functools.partial(tk.tversky_ce_loss, backend="reference", **COMPOUND),
    "generalized": tk.generalized_dice_loss,
    "deep": deep,
    "last level alone": functools.partial(deep, weights=(1.0, 0.0)),
}
PER_BATCH = {**LOSSES, "counts": dice_of_counts}


class Net(torch.nn.Module):
    """A network without anything that mixes voxels, so that a part of a volume is computed as in the whole."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(3)
        self.body = torch.nn.Linear(CLASSES, 4, dtype=dtype)
        self.head = tk.TverskyHead(4, CLASSES, dtype=dtype, **OPTIONS)

    def forward(self, x, target=None):
        features = self.body(x.movedim(1, -1)).tanh().movedim(-1, 1)
        if target is not None:
            return self.head(features, target)
        return tk.reference.linear_logits(features, self.head.weight.flatten(1), self.head.bias).clone()


def gradients_of(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def trained(loss, x, target, *, wrap=False, **options):
    """The loss, and the parameters' gradients."""
    net = Net(x.dtype)
    model = DistributedDataParallel(net) if wrap else net
    value = loss(model(x), target, **options)
    value.backward()
    return value.detach(), gradients_of(net)


def trained_head(x, target, *, wrap=False, **options):
    net = Net(x.dtype)
    for name, value in options.items():
        setattr(net.head, name, value)
    model = DistributedDataParallel(net) if wrap else net
    value = model(x, target)
    value.backward()
    return value.detach(), gradients_of(net)


# ---- What every rank does. world: how many there are.


def batch_under_ddp(rank, world):
    part = SHARDS[world][rank]
    run = {"batch": True, "process_group": True}
    found = {name: trained(loss, LOGITS[part], TARGET[part], wrap=True, **run) for name, loss in PER_BATCH.items()}
    return found | {"head": trained_head(LOGITS[part], TARGET[part], wrap=True, **run)}


def volume_under_ddp(rank, world):
    slab = SLABS[world][rank]
    x, target = LOGITS[:, :, :, slab], TARGET[:, :, slab]
    found = {}
    for name, loss in {**LOSSES, "counts": dice_of_counts}.items():
        if "level" not in name and name != "deep":  # their target has the volume's sizes
            found[name] = trained(loss, x, target, wrap=True, process_group=dist.group.WORLD)
    return found | {"head": trained_head(x, target, wrap=True, process_group=True)}


def samples_under_ddp(rank, world):
    part = SHARDS[world][rank]
    run = {"sample_group": True}
    found = {name: trained(loss, LOGITS[part], TARGET[part], wrap=True, **run) for name, loss in LOSSES.items()}
    return found | {"head": trained_head(LOGITS[part], TARGET[part], wrap=True, **run)}


def sums_of_gradients(rank, world):
    part = SHARDS[world][rank]
    run = {"grad_reduction": "sum"}
    return {
        "batch": trained(LOSSES["compound"], LOGITS[part], TARGET[part], batch=True, process_group=True, **run),
        "samples": trained(LOSSES["compound"], LOGITS[part], TARGET[part], sample_group=True, **run),
    }


def mesh(rank, world):
    """Two ranks hold the halves of three volumes, the two others those of one."""
    groups = [[dist.new_group(ranks) for ranks in pairs] for pairs in (((0, 1), (2, 3)), ((0, 2), (1, 3)))]
    parts, samples = groups[0][rank // 2], groups[1][rank % 2]
    own = slice(0, 3) if rank < 2 else slice(3, 4)
    slab = slice(0, 5) if rank % 2 == 0 else slice(5, 8)
    x, target = LOGITS[own, :, :, slab], TARGET[own, :, slab]
    run = {"process_group": parts, "sample_group": samples}
    found = {
        name: trained(LOSSES[name], x, target, wrap=True, **run)
        for name in ("tversky", "compound", "sum", "skip", "generalized", "reference")
    }
    found["head"] = trained_head(x, target, wrap=True, **run)
    # Two ranks do not fit together, and one of two others has a bad label: all four raise.
    wider = torch.cat([x, x[:, :1]], 1) if rank == 1 else x
    found["sizes"] = error_of(tk.tversky_loss, wider, target, **run)
    bad = target.clone()
    if rank == 2:
        bad[0, 0, 0, 0] = 7
    found["label"] = error_of(tk.tversky_loss, x, bad, **run)
    found["after that"] = tk.tversky_loss(x, target, **run).item()
    other = groups[0][1 - rank // 2]
    try:
        tk.tversky_loss(x, target, process_group=other)
    except ValueError as error:
        found["other group"] = str(error)
    return found


def fsdp(rank, world):
    from torch.distributed.fsdp import fully_shard

    part, found = SHARDS[world][rank], {}
    for name, options in (("batch", {"batch": True, "process_group": True}), ("samples", {"sample_group": True})):
        net = Net()
        fully_shard(net.body)
        fully_shard(net)
        loss = LOSSES["compound"](net(LOGITS[part]), TARGET[part], **options)
        loss.backward()
        found[name] = loss.detach(), torch.cat([p.grad.full_tensor().flatten() for p in net.parameters()])
    return found


def ranks_differ_in_their_backend(rank, world):
    part = SHARDS[world][rank]
    run = {"batch": True, "process_group": True}
    found = {}
    backends = ["cpu", "reference"] * (world // 2)
    for name in ("compound", "counts"):
        loss = PER_BATCH[name]
        found[name] = trained(loss, LOGITS[part], TARGET[part], wrap=True, backend=backends[rank], **run)
    # "auto" takes the reference on the one rank whose target requires a gradient.
    dense = torch.nn.functional.one_hot(TARGET[part].long(), CLASSES).movedim(-1, 1).double()
    dense.requires_grad_(rank == 1)
    found["dense"] = trained(LOSSES["compound"], LOGITS[part], dense, wrap=True, **run)
    x = LOGITS[part].float()
    found["float32"] = trained(LOSSES["compound"], x, TARGET[part], wrap=True, backend=backends[rank], **run)
    return found


def error_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def failures(rank, world):
    part = SHARDS[world][rank]
    x, target = LOGITS[part].clone().requires_grad_(), TARGET[part].clone()
    run = {"batch": True, "process_group": True}
    bad = target.clone()
    if rank == 1:
        bad[0, 0, 0, 0] = 9
    found = {}
    for name, loss in PER_BATCH.items():
        found[f"bad label, {name}"] = error_of(loss, x, bad, **run)
    found["bad label, samples"] = error_of(LOSSES["tversky"], x, bad, sample_group=True)
    found["bad label, generalized samples"] = error_of(LOSSES["generalized"], x, bad, sample_group=True)
    found["bad label, unchecked"] = LOSSES["tversky"](x, bad, check_target=False, **run).item()
    # All of them are in step: the next call is right.
    found["after that"] = LOSSES["tversky"](x, target, **run).item()
    found["alpha"] = error_of(tk.tversky_loss, x, target, alpha=0.1 if rank == 1 else 0.2, **run)
    weight = [1.0, 2.0, 3.0 + (rank == 1)]
    found["class_weight"] = error_of(tk.tversky_loss, x, target, class_weight=weight, **run)
    found["dtype"] = error_of(tk.tversky_loss, x.float() if rank == 1 else x, target, **run)
    wider = torch.cat([x, x[:, :1]], 1) if rank == 1 else x
    found["classes"] = error_of(tk.tversky_loss, wider, target, **run)
    found["function"] = error_of(LOSSES["compound" if rank == 1 else "tversky"], x, target, **run)
    found["different samples"] = error_of(tk.tversky_loss, x, target, process_group=True)
    found["samples' classes"] = error_of(tk.tversky_loss, wider, target, sample_group=True)
    found["still in step"] = LOSSES["tversky"](x, target, **run).item()
    if rank == 0:
        (gradient,) = torch.autograd.grad(LOSSES["tversky"](x, target, **run), x, create_graph=True)
        found["twice"] = error_of(gradient.square().sum().backward)
    else:
        LOSSES["tversky"](x, target, **run)
    device_mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    found["mesh"] = error_of(tk.tversky_loss, x, target, process_group=device_mesh)
    x_distributed = dist.tensor.distribute_tensor(LOGITS, device_mesh, [dist.tensor.Shard(0)])
    found["DTensor"] = error_of(tk.tversky_loss, x_distributed, TARGET)
    local = x_distributed.to_local()  # as its words say
    shard = TARGET.chunk(world)[rank]
    found["its shard"] = tk.tversky_loss(local, shard, sample_group=device_mesh.get_group()).item()
    found["number"] = error_of(tk.tversky_loss, x, target, process_group=3)
    found["batch of samples"] = error_of(tk.tversky_loss, x, target, batch=True, sample_group=True)
    found["rows of samples"] = error_of(tk.tversky_loss, x, target, reduction="none", sample_group=True)
    return found


def no_voxels(rank, world):
    """A rank with none: each loss, of a batch and of a volume."""
    x, target = LOGITS.clone().requires_grad_(), TARGET
    empty = rank == 1
    found = {}
    for name, loss in PER_BATCH.items():
        z, t = (x[:0], target[:0]) if empty else (x, target)
        value = loss(z, t, batch=True, process_group=True)
        found["batch", name] = value.detach(), torch.autograd.grad(value, x)[0]
        z, t = (x[:, :, :, :0], target[:, :, :0]) if empty else (x, target)
        value = loss(z, t, process_group=True)
        found["volume", name] = value.detach(), torch.autograd.grad(value, x)[0]
    return found


def hard(rank, world):
    """Counts of predicted classes: of slabs of a volume, and where a label is bad or options differ on one rank."""
    slab = SLABS[world][rank]
    z, target = LOGITS[..., slab, :], TARGET[..., slab, :]
    weight = WEIGHT[..., slab, :]
    bad = target.clone()
    if rank == 1:
        bad[0, 0, 0, 0] = 9
    run = {"process_group": True}
    return {
        "whole": list(tk.hard_counts(z, target, **run)),
        "weighted": list(tk.hard_counts(z, target, voxel_weight=weight, activation="sigmoid", **run)),
        "bad label": error_of(tk.hard_counts, z, bad, **run),
        "threshold": error_of(tk.hard_counts, z, target, activation="sigmoid", threshold=0.3 + rank / 10, **run),
        "samples": error_of(tk.hard_counts, z[: 1 + rank], target[: 1 + rank], **run),
        "after that": list(tk.hard_counts(z, target, **run)),
    }


#: Of the voxels of each sample; and which classes it has annotated. Labels of others are 0.
REGIONS = (torch.arange(240).view(6, 8, 5) // 60 + torch.arange(4).view(4, 1, 1, 1)) % 5 - 1
ANNOTATED = torch.tensor([[True, True, False], [True, True, True], [True, False, True], [True, True, True]])
DRAWN = torch.where(ANNOTATED.gather(1, TARGET.long().flatten(1)).view(TARGET.shape), TARGET, 0)
ROWS = {
    "regions": lambda z, t, r, a, **o: tk.tversky_ce_loss(z, t, regions=r, num_regions=4, **COMPOUND, **o),
    "annotated": lambda z, t, r, a, **o: tk.tversky_ce_loss(z, t, annotated=a, **COMPOUND, **o),
    "both": lambda z, t, r, a, **o: tk.tversky_loss(z, t, regions=r, num_regions=4, annotated=a, **OPTIONS, **o),
}


def rows(rank, world):
    """Regions and partial labels: parts of volumes, parts of a batch, different samples."""
    found = {}
    for name, loss in ROWS.items():
        for kind, parts, run in (
            ("volume", (..., SLABS[world][rank], slice(None)), {"process_group": True}),
            ("batch", SHARDS[world][rank], {"process_group": True, "batch": True}),
            ("samples", SHARDS[world][rank], {"sample_group": True}),
        ):
            x = LOGITS.clone().requires_grad_()
            annotated = ANNOTATED if kind == "volume" else ANNOTATED[parts]
            value = loss(x[parts], DRAWN[parts], REGIONS[parts], annotated, grad_reduction="sum", **run)
            found[name, kind] = value.detach(), torch.autograd.grad(value, x)[0]
    bad = DRAWN[SHARDS[world][rank]].clone()
    if rank == 0:
        bad[0, 0, 0, 0] = 2  # not annotated there
    part = SHARDS[world][rank]
    options = {"annotated": ANNOTATED[part], "batch": True, "process_group": True}
    found["bad label"] = error_of(tk.tversky_loss, LOGITS[part], bad, **options)
    return found


def modules(rank, world, early):
    part = SHARDS[world][rank]
    x, target = LOGITS[part], TARGET[part]
    return {
        "lazily": float(early["lazily"](x, target)),
        "not given": float(early["not given"](x, target)),
        "None": error_of(early["None"], x, target),
        "None, later": float(tk.TverskyLoss(batch=True, process_group=None)(x, target)),
    }


def nnunet(rank, world):
    half = slice(rank * 4 // world, (rank + 1) * 4 // world)
    loss = tk.compat.nnunet.DC_and_CE_loss({"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": True}, {})
    return loss_and_gradient(loss, LOGITS[half], TARGET[half, None])


class LevelsNet(torch.nn.Module):
    """Two levels; the layer that makes the first one's logits passes its input on, as in the trainers named _Head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.body = torch.nn.Conv3d(CLASSES, CLASSES + 1, 1, dtype=torch.float64)
        self.head = torch.nn.Conv3d(CLASSES + 1, CLASSES, 1, dtype=torch.float64)
        self.low = torch.nn.Conv3d(CLASSES + 1, CLASSES, 1, dtype=torch.float64)
        self.head.forward = lambda features: features

    def forward(self, x):
        features = self.body(x).tanh()
        return [self.head(features), self.low(features[:, :, ::2])]


def nnunet_levels(rank, world, joined=True):
    net = LevelsNet()
    model = DistributedDataParallel(net) if joined else net
    options = {**COMPOUND, "batch": True, "process_group": True if joined else None}
    loss = tk.compat.nnunet.LevelsLoss(options, weights=[0.7, 0.3], head=net.head)
    half = slice(rank * 4 // world, (rank + 1) * 4 // world)
    value = loss(model(LOGITS[half]), [TARGET[half, None], TARGET[half, None, ::2]])
    value.backward()
    return value.detach(), gradients_of(net)


SCENARIOS = (batch_under_ddp, volume_under_ddp, samples_under_ddp, sums_of_gradients, fsdp)
SCENARIOS += (ranks_differ_in_their_backend, failures, no_voxels, hard, rows, modules, nnunet, nnunet_levels)


def worker(rank, world, path, results):
    torch.set_num_threads(1)
    early = {
        "lazily": tk.TverskyLoss(batch=True, process_group=True),
        "not given": tk.TverskyLoss(batch=True),
        "None": tk.TverskyLoss(batch=True, process_group=dist.group.WORLD if dist.is_initialized() else None),
    }
    before = error_of(early["lazily"], LOGITS, TARGET)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    found = {"before": before}
    for scenario in (*SCENARIOS, *((mesh,) if world == 4 else ())):
        more = (early,) if scenario is modules else ()
        try:
            found[scenario.__name__] = scenario(rank, world, *more)
        except Exception:
            found[scenario.__name__] = traceback.format_exc()
            break  # the ranks are out of step
    torch.save(found, f"{results}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What each rank found in each scenario."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    torch.multiprocessing.spawn(worker, (world, str(folder / "store"), str(folder / "results")), nprocs=world)
    found = [torch.load(f"{folder / 'results'}.{rank}") for rank in range(world)]
    for of_rank in found:
        for name, result in of_rank.items():
            assert not isinstance(result, str), f"{name}: {result}"
    return found


def check_ddp(found, whole, tolerance=1e-12):
    """Every rank has the loss of the whole, and DDP's average is its gradient."""
    loss, gradient = whole
    for value, of_rank in found:
        torch.testing.assert_close(value, loss, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(of_rank, gradient, rtol=tolerance, atol=tolerance)


def test_batch_under_ddp(ranks):
    for name, loss in PER_BATCH.items():
        whole = trained(loss, LOGITS, TARGET, batch=True)
        check_ddp([f["batch_under_ddp"][name] for f in ranks], whole)
    check_ddp([f["batch_under_ddp"]["head"] for f in ranks], trained_head(LOGITS, TARGET, batch=True))


def test_volume_under_ddp(ranks):
    assert len(ranks[0]["volume_under_ddp"]) == len(LOSSES)
    for name, found in ranks[0]["volume_under_ddp"].items():
        whole = trained_head(LOGITS, TARGET) if name == "head" else trained(PER_BATCH[name], LOGITS, TARGET)
        check_ddp([f["volume_under_ddp"][name] for f in ranks], whole)
        assert found[1].abs().sum() > 0


def test_samples_under_ddp(ranks):
    """Shards of one, three or no samples: each sample weighs the same."""
    for name, loss in LOSSES.items():
        check_ddp([f["samples_under_ddp"][name] for f in ranks], trained(loss, LOGITS, TARGET))
    check_ddp([f["samples_under_ddp"]["head"] for f in ranks], trained_head(LOGITS, TARGET))


def test_gradients_that_are_summed(ranks):
    for name, options in (("batch", {"batch": True}), ("samples", {})):
        loss, gradient = trained(LOSSES["compound"], LOGITS, TARGET, **options)
        for value, _ in (f["sums_of_gradients"][name] for f in ranks):
            torch.testing.assert_close(value, loss)
        torch.testing.assert_close(sum(f["sums_of_gradients"][name][1] for f in ranks), gradient)


def test_fsdp(ranks):
    for name, options in (("batch", {"batch": True}), ("samples", {})):
        whole = trained(LOSSES["compound"], LOGITS, TARGET, **options)
        check_ddp([f["fsdp"][name] for f in ranks], whole)


def test_mesh(ranks):
    if len(ranks) < 4:
        assert "mesh" not in ranks[0]  # it is of four
        return
    for name in ("tversky", "compound", "sum", "skip", "generalized", "reference", "head"):
        whole = trained_head(LOGITS, TARGET) if name == "head" else trained(LOSSES[name], LOGITS, TARGET)
        check_ddp([f["mesh"][name] for f in ranks], whole)
    for rank, f in enumerate(f["mesh"] for f in ranks):
        assert "process_group: expected a group that this rank is part of" in f["other group"]
        assert f["sizes"][0] == ("RankError" if rank == 2 else "ValueError")  # rank 3 meets rank 1
        assert f["label"][0] == ("ValueError" if rank == 2 else "RankError")
        assert f["after that"] == pytest.approx(tk.tversky_loss(LOGITS, TARGET).item())


def test_ranks_that_take_different_backends(ranks):
    whole = trained(LOSSES["compound"], LOGITS, TARGET, batch=True)
    check_ddp([f["ranks_differ_in_their_backend"]["compound"] for f in ranks], whole)
    counts = trained(dice_of_counts, LOGITS, TARGET, batch=True)
    check_ddp([f["ranks_differ_in_their_backend"]["counts"] for f in ranks], counts)
    dense = torch.nn.functional.one_hot(TARGET.long(), CLASSES).movedim(-1, 1).double()
    whole_dense = trained(LOSSES["compound"], LOGITS, dense, batch=True)
    check_ddp([f["ranks_differ_in_their_backend"]["dense"] for f in ranks], whole_dense)
    whole = trained(LOSSES["compound"], LOGITS.float(), TARGET, batch=True)
    check_ddp([f["ranks_differ_in_their_backend"]["float32"] for f in ranks], whole, 1e-5)


def test_what_fails_on_one_rank_raises_on_all(ranks):
    for rank, f in enumerate(f["failures"] for f in ranks):
        for name in (n for n in f if n.startswith("bad label,") and n != "bad label, unchecked"):
            kind, message = f[name]
            if rank == 1:
                assert kind == "ValueError", (name, kind, message)
                assert "expected labels in [0, 3), got 9" in message
            else:
                assert kind == "RankError", (name, kind, message)
                assert "another rank has failed in this call" in message
        assert f["bad label, unchecked"] != f["bad label, unchecked"]  # NaN everywhere
        whole = float(LOSSES["tversky"](LOGITS, TARGET, batch=True))
        assert f["after that"] == pytest.approx(whole)
        assert f["still in step"] == pytest.approx(whole)


def test_ranks_that_do_not_fit_together(ranks):
    for f in (f["failures"] for f in ranks):
        for name in ("alpha", "class_weight", "dtype", "samples' classes"):
            kind, message = f[name]
            assert kind == "ValueError", (name, message)
            assert "expected the same options" in message or "of one size" in message, name
        for name in ("classes", "function", "different samples"):
            kind, message = f[name]
            assert kind == "ValueError", (name, message)
            assert "expected tables of counts of one size on all ranks" in message
            assert "rank 1: " in message
        assert "sample_group" in f["different samples"][1]
        assert f["DTensor"][0] == "TypeError"
        assert "logits: expected a plain tensor, got a DTensor; give x.to_local()" in f["DTensor"][1]
        assert f["its shard"] == pytest.approx(tk.tversky_loss(LOGITS, TARGET).item())
        assert f["mesh"][0] == "TypeError"
        assert "mesh.get_group(name)" in f["mesh"][1]
        assert f["number"] == (
            "TypeError",
            "process_group: expected True for the default group, a torch.distributed.ProcessGroup or None, got int",
        )
        assert "expected batch=False" in f["batch of samples"][1]
        assert "expected reduction='mean' or 'sum'" in f["rows of samples"][1]
    assert ranks[0]["failures"]["twice"][0] == "NotImplementedError"


def test_a_rank_without_voxels(ranks):
    world = len(ranks)
    for name, loss in PER_BATCH.items():
        for kind, options in (("batch", {"batch": True}), ("volume", {})):
            # All but one rank hold the same whole: sums are so many times larger.
            z = torch.cat([LOGITS] * (world - 1), 0 if kind == "batch" else 3).requires_grad_()
            t = torch.cat([TARGET] * (world - 1), 0 if kind == "batch" else 2)
            if name in ("deep", "last level alone") and kind == "volume" and world > 2:
                continue  # a level of such a volume reads other voxels
            expected = loss(z, t, **options)
            for rank, f in enumerate(f["no_voxels"] for f in ranks):
                value, gradient = f[kind, name]
                torch.testing.assert_close(value, expected.detach())
                assert gradient.isfinite().all()
                assert bool(gradient.any()) == (rank != 1)


def test_hard_counts_of_slabs(ranks):
    whole = tk.hard_counts(LOGITS, TARGET)
    weighted = tk.hard_counts(LOGITS, TARGET, voxel_weight=WEIGHT, activation="sigmoid")
    for rank, f in enumerate(f["hard"] for f in ranks):
        for name in ("whole", "after that"):
            assert all(torch.equal(x, y) for x, y in zip(f[name], whole, strict=True))
        for x, y in zip(f["weighted"], weighted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        kind, message = f["bad label"]
        assert kind == ("ValueError" if rank == 1 else "RankError"), message
        assert f["threshold"][0] == "ValueError"
        assert "same options" in f["threshold"][1]
        assert f["samples"][0] == "ValueError"
        assert "tables of counts of one size" in f["samples"][1]


@pytest.mark.parametrize("name", list(ROWS))
@pytest.mark.parametrize("kind", ["volume", "batch", "samples"])
def test_regions_and_partial_labels(ranks, kind, name):
    """Each rank has the loss of the whole; the ranks' gradients add up to its gradient."""
    x = LOGITS.clone().requires_grad_()
    expected = ROWS[name](x, DRAWN, REGIONS, ANNOTATED, batch=kind == "batch")
    (true,) = torch.autograd.grad(expected, x)
    parts = [f["rows"][name, kind] for f in ranks]
    for value, _ in parts:
        torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(sum(gradient for _, gradient in parts), true)
    for rank, f in enumerate(ranks):
        error, message = f["rows"]["bad label"]
        assert error == ("ValueError" if rank == 0 else "RankError"), message


def test_modules_made_before_there_are_groups(ranks):
    whole = tk.tversky_loss(LOGITS, TARGET, batch=True)
    for rank, of_rank in enumerate(ranks):
        assert of_rank["before"][0] == "ValueError"
        assert "expected it after torch.distributed.init_process_group" in of_rank["before"][1]
        f = of_rank["modules"]
        part = SHARDS[len(ranks)][rank]
        alone = tk.tversky_loss(LOGITS[part], TARGET[part], batch=True)
        assert f["lazily"] == pytest.approx(float(whole))
        assert f["not given"] == f["None, later"] == pytest.approx(float(alone))
        kind, message = f["None"]
        assert kind == "ValueError"
        assert "process_group: it was set to None before torch.distributed.init_process_group" in message


def test_nnunets_loss_is_that_of_the_whole_batch_once_ddp_has_averaged(ranks):
    parts = [f["nnunet"] for f in ranks]
    alone = tk.compat.nnunet.DC_and_CE_loss({"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {})
    loss, gradient = loss_and_gradient(alone, LOGITS, TARGET[:, None])
    torch.testing.assert_close(sum(x for x, _ in parts) / len(ranks), loss)
    torch.testing.assert_close(torch.cat([g for _, g in parts]) / len(ranks), gradient)


def test_nnunets_levels_with_the_last_layer_within_under_ddp(ranks):
    loss, gradient = nnunet_levels(0, 1, joined=False)
    for found in ranks:
        torch.testing.assert_close(found["nnunet_levels"][0], loss)
        torch.testing.assert_close(found["nnunet_levels"][1], gradient)


def worker_beside_one_that_dies(rank, path, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=10)
    )
    tk.tversky_loss(LOGITS, TARGET, batch=True, process_group=True)
    if rank == 1:
        os._exit(0)
    started = time.monotonic()
    found = error_of(tk.tversky_loss, LOGITS, TARGET, batch=True, process_group=True)
    torch.save((found, time.monotonic() - started), results)


def test_a_rank_that_dies(tmp_path):
    """The others get an error within the group's timeout."""
    arguments = (str(tmp_path / "store"), str(tmp_path / "results"))
    torch.multiprocessing.spawn(worker_beside_one_that_dies, arguments, nprocs=2)
    (kind, message), seconds = torch.load(tmp_path / "results")
    assert "Error" in kind, message
    assert seconds < 60


def test_arguments_of_a_single_process():
    for loss in (tk.tversky_loss, tk.reference.tversky_loss, tk.generalized_dice_loss):
        with pytest.raises(ValueError, match="grad_reduction: expected one of 'mean', 'sum', got 'median'"):
            loss(LOGITS, TARGET, grad_reduction="median")
        for name in ("process_group", "sample_group"):
            with pytest.raises(ValueError, match=f"{name}: expected it after torch.distributed.init_process_group"):
                loss(LOGITS, TARGET, **{name: True})
