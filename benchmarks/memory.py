"""Peak memory of a loss, twice: what torch's allocator held, and on Linux what the process held.

The second sees what the kernels allocate without torch. It runs in a process of its own, in which glibc and our kernels
give memory back to the system at once: python -m benchmarks.memory CASE PROVIDER prints both as JSON.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import torch

from examples.loss_cost import peak_bytes

STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")

GIVE_BACK_AT_ONCE = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "TVERSKY_KERNELS_KEEP_GRADIENT": "0",
}


def _status(field: str) -> int:
    (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def process_peak_bytes(function) -> int | None:
    """How far the process's resident memory rose during the call; None where the system does not tell."""
    try:
        CLEAR.write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
    except OSError:
        return None
    function()
    return _status("VmHWM") - before


def measure(case, loss) -> dict[str, float | None]:
    """MiB beyond the inputs: of the loss's forward alone, and of forward and backward."""
    logits, target = case.inputs(seed=0)

    def forward():
        with torch.no_grad():
            loss(logits, target)

    def both():
        loss(logits.requires_grad_(), target).backward()

    found = {}
    for name, function in (("forward", forward), ("both", both)):
        function()  # what is made once (threads, caches, compiled code) does not count
        logits = case.inputs(seed=0)[0]
        resident = process_peak_bytes(function) if logits.device.type == "cpu" else None
        logits = case.inputs(seed=0)[0]
        found[f"{name}_allocator_mib"] = peak_bytes(function, logits.device) / 2**20
        found[f"{name}_process_mib"] = None if resident is None else resident / 2**20
    return found


def measure_in_own_process(case, provider: str) -> dict[str, float | None]:
    """`measure` of a provider's loss, in a process that has run nothing else."""
    environment = {**os.environ, **GIVE_BACK_AT_ONCE}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", case.name, provider]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"exit {run.returncode}")
    return json.loads(run.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    from benchmarks.cases import Case
    from benchmarks.providers import PROVIDERS

    asked = Case.parse(sys.argv[1])
    print(json.dumps(measure(asked, PROVIDERS[sys.argv[2]].make(asked))))
