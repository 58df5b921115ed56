"""What nvcc compiled of the CUDA kernels (PTX), run on the host: its results, races and memory traffic.

`make test-compiled` runs all of it; `make test` leaves it out.
"""

from __future__ import annotations

import os
import re
import sys

import pytest
import racecheck
from host_build import compiler_of_host, run_compiled_kernels_of
from processes import ROOT, TORCH, assert_passed, run

pytestmark = pytest.mark.compiled


@pytest.mark.compiled(shares_within=True)
@pytest.mark.usefixtures("needs_ptx")
def test_what_nvcc_compiled_on_the_host(host_build, ptx):
    # Most of the time of those that are left out goes into reading one kernel more for each. Two accesses to shared
    # memory that no barrier orders fail, also where they do no harm.
    left_out = ("squared_of_labels", "any_combination", "targets_of_another_size", "targets_outside", "nan_is_nowhere")
    only = ("-k", " and ".join(f"not test_{name}" for name in (*left_out, "upstream_gradients")))
    share = os.environ.get("TK_SHARE", "0/1")
    parts = int(share.split("/")[1])
    result = run_compiled_kernels_of(host_build[0], ptx, *only, TK_EMULATION_RACES="1", TK_SHARE=share)
    assert_passed(result, 800 // parts)


@pytest.mark.usefixtures("needs_ptx")
@pytest.mark.parametrize(
    ("right", "wrong", "tests", "environment"),
    [
        ("rcp.approx.ftz.f32", "ex2.approx.ftz.f32", "test_softmax and float32", {}),
        ("cp.async.wait_all;", "", "test_softmax and float32", {}),
        ("bar.sync 0;", "", "test_softmax and float32", {"TK_EMULATION_SEED": "4"}),
        ("barrier.sync ", "// ", "test_channels_last and 40", {"TK_EMULATION_SEED": "4"}),
        ("barrier.sync ", "// ", "test_channels_last and 40", {"TK_EMULATION_RACES": "1"}),
        ("bar.warp.sync ", "// ", "test_channels_last and 14-", {"TK_EMULATION_RACES": "1"}),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_what_is_planted_in_compiled_code_is_found(host_build, ptx, tmp_path, right, wrong, tests, environment):
    files = [tmp_path / path.name for path in ptx]
    for path, file in zip(ptx, files, strict=True):
        file.write_text(path.read_text().replace(right, wrong))
    assert any(file.read_text() != path.read_text() for path, file in zip(ptx, files, strict=True))
    result = run_compiled_kernels_of(host_build[0], files, "-x", "-k", tests, **environment)
    assert result.returncode == 1, result.stdout[-2000:]
    assert ("a race: " in result.stdout) == ("TK_EMULATION_RACES" in environment)


@pytest.mark.skipif(racecheck.find_nvcc() is None, reason="nvcc is neither in CUDA_HOME/bin nor on the PATH")
def test_known_programs_for_racecheck(host_build, tmp_path):
    """What racecheck is asked about on a card: here its sources and what nvcc makes of them, the races looked for."""
    objects = [o for o in host_build[1] if o.name.endswith("_ptx.o")]
    program, compiled = tmp_path / "named_barriers", tmp_path / "named_barriers.ptx"
    link = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    for command in (
        [*compiler_of_host(), "-O1", racecheck.PROGRAM, "-x", "none", *objects, *link, "-o", program],
        [*racecheck.compile_command(compiled), "-arch=sm_90", "-ptx"],
    ):
        result = run(command)
        assert result.returncode == 0, result.stderr[-3000:]
    for call, races in racecheck.PROGRAMS.values():
        assert run([program, *call]).stdout == "right\n" or races
        result = run([program, *call], {"TK_EMULATION_PTX": str(compiled), "TK_EMULATION_RACES": "1"})
        assert (result.stdout == "right\n") != races, result.stderr
        assert ("a race: " in result.stderr) == races, result.stderr


@pytest.mark.usefixtures("needs_ptx")
def test_the_volume_is_read_once_a_pass(host_build, ptx):
    """By the sectors that the loads and stores of compiled code take, and nothing that is not asked for."""
    result = run([sys.executable, "tests/tools/memory_traffic.py", "--quick", host_build[0], *ptx], where=ROOT)
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"(\w+)_pass_kernel +C=(\d+) .* read ([\d.]+), written +([\d.]*)", result.stdout)
    assert len(rows) == 2 * 2 * 6  # passes, types, numbers of classes
    for kernel, classes, read, written in rows:
        # What is more are labels, which several warps read where there are many classes, and the coefficients.
        assert 1.0 <= float(read) <= 1.06, (kernel, classes, read)
        if "gradient" in kernel:
            assert float(written) == 1.0, (kernel, classes, written)
