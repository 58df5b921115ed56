from __future__ import annotations

import os

import pytest
import torch
from common import CPU_CAPABILITIES
from cuda_instructions import ptx_files
from host_build import build_on_host
from processes import ROOT, once

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
    "test_cuda_compiled.py",
    "test_cuda_planted.py",
    "test_cuda_on_host.py",
    "test_build.py",
    "test_portability.py",
    "test_cuda_by_nvcc.py",
    "test_example.py",
)


def pytest_collection_modifyitems(config, items):
    order = {name: i for i, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    # TK_SHARE: which part of the tests that only watch compiled code, and of the GPU kernels' where they run compiled.
    number, parts = (int(x) for x in os.environ.get("TK_SHARE", "0/1").split("/"))
    if parts > 1:
        in_turn = [x for x in items if "TK_EMULATION_PTX" in os.environ or is_shared(x)]
        left_out = {id(x) for i, x in enumerate(in_turn) if i % parts != number}
        config.hook.pytest_deselected(items=[x for x in items if id(x) in left_out])
        items[:] = [x for x in items if id(x) not in left_out]


def is_shared(item) -> bool:
    marker = item.get_closest_marker("compiled")
    return marker is not None and not marker.kwargs.get("shares_within", False)


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


@pytest.fixture(scope="session")
def host_build(tmp_path_factory):
    """The library of the CUDA kernels on the host, and its objects; made once for all of pytest-xdist's workers."""
    folder = once(tmp_path_factory, "host_build", lambda f: build_on_host(ROOT / "csrc" / "cuda", f / "host.so", "-O1"))
    return folder / "host.so", sorted(folder.glob("*.o"))


@pytest.fixture(scope="session")
def ptx(tmp_path_factory):
    """What nvcc compiled for sm_90, a file for each source; none: see ptx_files."""
    return sorted(once(tmp_path_factory, "ptx", ptx_files).glob("*.ptx"))


@pytest.fixture
def needs_ptx(ptx):
    if not ptx:
        pytest.skip("this build of the package has no PTX, or no cuobjdump is there to read it")
