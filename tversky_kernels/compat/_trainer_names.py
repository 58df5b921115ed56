"""The names of the nnU-Net trainers, and what each computes: readable where nnunetv2 is not installed."""

from __future__ import annotations

import re
from typing import NamedTuple

PREFIX = "nnUNetTrainer"

#: The losses by their part of a trainer's name, as options of `tversky_ce_loss`.
LOSSES = {
    "TverskyKernels": {"alpha": 0.5, "beta": 0.5, "ce_weight": 1.0},
    "Tversky_3_7": {"alpha": 0.3, "beta": 0.7},
    "Tversky_2_8": {"alpha": 0.2, "beta": 0.8},
    "FocalTversky": {"alpha": 0.3, "beta": 0.7, "gamma": 0.75},
    "TverskyCE_3_7": {"alpha": 0.3, "beta": 0.7, "ce_weight": 1.0},
    "TverskyCE_2_8": {"alpha": 0.2, "beta": 0.8, "ce_weight": 1.0},
}
#: nnU-Net's default.
DEFAULT = "TverskyKernels"

_NAME = re.compile(rf"{PREFIX}({'|'.join(LOSSES)})(?:_(Batch|Sample))?(_Weighted)?(_Head)?")


class Settings(NamedTuple):
    """What a trainer's name says. batch: None leaves it to the plans."""

    loss: str
    batch: bool | None
    weighted: bool
    head: bool


def settings_of(name: str) -> Settings | None:
    """The settings, or None where no trainer has this name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    loss, batch, weighted, head = found.groups()
    return Settings(loss, None if batch is None else batch == "Batch", weighted is not None, head is not None)


#: All names.
FAMILY = tuple(
    f"{PREFIX}{loss}{batch}{weighted}{head}"
    for loss in LOSSES
    for batch in ("", "_Batch", "_Sample")
    for weighted in ("", "_Weighted")
    for head in ("", "_Head")
)
