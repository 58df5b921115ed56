"""Which transforms of torch.func are at work."""

from __future__ import annotations

import torch

VMAP = torch._C._functorch.TransformType.Vmap
JVP = torch._C._functorch.TransformType.Jvp


def active_transforms() -> set:
    """The kinds of the transforms that are active, VMAP and JVP among them; empty outside of all."""
    if not torch._C._are_functorch_transforms_active():
        return set()
    return {x.key() for x in torch._C._functorch.get_interpreter_stack() or ()}
