"""The CUDA kernels without a GPU: their sources run on the host, in several orders of the threads and under sanitizers.

What nvcc compiled of them is run in test_cuda_compiled.py, bugs are planted in test_cuda_planted.py, and what nvcc says
of them is in test_cuda_by_nvcc.py.
"""

from __future__ import annotations

import pytest
from host_build import build_on_host, run_compiled_kernels_of
from processes import ROOT, assert_passed, run_kernels_of, under_sanitizers


@pytest.mark.parametrize(
    ("seed", "only"), [(None, None), ("1", "softmax or dense or blocks"), ("2", "channels_last or test_options")]
)
def test_cuda_kernels_on_the_host(host_build, seed, only):
    """In the order of the threads, and in random orders: nothing may depend on it."""
    environment, options = ({}, ()) if seed is None else ({"TK_EMULATION_SEED": seed}, ("-k", only))
    assert_passed(run_kernels_of(host_build[0], *options, environment=environment), 200 if seed is None else 100)


@pytest.mark.compiled
def test_cuda_kernels_on_the_host_under_sanitizers(tmp_path, ptx):
    flags = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-D_GLIBCXX_ASSERTIONS")
    build_on_host(ROOT / "csrc" / "cuda", tmp_path / "sanitized.so", *flags)
    only = ("-k", "(softmax and float32) or layouts or channels_last or beyond or nothing or target_dtypes")
    assert_passed(run_kernels_of(tmp_path / "sanitized.so", *only, environment=under_sanitizers()), 50)
    if ptx:  # every load and store of compiled code is one of the interpreter's
        only = ("-k", "beyond or (test_softmax and spatial1 and 33)")
        assert_passed(run_compiled_kernels_of(tmp_path / "sanitized.so", ptx, *only, **under_sanitizers()), 10)
