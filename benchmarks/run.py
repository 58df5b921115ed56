"""Compares losses: python -m benchmarks.run, or make bench. Rows are appended to benchmarks/results/*.csv.

Every case measures, in one run and taking turns in random order: each provider forward and backward, a copy of the
logits (what the machine can move), and the first touch of a fresh buffer of their size (what a fresh gradient costs by
itself). Before each timing the logits are written anew, as a network would have, so that nobody finds them warmer than
another. The figure "x floor" is in multiples of 3U + 2T bytes, the fewest that forward and backward can move, at the
copy's speed. On a card (--device cuda) times are its own, from the first kernel to the last (benchmarks/timing.py), the
host's until the call returns stand beside them, and the copy is of a buffer far larger than the caches.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys

import torch
from tqdm import tqdm

import tversky_kernels as tk
from benchmarks.cases import SETS, Case
from benchmarks.memory import measure, measure_in_own_process
from benchmarks.providers import DICE_CE, FOCAL, PROVIDERS, SMOOTHED, SQUARED, TASKS, TVERSKY, Provider
from benchmarks.results_table import ResultsTable
from benchmarks.timing import Timing, spread, timed

FIELDS = [
    *("date", "commit", "machine", "cores", "threads", "torch", "task", "case", "provider", "version", "status"),
    *("milliseconds", "spread", "times_floor", "copy_ms", "first_touch_ms", "loss_error", "gradient_error"),
    *("forward_allocator_mib", "forward_process_mib", "both_allocator_mib", "both_process_mib"),
]
#: Of a card's table, besides: the median time until forward and backward have returned.
CARD_FIELDS = [*FIELDS, "host_milliseconds"]
LOSS_SCALE = 2.0**15
#: What a card reads and writes to show its speed.
CARD_COPY_BYTES = 2**31
#: Copies of the logits in float64 that our reference holds at its peak.
REFERENCE_COPIES = 15
OURS = {
    TVERSKY: "ours",
    DICE_CE: "our Dice + CE",
    SQUARED: "our squared Dice",
    SMOOTHED: "our Dice + smoothed CE",
    FOCAL: "our Dice + focal CE",
}


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The commit, marked where the code is not its own; rows that were appended since are no code."""
    described = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True).stdout.strip()
    changes = ["git", "diff", "--quiet", "HEAD", "--", ":(top)", ":(top,exclude)benchmarks/results"]
    changed = subprocess.run(changes, capture_output=True).returncode != 0
    return described + "-dirty" * changed if described else "unknown"


def describe_run() -> dict:
    """When, of which code and where: what every row says first."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "machine": machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def errors(case: Case, provider: Provider, loss, logits, target) -> tuple[float, float]:
    """Relative errors of the loss and of the gradient (L2) against the provider's own definition in float64."""
    z = logits.double().requires_grad_()
    options = {"alpha": 0.3, "beta": 0.7, "ce_weight": 0.0, "activation": case.activation, **provider.truth}
    true = tk.reference.tversky_ce_loss(z, target, **options) + provider.offset
    (true_gradient,) = torch.autograd.grad(true, z)
    z = logits.clone().requires_grad_()
    value = loss(z, target)
    # As a training in float16 does: without a scale most gradients are too small for its numbers.
    scale = LOSS_SCALE if logits.dtype == torch.float16 else 1.0
    (gradient,) = torch.autograd.grad(value.float() * scale if scale != 1.0 else value, z)
    return (
        abs(value.item() - true.item()) / max(abs(true.item()), 1e-30),
        ((gradient.double() / scale - true_gradient).norm() / true_gradient.norm()).item(),
    )


def checked_inputs(case: Case, source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """These, or a smaller volume of the kind where our reference in float64 would not fit on the card."""
    if case.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        while source.numel() * 8 * REFERENCE_COPIES > free / 2:
            case = dataclasses.replace(case, side=case.side // 2)
            source, target = case.inputs(seed=0)
    return source, target


def run_case(
    case: Case, names: list[str], repeats: int, memory: bool, bar: tqdm | None = None, check: bool = True
) -> list[dict]:
    """A row for each provider. check: hold each to its definition in float64, which takes some 30 copies of memory."""
    if case.device == "cuda":
        torch.cuda.empty_cache()  # the blocks of the case before have other sizes
    source, target = case.inputs(seed=0)
    to_check = checked_inputs(case, source, target) if check else ()
    limits = {"float64": (1e-9, 1e-9), "float32": (1e-4, 1e-4)}.get(case.dtype, (2e-2, 2e-2))
    rows, runners = {}, {}
    for name in names:
        provider = PROVIDERS[name]
        row = rows[name] = {
            "task": provider.task, "case": case.name, "provider": name, "version": provider.version, "status": "ok",
        }  # fmt: skip
        try:
            loss = provider.make(case)
            if check:
                row["loss_error"], row["gradient_error"] = errors(case, provider, loss, *to_check)
                if not (row["loss_error"] <= limits[0] and row["gradient_error"] <= limits[1]):
                    row["status"] = "wrong"
                    continue
            runners[name] = loss
        except ImportError as error:
            row["status"] = f"missing: {error.name}"
        except Exception as error:  # a peer's failure is a result, not ours to die of
            row["status"] = f"failed: {type(error).__name__}"

    del to_check
    logits, block = torch.empty_like(source), None
    if case.device == "cuda":  # what no cache helps is copied instead of the logits, and its time scaled to them
        block = torch.empty(CARD_COPY_BYTES // 2, dtype=torch.uint8, device=source.device).random_()
    other = torch.empty_like(source if block is None else block)

    def fresh(requires_grad: bool = False) -> tuple[torch.Tensor]:
        nonlocal logits
        logits = logits.detach().copy_(source).requires_grad_(requires_grad)
        return (logits,)

    functions = {name: lambda z, loss=loss: loss(z, target).backward() for name, loss in runners.items()}
    functions["copy"] = lambda z: other.copy_(z if block is None else block)
    functions["touch"] = lambda z: torch.empty_like(z).fill_(1.0)
    found: dict[str, list[Timing]] = {name: [] for name in functions}
    for repeat in range(repeats + 2):  # two to warm up
        for name in random.sample(list(functions), len(functions)):  # nobody always follows the same one
            try:
                taken = timed(functions[name], functools.partial(fresh, name in runners), case.device)
            except Exception as error:
                if name not in runners:
                    raise
                rows[name]["status"] = f"failed: {type(error).__name__}"
                del functions[name], runners[name], found[name]
                continue
            finally:
                logits.grad = None
            if repeat >= 2:
                found[name].append(taken)
        if bar is not None:
            bar.update()
    copy, touch = (statistics.median(t.work for t in found[name]) for name in ("copy", "touch"))
    copy *= source.nbytes / other.nbytes
    for name in runners:
        row, times = rows[name], [t.work for t in found[name]]
        row["milliseconds"] = 1e3 * statistics.median(times)
        row["spread"] = spread(times)
        row["times_floor"] = statistics.median(times) / (copy * case.floor_copies)
        if case.device == "cuda":
            row["host_milliseconds"] = 1e3 * statistics.median(t.host for t in found[name])
    if memory:
        for name in runners:
            try:
                # A card's allocator tells by itself; a process a provider would take longer than everything else.
                of_card = case.device == "cuda"
                rows[name].update(measure(case, runners[name]) if of_card else measure_in_own_process(case, name))
            except RuntimeError as error:
                tqdm.write(f"{case.name}, {name}: memory not measured: {error}")
    for row in rows.values():
        row.update(copy_ms=1e3 * copy, first_touch_ms=1e3 * touch)
    return list(rows.values())


def compile_all(cases: list[Case], names: list[str], share: tuple[int, int]) -> None:
    """Runs each provider on each case once, every n-th of them from the k-th on: what is compiled stays in caches."""
    k, n = share
    for case, name in [(c, p) for c in cases for p in names if PROVIDERS[p].suits(c)][k::n]:
        source, target = case.inputs(seed=0)
        try:
            PROVIDERS[name].make(case)(source.requires_grad_(), target).backward()
        except Exception as error:  # the measurement tells
            print(f"{case.name}, {name}: {type(error).__name__}")


def share_of(text: str) -> tuple[int, int]:
    """k/n with 0 <= k < n."""
    k, n = (int(x) for x in text.split("/"))
    if not 0 <= k < n:
        raise ValueError(text)
    return k, n


def print_case(case: Case, rows: list[dict]) -> None:
    first = rows[0]
    print(
        f"\n{case.name}: a copy takes {first['copy_ms']:.3f} ms, so the floor is "
        f"{first['copy_ms'] * case.floor_copies:.3f} ms; "
        f"first touch of a fresh gradient {first['first_touch_ms']:.3f} ms"
    )
    ours = next((r["milliseconds"] for r in rows if r["provider"] in OURS.values() and "milliseconds" in r), None)
    header = f"  {'provider':32} {'ms':>9} {'+-':>5} {'x floor':>8} {'x ours':>7} {'loss err':>9} {'grad err':>9}"
    print(header + f" {'fwd MiB':>8} {'MiB':>8} {'copies':>7}" + f" {'host ms':>8}" * (case.device == "cuda"))
    for r in sorted(rows, key=lambda r: r.get("milliseconds", float("inf"))):
        line = f"  {r['provider']:32} "
        if "milliseconds" not in r:
            print(
                line
                + r["status"]
                + (f": errors {r['loss_error']:.1e}, {r['gradient_error']:.1e}" if r["status"] == "wrong" else "")
            )
            continue
        line += f"{r['milliseconds']:9.3f} {100 * r['spread']:4.0f}% {r['times_floor']:8.2f} "
        line += f"{r['milliseconds'] / ours:7.2f} " if ours else " " * 8
        if "loss_error" in r:
            line += f"{r['loss_error']:9.1e} {r['gradient_error']:9.1e}"
        if "both_allocator_mib" in r:
            forward = max(r["forward_allocator_mib"], r["forward_process_mib"] or 0)
            both = max(r["both_allocator_mib"], r["both_process_mib"] or 0)
            line += f" {forward:8.2f} {both:8.2f} {both * 2**20 / case.logits_bytes:7.2f}"
        if "host_milliseconds" in r:
            line = f"{line:120} {r['host_milliseconds']:8.3f}"
        print(line)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--task", choices=TASKS, default=TVERSKY, help="what all are asked for; default: %(default)s")
    parser.add_argument("--set", choices=[s for s in SETS if s != "quick"], help="of cases; default: core, or plain")
    parser.add_argument("--quick", action="store_true", help="three small cases and few repeats; under two minutes")
    parser.add_argument("--case", action="append", metavar="NAME", help="for example 1x4x128^3,float32,uint8,cpu")
    parser.add_argument("--provider", action="append", choices=list(PROVIDERS), metavar="NAME", help="default: all")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"), metavar="DIR")
    parser.add_argument(
        "--compile-only", type=share_of, metavar="K/N", help="run everything once and stop: share K of N, from 0"
    )
    parser.add_argument("--list", action="store_true", help="print the providers and stop")
    arguments = parser.parse_args()
    try:
        arguments.cases = [Case.parse(c) for c in arguments.case or ()]
    except ValueError:
        parser.error(f"--case: expected names like 1x4x128^3,float32,uint8,cpu, got {arguments.case}")
    if arguments.repeats < 2:
        parser.error(f"--repeats: expected at least 2, got {arguments.repeats}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    names = arguments.provider or [n for n, p in PROVIDERS.items() if p.task == arguments.task]
    if arguments.list:
        print("\n".join(names))
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda: torch finds no CUDA device", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    usual = "core" if arguments.task == TVERSKY else "plain"
    cases = arguments.cases or SETS["quick" if arguments.quick else arguments.set or usual](arguments.device)
    repeats = min(arguments.repeats, 7) if arguments.quick else arguments.repeats
    memory = not arguments.no_memory and not arguments.quick
    if arguments.compile_only:
        compile_all(cases, names, arguments.compile_only)
        return 0
    run = describe_run()
    print(f"{run['machine']}, {run['cores']} cores, {run['threads']} threads, torch {run['torch']}, {run['commit']}")
    fields = CARD_FIELDS if arguments.device == "cuda" else FIELDS
    table = ResultsTable(arguments.out / f"{arguments.device}.csv", fields)
    with tqdm(total=len(cases) * (repeats + 2), unit="round", disable=None) as bar:
        for case in cases:
            bar.set_description(case.name)
            rows = run_case(case, [n for n in names if PROVIDERS[n].suits(case)], repeats, memory, bar)
            table.append([{**run, **row} for row in rows])
            print_case(case, rows)
    print(f"\nAppended to {table.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
