"""Parts of one batch, or of one volume, on several processes are the whole."""

from __future__ import annotations

import datetime

import torch
import torch.multiprocessing
from common import inputs, loss_and_gradient

import tversky_kernels as tk

RANKS = 2
LOGITS, TARGET = inputs(4, 3, (6, 8, 5), torch.float64)
OPTIONS = {"alpha": 0.2, "beta": 0.8, "gamma": 0.75}


COMPOUND = {**OPTIONS, "ce_class_weight": [1.0, 2.0, 3.0], "label_smoothing": 0.1, "ce_weight": 0.5}


def dice_of_counts(logits, target, **options):
    tp, fp, fn = tk.overlap_counts(logits, target, **options)
    return ((fp + fn) / (2 * tp + fp + fn)).mean()


def loss_with_head(features, target, **options):
    weight = torch.tensor([[1.0, 0.2, -0.3], [-0.5, 1.0, 0.1]], dtype=torch.float64)
    return tk.linear_tversky_loss(features, weight, None, target.clamp(max=1), **OPTIONS, **options)


def check_parts(parts, loss, gradient, dimension=0):
    for part_loss, _ in parts:
        torch.testing.assert_close(part_loss, loss)
    torch.testing.assert_close(torch.cat([g for _, g in parts], dimension), gradient)


def worker(rank, path, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
    )
    group = torch.distributed.group.WORLD
    found = {}
    for backend in ("cpu", "reference"):
        slab = slice(rank * 4, rank * 4 + 4)
        found["volume", backend] = loss_and_gradient(
            tk.tversky_loss, LOGITS[:, :, :, slab], TARGET[:, :, slab], process_group=group, backend=backend, **OPTIONS
        )
        part = slice(0, 1) if rank == 0 else slice(1, 4)
        found["batch", backend] = loss_and_gradient(
            tk.tversky_loss, LOGITS[part], TARGET[part], batch=True, process_group=group, backend=backend, **OPTIONS
        )
        found["compound", backend] = loss_and_gradient(
            tk.tversky_ce_loss, LOGITS[part], TARGET[part], batch=True, process_group=group, backend=backend, **COMPOUND
        )
        found["counts", backend] = loss_and_gradient(
            dice_of_counts, LOGITS[:, :, :, slab], TARGET[:, :, slab], process_group=group, backend=backend
        )
        found["head", backend] = loss_and_gradient(
            loss_with_head, LOGITS[:, :, :, slab], TARGET[:, :, slab], process_group=group, backend=backend
        )
    # nnU-Net sums the gradient over the ranks too, for DDP divides it by their number.
    half = slice(rank * 2, rank * 2 + 2)
    nnunet = tk.compat.nnunet.DC_and_CE_loss({"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": True}, {})
    found["nnU-Net"] = loss_and_gradient(nnunet, LOGITS[half], TARGET[half, None])
    torch.save(found, f"{results}.{rank}")
    torch.distributed.destroy_process_group()


def test_parts_are_the_whole(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"), str(tmp_path / "results")), nprocs=RANKS)
    found = [torch.load(f"{tmp_path / 'results'}.{rank}") for rank in range(RANKS)]
    for backend in ("cpu", "reference"):
        for kind, dimension, batch in (("volume", 3, False), ("batch", 0, True)):
            whole = loss_and_gradient(tk.reference.tversky_loss, LOGITS, TARGET, batch=batch, **OPTIONS)
            check_parts([f[kind, backend] for f in found], *whole, dimension)
        whole = loss_and_gradient(tk.reference.tversky_ce_loss, LOGITS, TARGET, batch=True, **COMPOUND)
        check_parts([f["compound", backend] for f in found], *whole)
        whole = loss_and_gradient(dice_of_counts, LOGITS, TARGET, backend="reference")
        check_parts([f["counts", backend] for f in found], *whole, 3)
        whole = loss_and_gradient(loss_with_head, LOGITS, TARGET, backend="reference")
        check_parts([f["head", backend] for f in found], *whole, 3)


def test_nnunets_loss_is_that_of_the_whole_batch_once_ddp_has_averaged(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"), str(tmp_path / "results")), nprocs=RANKS)
    parts = [torch.load(f"{tmp_path / 'results'}.{rank}")["nnU-Net"] for rank in range(RANKS)]
    alone = tk.compat.nnunet.DC_and_CE_loss({"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {})
    loss, gradient = loss_and_gradient(alone, LOGITS, TARGET[:, None])
    torch.testing.assert_close(sum(x for x, _ in parts) / RANKS, loss)
    torch.testing.assert_close(torch.cat([g for _, g in parts]) / RANKS, gradient)
