"""Whether two commits compile to the same GPU kernels, but for names: python tests/tools/same_code.py OLD NEW

For moving kernels without changing them. It compares the PTX of every CUDA kernel (nvcc) and of every Triton
specialisation of triton_aot.py. A kernel may have another name, file, label numbers and parameter names; its
instructions, registers, parameters and shared memory may not change. "." is the working tree as it is. Exit code 1:
something differs.

  --renamed old=new   a CUDA kernel that has another name in NEW; may be repeated
  --cuda, --triton    one of the two alone
  --arch 90           the architecture
  --all               every specialisation of Triton, not a third of them
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import difflib
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

TRITON_PTX = """
import pathlib, sys
from triton.runtime import driver
import triton_aot
out, arch, quick = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "quick"
driver.set_active(triton_aot.StubDriver(arch))
for number, case in enumerate(triton_aot.cases(quick)):
    for i, (name, compiled, _) in enumerate(triton_aot.compile_case(*case)):
        (out / f"{number:04d}_{i}_{name}.ptx").write_text(compiled.asm["ptx"])
"""


@contextlib.contextmanager
def tree_of(commit: str, where: pathlib.Path):
    """The sources of a commit."""
    if commit == ".":
        yield ROOT
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(where), commit], check=True)
    try:
        yield where
    finally:
        subprocess.run([*git, "remove", "--force", str(where)], check=True)


def cuda_ptx(tree: pathlib.Path, arch: str, out: pathlib.Path) -> str:
    """The PTX of all CUDA sources of a tree."""
    import setup_flags
    import torch

    include = pathlib.Path(torch.__file__).parent / "include"

    def one(source: pathlib.Path) -> str:
        target = out / f"{source.stem}.ptx"
        command = ["nvcc", *setup_flags.NVCC_FLAGS, "-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", include]
        command += [f"-arch=compute_{arch}", f"-DTK_CUDA_CODE=compute_{arch}", "-ptx", source, "-o", target]
        subprocess.run([str(part) for part in command], check=True)
        return target.read_text()

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return "\n".join(pool.map(one, sorted((tree / "csrc" / "cuda").glob("*.cu"))))


def kernels_of(ptx: str, renamed: dict[str, str]) -> dict[str, str]:
    """What each kernel and each function of a module is, by its name as the source has it."""
    starts = [m.start() for m in re.finditer(r"^(\.visible |\.weak )?\.(entry|func) ", ptx, re.MULTILINE)]
    found = {}
    for start, end in zip(starts, [*starts[1:], len(ptx)], strict=True):
        text = ptx[start : ptx.rfind("\n}", start, end) + 2]
        mangled = re.search(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?(\w+)", text)[1]
        readable = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
        name = re.sub(r"\(anonymous namespace\)::|_INTERNAL_\w+?::|\w*_GLOBAL__N_\w*::", "", readable)
        for old, new in renamed.items():
            name = re.sub(rf"\b{old}\b", new, name)
        found[name] = normalised(text.replace(mangled, "KERNEL"))
    return found


def normalised(ptx: str) -> str:
    """PTX without the numbers of labels, the names that a file gives, comments and line numbers."""
    ptx = re.sub(r"//.*", "", ptx)
    ptx = re.split(r"^\s*\.section\b", ptx, maxsplit=1, flags=re.MULTILINE)[0]  # what follows is for debuggers
    ptx = re.sub(r"^\s*\.(loc|file)\b.*\n|^\$L__(tmp|func)\w*:\s*\n", "", ptx, flags=re.MULTILINE)
    ptx = re.sub(r"\$L__BB\d+_", "$L_", ptx)
    # Of a symbol that the mangled names of its namespaces and its file lead, the last name.
    ptx = re.sub(r"\b_ZN?\w*?(\d+)([A-Za-z]+)E\b", r"\2", ptx)
    return "\n".join(line.rstrip() for line in ptx.splitlines() if line.strip())


def triton_ptx(tree: pathlib.Path, arch: str, quick: bool, out: pathlib.Path) -> dict[str, str]:
    """The PTX of each specialisation of a tree's Triton kernels."""
    folders = [tree, tree / "tests" / "tools", tree / "tests"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "TRITON_CACHE_DIR": str(out / "cache"),
    }
    ptx = out / "ptx"
    ptx.mkdir(parents=True)
    command = [sys.executable, "-c", TRITON_PTX, str(ptx), arch, "quick" if quick else "all"]
    subprocess.run(command, check=True, env=environment, cwd=out)
    return {path.stem: normalised(path.read_text()) for path in sorted(ptx.glob("*.ptx"))}


def compare(what: str, old: dict[str, str], new: dict[str, str]) -> bool:
    """Prints what differs; True: nothing does."""
    missing, added = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    changed = [name for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    for title, names in (("only in OLD", missing), ("only in NEW", added), ("differs", changed)):
        for name in names[:20]:
            print(f"{what}: {title}: {name}")
        if len(names) > 20:
            print(f"{what}: {title}: {len(names) - 20} more")
    for name in changed[:3]:
        print("\n".join(list(difflib.unified_diff(old[name].splitlines(), new[name].splitlines(), lineterm=""))[:30]))
    same = len(old.keys() & new.keys()) - len(changed)
    lines = sum(text.count("\n") for text in new.values())
    digest = hashlib.sha256("\0".join(f"{k}\0{v}" for k, v in sorted(new.items())).encode()).hexdigest()[:16]
    print(f"{what}: {same} of {len(new)} kernels are the same, {lines} lines of PTX, {digest}")
    return not (missing or added or changed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--renamed", action="append", default=[], metavar="old=new")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--triton", action="store_true")
    parser.add_argument("--arch", default="90")
    parser.add_argument("--all", action="store_true")
    given = parser.parse_args()
    renamed = dict(pair.split("=") for pair in given.renamed)
    both, same = given.cuda == given.triton, True
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        where = pathlib.Path(folder)
        trees = [stack.enter_context(tree_of(c, where / n)) for n, c in (("old", given.old), ("new", given.new))]
        if both or given.cuda:
            found = []
            for tree, names in zip(trees, (renamed, {}), strict=True):
                out = pathlib.Path(tempfile.mkdtemp(dir=where))
                found.append(kernels_of(cuda_ptx(tree, given.arch, out), names))
            same &= compare("CUDA", *found)
        if both or given.triton:
            outs = [pathlib.Path(tempfile.mkdtemp(dir=where)) for _ in trees]
            found = [triton_ptx(t, given.arch, not given.all, o) for t, o in zip(trees, outs, strict=True)]
            same &= compare("Triton", *found)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
