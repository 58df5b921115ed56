"""Which family takes a volume, and its block sizes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .._options import ACTIVATIONS, OVERLAPS, PassOptions

#: Up to this many classes a tile holds all of them.
ALL_CLASSES = 128
#: `PassOptions.cross_entropy` with label smoothing.
SMOOTHED = 2


#: Which family takes a volume: the first whose condition holds.
FAMILIES = (
    ("two_classes", lambda classes, softmax, general: classes == 2 and softmax and not general),
    ("all_classes", lambda classes, softmax, general: classes <= ALL_CLASSES),
    ("many_classes", lambda classes, softmax, general: True),
)


def family_of(classes: int, softmax: bool, general: bool) -> str:
    """The name of the family, which is that of its module."""
    return next(name for name, takes in FAMILIES if takes(classes, softmax, general))


def is_general(options: PassOptions, dense: bool, classes: int) -> bool:
    """Whether every class of a voxel needs a target and a term of its own."""
    softmax, squared = options.activation == ACTIVATIONS["softmax"], options.overlap == OVERLAPS["squared"]
    chunked, smoothed = classes > ALL_CLASSES, options.cross_entropy == SMOOTHED
    return (
        dense
        or (squared and (not softmax or chunked))
        or (options.cross_entropy > 0 and not softmax)
        or (smoothed and (options.focal_gamma != 0 or squared or chunked))
    )


class Plan(NamedTuple):
    """Block sizes of one pass. CHUNK: 0 where a tile holds all classes, as MAIN and TAIL (0: none) of them."""

    main: int
    tail: int
    chunk: int
    block: int
    pack: int
    num_warps: int
    programs: int  # that a multiprocessor holds at once


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def plan(
    classes: int,
    itemsize: int,
    heavy: bool = False,
    packed: bool = True,
    cross_entropy: bool = False,
    more_sums: bool = False,
) -> Plan:
    """Block sizes by the number of classes and the logits' size. A function, for autotuning needs a GPU.

    heavy: what takes about twice the registers, as a target of its own for every class. packed: the voxels lie one
    beside the other. more_sums: the cross-entropy has another sum for each class, as for label smoothing or squares.

    Few enough elements a thread that nothing spills (tests/tools/triton_aot.py reads what the compiler says), and
    pieces of a class that are as long as that allows, of 32 bytes at least. Measured on an H100.
    """
    pack = (2 if itemsize == 8 else 4) if packed else 1
    if classes == 2 and not heavy:
        half = (2 if itemsize == 8 else 1) * (2 if cross_entropy else 1)
        return Plan(2, 0, 0, 1024 // half, 16 // itemsize, 4, 4 if itemsize == 8 else 6)
    elements = (8 if itemsize == 8 else 32) // (2 if heavy or not packed else 1)
    if classes > ALL_CLASSES:
        chunk = 32
        return Plan(0, 0, chunk, 32 * elements // chunk, pack, 1, 8)
    main, tail = next_power_of_two(classes), 0
    if classes > 4 and classes <= main // 4 * 3 and not (heavy and itemsize == 8):
        main //= 2
        tail = max(4, next_power_of_two(classes - main))
    least = (2 if itemsize == 8 else 8) if heavy else 32 // itemsize
    if cross_entropy and more_sums:
        least = min(least, 8)
    block = max(32 * elements // (main if tail <= main // 4 else 2 * main), least)
    if main + tail > 40 and itemsize < 8 and packed and not heavy and not (cross_entropy and more_sums):
        # Twice the elements a thread, and whole lines of each class: in smaller pieces memory comes at half its speed.
        block, num_warps = (32, 1 if main + tail <= 64 else 2) if itemsize == 4 or main + tail > 64 else (64, 2)
        return Plan(main, tail, 0, block, pack, num_warps, 8 // num_warps)
    many_registers = heavy or block * (main + tail) > 32 * 36 or (cross_entropy and (more_sums or tail > 0))
    return Plan(main, tail, 0, block, pack, 1, 8 if many_registers else 12)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


#: A program's sums are float32, and where all voxels are alike each addition rounds the same way: no more than these.
MOST_TURNS = 128


def programs_per_sample(logits: torch.Tensor, voxels: int, plan: Plan) -> int:
    """How many programs share the tiles of one sample: what the device holds at once, or a few times that."""
    tiles = max(1, -(-voxels // plan.block))
    together = 4 if logits.device.type == "cpu" else plan.programs * _multiprocessors(logits.device.index)
    at_once = min(tiles, max(1, together // max(1, logits.size(0))))
    return min(tiles, at_once * -(-tiles // (at_once * MOST_TURNS)))


#: Elements of a tile where voxels are counted by region: 8 a thread of 4 warps.
REGION_ELEMENTS = 1024
#: Of the programs' tables together.
REGION_TABLE_BYTES = 2**26


def region_programs(logits: torch.Tensor, voxels: int, block: int, num_regions: int, columns: int) -> int:
    """How many programs share a sample whose voxels are counted by region: each has a table of all regions."""
    tiles = max(1, -(-voxels // block))
    together = 4 if logits.device.type == "cpu" else 4 * _multiprocessors(logits.device.index)
    table_bytes = num_regions * logits.size(1) * columns * 8
    fitting = max(1, REGION_TABLE_BYTES // table_bytes)
    return min(tiles, max(1, min(together, fitting) // max(1, logits.size(0))))
