"""Trains the FCN on patches with any loss, keeps checkpoints, and segments whole volumes."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from fcn import FCN
from monai.inferers import sliding_window_inference
from patches import PatchDataset
from recipes import Loss, Sampling
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from volumes import Volume

CHECKPOINT_FORMAT = 2
#: The loss is read back from the device, and checked, once in so many steps.
READ_EVERY = 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is but for its data and its loss. The defaults are the paper's where it gives them."""

    steps: int = 1000
    batch_size: int = 1
    patch_size: tuple[int, int, int] = (48, 48, 48)
    sampling: Sampling = "balanced"
    lesion_share: float = 0.5
    lr: float = 1e-4
    decay_every: int = 1000  # steps, after which the learning rate is 0.9 of what it was
    features: int = 16
    levels: int = 4
    norm: str = "none"
    overlap: float = 0.5  # of the windows when a whole volume is segmented
    amp: bool = False
    seed: int = 0
    device: str = "cpu"
    workers: int = 0


@contextlib.contextmanager
def in_new_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to, which takes the real name when all is written: never half a file under that name."""
    temporary = path.with_suffix(".tmp")
    yield temporary
    temporary.replace(path)


def rank_of_process() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class Trainer:
    """One network on one fold. identity: what must be the same for a checkpoint to be continued.

    Where torch.distributed is initialised, each rank takes its share of every batch. A loss of this package, with
    ``batch=True``, is then that of the whole batch, and the weights are those of one process but for rounding.
    """

    def __init__(
        self,
        settings: Settings,
        loss: Loss,
        volumes: Sequence[Volume],
        fold: int = 0,
        checkpoint: pathlib.Path | None = None,
        identity: dict | None = None,
        checkpoint_every: int = 50,
    ):
        torch.manual_seed(settings.seed * 1000 + fold)
        self.rank, self.ranks = rank_of_process()
        if settings.batch_size % self.ranks:
            raise SystemExit(f"--batch-size: expected a multiple of the {self.ranks} ranks, got {settings.batch_size}")
        if self.ranks > 1 and hasattr(loss, "process_group"):
            loss.process_group = True
        self.settings, self.loss, self.fold = settings, loss, fold
        self.checkpoint, self.identity, self.checkpoint_every = checkpoint, identity or {}, checkpoint_every
        inputs = volumes[0].image.shape[0]
        self.network = FCN(inputs, 2, settings.features, settings.levels, settings.norm).to(settings.device)
        self.model = self._wrapped()
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=settings.lr)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimiser, settings.decay_every, 0.9)
        # Cards without bfloat16 take float16, whose loss scaling waits for the card at every step.
        on_old_card = settings.device.startswith("cuda") and not torch.cuda.is_bf16_supported()
        self.half = torch.float16 if on_old_card else torch.bfloat16
        self.scaler = torch.amp.GradScaler(enabled=settings.amp and self.half == torch.float16)
        self.patches = PatchDataset(
            volumes,
            settings.patch_size,
            settings.batch_size,
            settings.steps,
            settings.sampling,
            settings.lesion_share,
            key=(settings.seed, fold),
        )
        self.step, self.log, self.seconds = 0, [], 0.0
        self._unread: list[torch.Tensor] = []
        self._head_alone = False

    def _wrapped(self) -> torch.nn.Module:
        return DistributedDataParallel(self.network) if self.ranks > 1 else self.network

    def logits(self, image: torch.Tensor, network: torch.nn.Module | None = None) -> torch.Tensor:
        with torch.autocast(image.device.type, self.half, enabled=self.settings.amp):
            return (network or self.network)(image)

    def first_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = next(self.patches.batches(0))
        return image.to(self.settings.device), label.to(self.settings.device)

    def train(self, progress: bool = True) -> None:
        started = time.perf_counter()
        with tqdm(
            total=self.settings.steps,
            initial=self.step,
            desc=f"fold {self.fold}",
            unit="step",
            disable=not progress or self.rank > 0,
        ) as bar:
            for image, label in self.patches.batches(self.step, self.settings.workers, self.rank, self.ranks):
                self._train_step(image, label)
                bar.update()
                if len(self._unread) == READ_EVERY:
                    self._read_losses()
                    bar.set_postfix(loss=f"{np.mean([row[2] for row in self.log[-READ_EVERY:]]):.3f}")
                if self.checkpoint and self.step % self.checkpoint_every == 0:
                    self.save()
        self._read_losses()
        self.seconds += time.perf_counter() - started
        self.save()

    def _train_step(self, image: torch.Tensor, label: torch.Tensor) -> None:
        if self.settings.sampling == "two-step" and self.step >= self.settings.steps // 2 and not self._head_alone:
            self.network.requires_grad_(False)
            self.network.head.requires_grad_(True)
            self._head_alone, self.model = True, self._wrapped()  # DDP waits for what required a gradient before
        image = image.to(self.settings.device, non_blocking=True)
        label = label.to(self.settings.device, non_blocking=True)
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.loss(self.logits(image, self.model), label)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self._unread.append(loss.detach())
        self.step += 1
        self.log.append((self.fold, self.step, None, self.schedule.get_last_lr()[0]))
        self.schedule.step()

    def _read_losses(self) -> None:
        """One synchronisation for many steps."""
        if not self._unread:
            return
        losses = torch.stack(self._unread).double().tolist()
        self._unread.clear()
        for i, loss in enumerate(losses, start=len(self.log) - len(losses)):
            fold, step, _, rate = self.log[i]
            if not np.isfinite(loss):
                raise SystemExit(f"fold {fold}, step {step}: the loss is {loss}; stopped")
            self.log[i] = (fold, step, loss, rate)

    def save(self) -> None:
        if self.checkpoint is None:
            return
        self._read_losses()
        if self.rank > 0:
            return
        with in_new_file(self.checkpoint) as path:
            torch.save(
                {
                    "format": CHECKPOINT_FORMAT,
                    "identity": self.identity,
                    "step": self.step,
                    "log": self.log,
                    "seconds": self.seconds,
                    "network": self.network.state_dict(),
                    "optimiser": self.optimiser.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "scaler": self.scaler.state_dict(),
                },
                path,
            )

    def resume(self) -> None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        try:
            state = torch.load(self.checkpoint, map_location=self.settings.device, weights_only=True)
            differing = ["format"] if state["format"] != CHECKPOINT_FORMAT else []
            differing += sorted(k for k, v in self.identity.items() if state.get("identity", {}).get(k) != v)
        except Exception as error:  # whatever unpickling stumbles over
            raise SystemExit(f"{self.checkpoint}: not a readable checkpoint: {error}") from error
        if differing:
            raise SystemExit(f"{self.checkpoint}: it is of a run with other settings ({', '.join(differing)})")
        self.step, self.log, self.seconds = state["step"], [tuple(row) for row in state["log"]], state["seconds"]
        for name in ("network", "optimiser", "schedule", "scaler"):
            getattr(self, name).load_state_dict(state[name])

    @torch.no_grad()
    def predict(self, volume: Volume) -> np.ndarray:
        """The lesion's probability in every voxel of a whole volume, by overlapping windows."""
        self.network.eval()
        probability = sliding_window_inference(
            volume.image[None].to(self.settings.device),
            self.settings.patch_size,
            4,
            lambda x: self.logits(x).float().softmax(1)[:, 1:],
            overlap=self.settings.overlap,
            mode="gaussian",
        )
        self.network.train()
        return probability[0, 0].cpu().numpy()
