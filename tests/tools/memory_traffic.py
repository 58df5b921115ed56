"""What the compiled kernels read, write and execute, counted on the host:

    python tests/tools/memory_traffic.py LIBRARY PTX...

LIBRARY is the host build of the CUDA kernels (tests/test_cuda_on_host.py makes one), PTX what nvcc compiled of them;
"triton:LIBRARY" counts what Triton compiles. For every kernel: PTX instructions a logit that do something; bytes of
global memory, in the sectors of 32 bytes that each load or store of a warp takes, as a multiple of what it must read
(logits and target) or write (the gradient); shared memory's turns for 32 logits, and how many times more these are than
the bytes want. A sector that several warps read is counted for each.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from typing import NamedTuple

import kernels_on_host
import torch

from tversky_kernels import functional

F, B = torch.float32, torch.bfloat16
#: classes, logits' type, and where they are others: target's type, what is asked for
CASES = [
    *((c, d, {}) for c in (2, 4, 14, 32, 33, 118, 200) for d in (F, B)),
    *((14, d, {"target": torch.int64}) for d in (F, B)),
    *((c, d, {"channels_last": True}) for c in (2, 14, 32, 33, 118) for d in (F, B)),
    *((c, d, {"dense": True}) for c in (2, 14, 33) for d in (F, B)),
    *((14, d, {"ce": True}) for d in (F, B)),
    *((14, d, {"ce": True, "label_smoothing": 0.1}) for d in (F, B)),
    *((3, d, {"activation": "sigmoid", "dense": True}) for d in (F, B)),
    *((3, d, {"activation": "sigmoid", "dense": True, "ce": True}) for d in (F, B)),
    *((3, d, {"activation": "sigmoid", "dense": True, "ce": True, "focal_gamma": 2.0}) for d in (F, B)),
    *((14, d, {"odd": True}) for d in (F, B)),
    *((c, F, {"regions": how}) for c in (2, 4, 14) for how in ("one", "slabs", "random")),
    (14, F, {"annotated": True}),
]
#: Of a volume that is cut into slabs, or whose voxels are in regions at random.
NUM_REGIONS = 60


class Row(NamedTuple):
    kernel: str
    instructions: float
    read: float
    written: float | None
    shared: float
    conflicts: float


def count(backend: str, traffic: str, classes: int, dtype: torch.dtype, options: dict) -> list[Row]:
    """A forward and a backward pass, by kernel."""
    options = dict(options)
    space = (32, 64, 64) if classes < 5 else (16, 16, 128) if classes < 100 else (16, 16, 32)
    if options.pop("odd", False):
        space = (15, 17, 31)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, classes, *space, generator=generator).to(dtype)
    if options.pop("channels_last", False):
        logits = logits.contiguous(memory_format=torch.channels_last_3d)
    target = torch.randint(0, classes, (1, *space), generator=generator)
    if options.pop("dense", False):
        target = torch.nn.functional.one_hot(target, classes).movedim(-1, 1).contiguous()
    target = target.to(options.pop("target", torch.uint8))
    if how := options.pop("regions", None):
        ids = torch.arange(target.numel()) * NUM_REGIONS // target.numel()
        if how == "random":
            ids = torch.randint(0, NUM_REGIONS, ids.shape, generator=generator)
        options |= {"regions": (0 * ids if how == "one" else ids).to(torch.uint8).view_as(target)}
        options["num_regions"] = 1 if how == "one" else NUM_REGIONS
    if options.pop("annotated", False):
        options["annotated"] = torch.arange(classes)[None] < classes // 2
        target %= classes // 2
    loss = functional.tversky_ce_loss if options.pop("ce", False) else functional.tversky_loss
    open(traffic, "w").close()
    loss(logits.requires_grad_(), target, backend=backend, **options).backward()
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    with open(traffic) as lines:
        for line in lines:
            kernel, kind, *numbers = line.rstrip("\n").split("\t")
            found.setdefault(kernel, {})[kind] = tuple(map(int, numbers))
    rows = []
    wanted = logits.nbytes + target.nbytes + getattr(options.get("regions"), "nbytes", 0)
    for kernel, kinds in found.items():
        name = re.search(r"([a-z_]*(?:count|gradient)(?:_pass)?_kernel)", kernel)
        if name is None:  # the table
            continue
        _, _, read = kinds["global loads"]
        _, _, written = kinds["global stores"]
        shared = [kinds[kind] for kind in ("shared loads", "shared stores") if kind in kinds]
        turns, asked = sum(x[2] for x in shared), sum(x[1] for x in shared)
        rows.append(
            Row(
                name[1].lstrip("_"),
                kinds["instructions"][0] / logits.numel(),
                32 * read / wanted,
                32 * written / logits.nbytes if "gradient" in name[1] else None,
                32 * turns / logits.numel(),
                128 * turns / asked if asked else 1.0,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("ptx", nargs="*")
    parser.add_argument("--quick", action="store_true", help="contiguous logits and class indices alone")
    arguments = parser.parse_args()
    with tempfile.NamedTemporaryFile() as file:
        # Read by the library at its first launch.
        os.environ["TK_EMULATION_TRAFFIC"] = file.name
        os.environ["TK_EMULATION_PTX"] = ":".join(arguments.ptx)
        backend = kernels_on_host.use(arguments.library)
        for classes, dtype, options in CASES:
            if arguments.quick and (options or classes > 118):
                continue
            for row in count(backend, file.name, classes, dtype, options):
                about = " ".join(
                    str(v if k in ("target", "activation", "regions") else k).split(".")[-1] for k, v in options.items()
                )
                written = "" if row.written is None else f"{row.written:.3f}"
                print(
                    f"{row.kernel:34} C={classes:<3} {str(dtype)[6:]:8} {about:28} {row.instructions:6.1f} instructions"
                    f", read {row.read:.3f}, written {written:5}, shared {row.shared:5.2f} x {row.conflicts:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
