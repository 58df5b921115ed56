"""python -m tversky_kernels: what it prints, and that it finds a backend whose numbers are wrong."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from processes import run

from tversky_kernels import _ops, _report
from tversky_kernels.__main__ import main


def test_the_report(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    for words in ("Python", "torch", "processor", "backend cpu", "backend cuda", "backend triton", "runs here"):
        assert words in said
    assert said.count("  ok  ") == 9 * sum(x is True for x in _report._backends.available_backends().values()) - 9
    assert "WRONG" not in said


def test_as_a_command():
    started = time.perf_counter()
    done = run([sys.executable, "-m", "tversky_kernels"])
    assert done.returncode == 0, done.stderr
    assert "self-check" in done.stdout
    print(f"{time.perf_counter() - started:.1f} s")


@pytest.mark.parametrize("wrong", ["loss", "gradient", "raises"])
def test_wrong_numbers_are_told(wrong, monkeypatch, capsys):
    true = _ops.OPERATORS["cpu"]

    def tversky_loss(*arguments):
        if wrong == "raises":
            raise RuntimeError("no such instruction")
        loss, coefficients = true.tversky_loss(*arguments)
        return (loss * 1.001, coefficients) if wrong == "loss" else (loss, coefficients * 1.02)

    monkeypatch.setitem(_ops.OPERATORS, "cpu", true._replace(tversky_loss=tversky_loss))
    assert main([]) == 1
    said = capsys.readouterr()
    assert said.out.count("WRONG") >= 9
    assert ("no such instruction" in said.out) == (wrong == "raises")
    assert "Please report" in said.err


def test_what_a_loss_costs(capsys):
    assert main(["--shape", "1", "3", "8", "9", "10", "--rounds", "3", "--dtype", "bfloat16"]) == 0
    table = capsys.readouterr().out.split("forward + backward")[1].splitlines()
    rows = {line[2:32].strip(): line[32:].split() for line in table[2:-1]}
    ours = rows["tversky_kernels"]
    assert float(ours[0]) > 0
    # The gradient in bfloat16, and as good as nothing.
    assert float(ours[2]) == pytest.approx(3 * 720 * 2 / 2**20, abs=0.1)
    assert "plain PyTorch (the reference)" in rows


def test_a_loss_that_fails_is_told_and_the_others_timed(monkeypatch):
    def fails(z, t):
        raise ValueError("of its own")

    monkeypatch.setattr(_report, "candidates", lambda: {"fails": fails, "missing": "not installed", "ours": torch.mul})
    monkeypatch.setattr(_report, "peak_bytes", lambda function, device: 2**20)
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, z: (z,))
    rows = {name: row for name, *row in _report.benchmark((1, 2, 4), torch.float32, torch.device("cpu"), 3)}
    assert rows["fails"] == ["ValueError: of its own", None, None]
    assert rows["missing"] == ["not installed", None, None]
    assert rows["ours"][2] == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "1", "2"], "--shape: expected samples, classes"),
        (["--shape", "1", "1", "4"], "--shape: expected samples, classes"),
        (["--rounds", "1"], "--rounds: expected 2 or more"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_bad_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err
