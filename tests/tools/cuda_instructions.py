"""Instructions a logit of the CUDA kernels in registers, without a GPU: python tests/tools/cuda_instructions.py.

Counted is the shortest way through a kernel's main loop that reads uint8 labels (or a dense uint8 target) in whole
loads and, in the gradient pass, stores: all voxels count, none has a weight, and no logit is huge. What the lanes that
share a voxel combine is not counted, or (dense targets: a loop) once, as by two lanes. What a multiprocessor can issue
while the bytes arrive is in docs/lab_notes.md.
"""

from __future__ import annotations

import argparse
import heapq
import pathlib
import re
import shutil
import subprocess
import sys

import tversky_kernels as tk

LIBRARY = pathlib.Path(tk.__file__).parent / "_C_cuda.so"
KERNEL = re.compile(
    r"\d(?P<kernel>(?:(?:dense_)?split_)?(?:count|gradient)_pass_kernel)I(?P<type>f|N3c108BFloat16|N3c104Half)E?"
    r"Li(?P<classes>\d+)EL(?:b|NS_12CrossEntropyE)(?P<ce>[012])E(?:Lb(?P<squared>[01])EL[bi](?P<interleaved>\d)E)?"
)
#: By the number of enum class CrossEntropy.
CROSS_ENTROPIES = ("", "+ ce", "+ smoothed ce")
TYPES = {"f": ("float32", 4), "N3c108BFloat16": ("bfloat16", 2), "N3c104Half": ("float16", 2)}


def cuda_tool(name: str) -> pathlib.Path | str | None:
    """A tool of the CUDA toolkit, or Triton's copy of it; None: there is neither."""
    if found := shutil.which(name):
        return found
    try:
        import triton
    except ImportError:
        return None
    return pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def ptx_files(where: pathlib.Path) -> list[pathlib.Path]:
    """Extracts the PTX of the library's kernels to this folder; none: it has none, or there is no tool for it."""
    tool = cuda_tool("cuobjdump")
    if tool is None or not LIBRARY.exists():
        return []
    subprocess.run([tool, "-xptx", "all", LIBRARY], cwd=where, capture_output=True, text=True, check=True)
    return sorted(path for path in where.glob("*.ptx") if ".entry" in path.read_text())


def functions(library: pathlib.Path, arch: str) -> dict[str, list[tuple[int, str]]]:
    """By name, the addresses and instructions of every kernel."""
    command = [cuda_tool("cuobjdump"), "-sass", "-arch", f"sm_{arch}", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in text.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        lines = re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", body)
        found[name.strip()] = [(int(x[1], 16), x[2].strip()) for x in lines]
    return found


def shortest_way(instructions: list[tuple[int, str]], through: list[str]) -> int | None:
    """Instructions of the shortest way through the longest loop on which each of these patterns is found."""
    index = {address: i for i, (address, _) in enumerate(instructions)}
    following: list[list[int]] = []
    loop = (0, 0)
    for i, (_, text) in enumerate(instructions):
        operation = re.sub(r"^@!?U?P\w+\s+", "", text)
        always = operation == text
        after = [i + 1] if i + 1 < len(instructions) else []
        branch = re.match(r"BRA\b(\S*)\s.*?0x([0-9a-f]+)$", operation)
        if branch and ".DIV" not in branch[1]:
            target = index[int(branch[2], 16)]
            conditional = not always or re.match(r"BRA\S*\s+!?U?P\d", operation)
            following.append([target, *(after if conditional else [])])
            # Behind the last EXIT is what a divergent shuffle jumps to, and from there back.
            if i - target > loop[1] - loop[0] and not any("EXIT" in text for _, text in instructions[target:i]):
                loop = (target, i)
        else:
            following.append([] if operation.startswith("EXIT") and always else after)
    first, last = loop

    def passed(i: int, before: int) -> int:
        return before | sum(1 << n for n, pattern in enumerate(through) if re.match(pattern, instructions[i][1]))

    start = (first, passed(first, 0))
    shortest, queue = {start: 1}, [(1, start)]
    while queue:
        steps, here = heapq.heappop(queue)
        if here == (last, (1 << len(through)) - 1):
            return steps
        for i in following[here[0]]:
            there = (i, passed(i, here[1]))
            if first < i <= last and steps + 1 < shortest.get(there, sys.maxsize):
                shortest[there] = steps + 1
                heapq.heappush(queue, (steps + 1, there))
    return None


def counts(library: pathlib.Path = LIBRARY, arch: str = "90") -> dict[tuple[str, str, int, str, bool, int], float]:
    """Instructions a logit by kernel, type, classes (of a lane, where they are split), cross-entropy, squares and turns
    (0: contiguous; of channels_last only kernels of split classes)."""
    found = {}
    for name, instructions in functions(library, arch).items():
        kernel = KERNEL.search(name)
        if kernel is None:
            continue
        turns = int(kernel["interleaved"] or 0)
        if turns and "split" not in kernel["kernel"]:
            continue
        dtype, size = TYPES[kernel["type"]]
        classes, ce, squared = int(kernel["classes"]), CROSS_ENTROPIES[int(kernel["ce"])], kernel["squared"] == "1"
        split, dense = "split" in kernel["kernel"], "dense" in kernel["kernel"]
        # As kVoxelsOf, kSplitVoxels, kAhead and kDenseAhead in csrc/cuda.
        voxels = 4 if split else 16 // size if 16 // size * classes <= (16 if ce else 32) else 8 // size
        ahead = split and (size == 2 or "count" in kernel["kernel"]) and not (dense and classes == 2)
        load = "LDGSTS" if ahead else "LDG"
        width = "" if voxels == 4 else r"\.64"
        target = rf"(@!?P\d )?{load}\.E{width}(\.CONSTANT)? "
        pieces = [r"(@!?P\d )?LDGSTS\.E\.BYPASS\.128 "] if turns else [r"PRMT .*0x444"] if dense else []
        if turns:
            target = r"(@!?P\d )?LDG(STS)?\.E(\.CONSTANT)? "
        stores = [r"(@!?P\d )?STG\.E\.EF\.(128|64) "] if "gradient" in kernel["kernel"] else []
        way = shortest_way(instructions, [target, *pieces, *stores])
        if way is not None:
            found[kernel["kernel"], dtype, classes, ce, squared, turns] = way / (voxels * classes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90", help="default: %(default)s")
    parser.add_argument("--library", type=pathlib.Path, default=LIBRARY)
    arguments = parser.parse_args()
    for (kernel, dtype, classes, ce, squared, turns), a_logit in sorted(
        counts(arguments.library, arguments.arch).items()
    ):
        options = f"{ce} {'squared' if squared else ''} {f'channels_last, {turns} in turn' if turns else ''}"
        print(f"{kernel:32} {dtype:9} C={classes} {options:30} {a_logit:5.1f}")


if __name__ == "__main__":
    main()
