"""Fresh gradients on the CPU: where it is asked for, their memory is kept for the next ones, and nothing of the old
ones shows. Running out of memory, and forks meanwhile."""

from __future__ import annotations

import concurrent.futures
import io
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from common import relative

import tversky_kernels as tk
from tversky_kernels._ops import ops

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps memory and has /proc")

MIB = 1 << 20


def volumes(mib, seed=0):
    """Logits of so many MiB of float32 and four classes, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    spatial = (mib // 8, 1024, 512)
    logits = torch.randn(1, 4, *spatial, generator=generator)
    return logits, torch.randint(0, 4, (1, *spatial), generator=generator, dtype=torch.uint8)


def gradient(logits, target, **options):
    logits = logits.detach().requires_grad_()
    (found,) = torch.autograd.grad(tk.tversky_loss(logits, target, **options), logits)
    return found


def used_and_waiting():
    _, used, waiting = ops.cpu_gradient_memory(None)
    return used // MIB, waiting // MIB


@pytest.fixture(autouse=True)
def _memory():
    """Starts with nothing kept."""
    keeps, *_ = ops.cpu_gradient_memory(None)
    ops.cpu_gradient_memory(False)
    assert ops.cpu_gradient_memory(True) == (True, 0, 0)
    yield
    ops.cpu_gradient_memory(False)
    ops.cpu_gradient_memory(keeps)


def test_memory_of_a_dead_gradient_serves_the_next():
    logits, target = volumes(32)
    first = gradient(logits, target)
    expected, address = first.clone(), first.data_ptr()
    assert used_and_waiting() == (32, 0)
    first.fill_(torch.nan)
    del first
    assert used_and_waiting() == (0, 32)
    second = gradient(logits, target)
    assert second.data_ptr() == address
    assert torch.equal(second, expected)
    assert used_and_waiting() == (32, 0)
    truth = gradient(logits.double(), target, backend="reference")
    assert relative(second, truth) < 1e-6


def test_living_gradients_have_memory_of_their_own():
    logits, target = volumes(32)
    other_logits, other_target = volumes(32, seed=1)
    first, second = gradient(logits, target), gradient(other_logits, other_target)
    assert used_and_waiting() == (64, 0)
    expected = first.clone()
    del second
    third = gradient(other_logits, other_target)
    assert torch.equal(first, expected)
    assert not torch.equal(first, third)
    view = first[0, 1]
    del first
    assert used_and_waiting() == (64, 0), "a view keeps its gradient alive"
    assert torch.equal(view, expected[0, 1])


def test_a_smaller_gradient_takes_the_memory_of_one_up_to_twice_as_large():
    big, small, smallest = volumes(48), volumes(40), volumes(16)
    address = gradient(*big).data_ptr()
    assert gradient(*small).data_ptr() == address
    assert used_and_waiting() == (0, 48)
    gradient(*smallest)  # under 32 MiB: torch's allocator's
    assert used_and_waiting() == (0, 48)


def test_never_holds_more_than_was_once_in_use():
    gradient(*volumes(144))
    assert used_and_waiting() == (0, 144)
    gradient(*volumes(32))  # not in 144 MiB, and beside them would be more than ever
    assert used_and_waiting() == (0, 32)
    gradient(*volumes(48))
    assert used_and_waiting() == (0, 80)  # what was in use at once was 144
    gradient(*volumes(144))
    assert used_and_waiting() == (0, 144)


def test_the_smallest_that_fits():
    alive = [gradient(*volumes(mib)) for mib in (48, 32, 40)]
    addresses = [g.data_ptr() for g in alive]
    alive.clear()
    assert used_and_waiting() == (0, 120)
    assert gradient(*volumes(40)).data_ptr() == addresses[2]
    assert gradient(*volumes(32)).data_ptr() == addresses[1]


def test_what_waits_is_the_systems_for_the_taking():
    logits, target = volumes(48)
    smaps = pathlib.Path("/proc/self/smaps_rollup")
    if not smaps.exists() or "LazyFree" not in smaps.read_text():
        pytest.skip("this Linux does not report LazyFree in smaps_rollup")

    def lazily_freed():
        (line,) = (x for x in smaps.read_text().splitlines() if x.startswith("LazyFree:"))
        return int(line.split()[1]) // 1024

    before = lazily_freed()
    found = gradient(logits, target)
    assert lazily_freed() == before
    del found
    assert lazily_freed() >= before + 47
    ops.cpu_gradient_memory(False)
    assert lazily_freed() == before


def test_kept_no_more_when_turned_off():
    logits, target = volumes(32)
    found = gradient(logits, target)
    expected = found.clone()
    assert ops.cpu_gradient_memory(False) == (False, 32 * MIB, 0)
    assert torch.equal(found, expected), "the gradient that lives is untouched"
    del found
    assert ops.cpu_gradient_memory(None) == (False, 0, 0)
    assert torch.equal(gradient(logits, target), expected)
    assert ops.cpu_gradient_memory(None) == (False, 0, 0)


@pytest.mark.parametrize("variable", ["0", "1"])
def test_environment_variable(variable):
    code = """
import torch, tversky_kernels as tk
z = torch.randn(1, 4, 4, 1024, 512, requires_grad=True)
tk.tversky_loss(z, torch.zeros(1, 4, 1024, 512, dtype=torch.uint8)).backward()
print(torch.ops.tversky_kernels.cpu_gradient_memory(True))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TVERSKY_KERNELS_KEEP_GRADIENT": variable},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == ("(False, 0, 0)" if variable == "0" else f"(True, {32 * MIB}, 0)")


@pytest.mark.parametrize(
    ("layout", "expected_mib"), [("channels_last", 64), ("permuted", 64), ("some classes", 0), ("transposed", 64)]
)
def test_layouts(layout, expected_mib):
    logits, target = (torch.cat([x, x.flip(-1)]) for x in volumes(32))
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last_3d)
    elif layout == "permuted":  # the classes before the samples
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "some classes":  # of more: torch's allocator's, for they do not fill a block
        logits = torch.cat([logits, logits], 1)[:, 2:6]
    else:  # the voxels in another order, which is copied
        logits = logits.transpose(2, 3).contiguous().transpose(2, 3)
    expected = gradient(logits.double(), target, backend="reference")
    for _ in range(2):
        found = gradient(logits, target)
        assert relative(found, expected) < 1e-6
        assert used_and_waiting()[0] == expected_mib
        if layout in ("channels_last", "permuted"):
            assert found.stride() == logits.stride()
        found.fill_(torch.nan)
        del found


def test_many_threads():
    cases = [volumes(32, seed) for seed in range(3)]
    expected = [gradient(*case) for case in cases]

    def work(i):
        for _ in range(4):
            found = gradient(*cases[i % 3])
            if not torch.equal(found, expected[i % 3]):
                return False
            found.fill_(torch.nan)
        return True

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    used, waiting = used_and_waiting()
    assert used == 96
    assert 32 <= waiting <= 12 * 32  # each holds its last one until it has the next


def test_an_optimizer_uses_it_like_any_gradient():
    logits, target = volumes(32)
    parameter = torch.nn.Parameter(logits.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = tk.tversky_loss(parameter, target) + tk.dice_loss(parameter, target)  # two gradients, added up
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert used_and_waiting()[0] in (32, 64)
    file = io.BytesIO()
    torch.save(parameter.grad, file)
    file.seek(0)
    assert torch.equal(torch.load(file), parameter.grad)


def run_alone(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("keep", ["0", "1"])
def test_forks_while_gradients_come_and_go(keep):
    """As a DataLoader's workers are started: a child has no lock that nobody unlocks."""
    script = """
import os, threading, time, torch, tversky_kernels as tk
torch.set_num_threads(1)
logits, target = torch.randn(1, 4, 48, 224, 224), torch.zeros(1, 48, 224, 224, dtype=torch.uint8)
small, labels = torch.randn(1, 2, 8), torch.zeros(1, 8, dtype=torch.uint8)
stop = False

def work():
    while not stop:
        z = logits.detach().requires_grad_()
        torch.autograd.grad(tk.tversky_loss(z, target), z)

threads = [threading.Thread(target=work) for _ in range(2)]
[thread.start() for thread in threads]
time.sleep(0.2)
children = []
for _ in range(40):
    child = os.fork()
    if child == 0:
        torch.ops.tversky_kernels.cpu_gradient_memory(None)
        z = logits.detach().requires_grad_()
        torch.autograd.grad(tk.tversky_loss(z[:, :, :44], target[:, :44]), z) if len(children) % 10 == 0 else None
        os._exit(0)
    children.append(child)
    time.sleep(0.002)
deadline = time.monotonic() + 100
while children and time.monotonic() < deadline:
    children = [c for c in children if os.waitpid(c, os.WNOHANG) == (0, 0)]
    time.sleep(0.01)
stop = True
[os.kill(c, 9) for c in children]
print("hung", len(children))
"""
    result = run_alone(script, TVERSKY_KERNELS_KEEP_GRADIENT=keep)
    assert result.stdout == "hung 0\n", result.stdout + result.stderr


def test_out_of_memory_is_said_in_torchs_words():
    """And the size that was asked for; after it all goes on."""
    script = """
import resource, torch, tversky_kernels as tk
torch.set_num_threads(1)
logits = torch.zeros(1, 4, 64, 256, 256, requires_grad=True)
target = torch.zeros(1, 64, 256, 256, dtype=torch.uint8)
loss = tk.tversky_loss(logits, target)
counts = tk.overlap_counts(logits, target)
head = tk.linear_tversky_loss(logits, torch.zeros(2, 4), None, target)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20), resource.RLIM_INFINITY))
for value in (loss, counts.tp.sum(), head):
    try:
        value.backward()
    except RuntimeError as error:
        print(type(error).__name__, f"{logits.nbytes} bytes" in str(error), "can't allocate memory" in str(error))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
tk.tversky_loss(logits, target).backward()
print(torch.isfinite(logits.grad).all().item())
"""
    result = run_alone(script)
    assert result.stdout.splitlines() == ["RuntimeError True True"] * 3 + ["True"], result.stdout + result.stderr
