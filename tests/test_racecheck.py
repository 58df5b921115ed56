"""What `make gpu` makes of racecheck's answers, with a tool in its place that answers as it is told.

The programs that it is asked about are tested in test_cuda_on_host.py.
"""

from __future__ import annotations

import os
import sys

import pytest
import racecheck
from processes import ROOT, run

pytestmark = pytest.mark.skipif(
    racecheck.find_nvcc() is None, reason="nvcc is neither in CUDA_HOME/bin nor on the PATH"
)

TOOL = """#!/bin/sh
case "$*" in
  *named_barriers*)
    [ -n "$REPORTED" ] || exit 1
    echo right
    case " $REPORTED " in *" $6:$7 "*) hazards=1 ;; *) hazards=0 ;; esac
    echo "========= RACECHECK SUMMARY: $hazards hazards displayed ($hazards errors, 0 warnings)" ;;
  *) echo "asked: $*" ;;
esac
"""


@pytest.fixture
def asked_with(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)

    def asked(reported):
        command = [sys.executable, "tests/tools/racecheck.py", "--tests", "a or b", "--shared", "b"]
        return run(command, {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REPORTED": reported}, where=ROOT)

    return asked


def test_all_tests_where_it_is_right(asked_with):
    result = asked_with("4:even")
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("tests/gpu_kernels -k a or b")
    assert "wrongly" not in result.stdout


@pytest.mark.parametrize("call", ["0:even", "0:uneven"])
def test_none_of_shared_voxels_where_it_reports_what_is_right(asked_with, call):
    result = asked_with(f"4:even {call}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("tests/gpu_kernels -k (a or b) and not (b)")
    assert result.stdout.count("wrongly") == 1


def test_no_answer(asked_with):
    for reported, told in (("0:even", "does not find what is planted"), ("", "did not come to an end")):
        result = asked_with(reported)
        assert result.returncode == 1
        assert told in result.stdout + result.stderr
        assert "asked: " not in result.stdout
