"""Parts of one batch, or of one volume, on several processes are the whole."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.multiprocessing
from common import inputs, loss_and_gradient

import tversky_kernels as tk

RANKS = 2
LOGITS, TARGET = inputs(4, 3, (6, 8, 5), torch.float64)
OPTIONS = {"alpha": 0.2, "beta": 0.8, "gamma": 0.75}


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
    torch.save(found, f"{results}.{rank}")
    torch.distributed.destroy_process_group()


def test_parts_are_the_whole(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"), str(tmp_path / "results")), nprocs=RANKS)
    found = [torch.load(f"{tmp_path / 'results'}.{rank}") for rank in range(RANKS)]
    for kind, dimension, batch in (("volume", 3, False), ("batch", 0, True)):
        loss, gradient = loss_and_gradient(tk.reference.tversky_loss, LOGITS, TARGET, batch=batch, **OPTIONS)
        for backend in ("cpu", "reference"):
            parts = [f[kind, backend] for f in found]
            for part_loss, _ in parts:
                assert part_loss.item() == pytest.approx(loss.item(), rel=1e-12)
            torch.testing.assert_close(torch.cat([g for _, g in parts], dimension), gradient)
