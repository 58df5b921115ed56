from __future__ import annotations

import os

import pytest
import torch
from common import CPU_CAPABILITIES

import tversky_kernels as tk
from tversky_kernels._ops import ops

# For the head's matrix products on a card: deterministic algorithms, below, refuse cuBLAS without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Its tests may replace a backend for the whole process, so they run in processes of their own.
collect_ignore = [] if "TK_GPU_KERNELS" in os.environ else ["gpu_kernels"]


#: Files whose tests run compilers and emulators for minutes. They come first, so that processes that share the files
#: finish together.
SLOW_FILES = (
    "test_triton_without_gpu.py",
    "test_cuda_on_host.py",
    "test_build.py",
    "test_portability.py",
    "test_cuda_by_nvcc.py",
    "test_example.py",
)


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def _poisoned_memory_and_own_random_numbers():
    """torch.empty gives NaN, so that what a kernel does not write shows; no test's numbers depend on another's."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=list(CPU_CAPABILITIES))
def capability(request):
    """Runs the test with each instruction set that this processor has."""
    assert tk.available_backends()["cpu"] is True
    before = ops.cpu_capability(None)
    wanted = CPU_CAPABILITIES[request.param]
    if ops.cpu_capability(wanted) != wanted:
        ops.cpu_capability(before)
        pytest.skip(f"this processor or this build has no {request.param}")
    yield request.param
    ops.cpu_capability(before)


@pytest.fixture
def threads():
    """Sets torch's threads and puts them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
