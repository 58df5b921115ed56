"""The benchmarks' own parts: what they would print of a wrong loss, a missing package, a known growth."""

from __future__ import annotations

import csv
import dataclasses
import time

import pytest
import torch

for _module in ("matplotlib", "pandas", "tqdm", "monai"):
    pytest.importorskip(_module)

import pandas

from benchmarks import accuracy, growth, head, memory, plot, ranks, run, summary, timing, training_step
from benchmarks.cases import SETS, Case
from benchmarks.providers import PROVIDERS
from benchmarks.results_table import ResultsTable

TINY = Case(8, 3)


@pytest.mark.parametrize("set_name", list(SETS))
def test_a_case_is_its_name(set_name):
    for case in SETS[set_name]("cpu"):
        assert Case.parse(case.name) == case


def test_inputs_have_every_class_and_the_size_they_say():
    logits, target = Case(24, 4, samples=2, dtype="bfloat16", label="int16").inputs(seed=0)
    assert logits.shape == (2, 4, 24, 24, 24)
    assert target.shape == (2, 1, 24, 24, 24)
    assert logits.dtype == torch.bfloat16
    assert target.dtype == torch.int16
    assert target.unique().tolist() == [0, 1, 2, 3]
    case = Case(24, 4, samples=2, dtype="bfloat16", label="int16")
    assert case.logits_bytes == logits.nbytes
    assert case.target_bytes == target.nbytes
    assert case.floor_copies == (3 * logits.nbytes + 2 * target.nbytes) / (2 * logits.nbytes)


def test_a_wrong_loss_and_a_missing_package_get_no_time(monkeypatch):
    def missing(case):
        raise ImportError(name="no_such_package")

    right = PROVIDERS["ours"]
    wrong = dataclasses.replace(right, name="wrong", make=lambda case: lambda z, t: 1.001 * right.make(case)(z, t))
    none = dataclasses.replace(right, name="none", make=lambda case: lambda z, t: right.make(case)(z, t) + 0 * z.nan)
    for provider in (wrong, dataclasses.replace(right, name="missing", make=missing), none):
        monkeypatch.setitem(PROVIDERS, provider.name, provider)
    rows = {r["provider"]: r for r in run.run_case(TINY, ["ours", "wrong", "missing", "none"], 2, memory=False)}
    assert rows["ours"]["status"] == "ok"
    assert rows["ours"]["milliseconds"] > 0
    assert rows["wrong"]["status"] == "wrong"
    assert rows["wrong"]["loss_error"] == pytest.approx(1e-3, rel=0.01)
    assert rows["missing"]["status"] == "missing: no_such_package"
    assert rows["none"]["status"] == "failed: AttributeError"
    assert all("milliseconds" not in rows[name] for name in ("wrong", "missing", "none"))


class FakeCard:
    """What benchmarks ask of torch.cuda, for tensors on the CPU: events tell milliseconds of a clock of calls."""

    def __init__(self):
        self.now, self.slept, self.calls = 0.0, [], []

    def synchronize(self):
        self.calls.append("synchronize")

    def empty_cache(self):
        pass

    def mem_get_info(self):
        return 100 * 2**20, 100 * 2**20

    def _sleep(self, cycles):
        self.calls.append("sleep")
        self.slept.append(cycles)

    def Event(self, enable_timing):
        card = self

        class Recorded:
            def record(self):
                card.calls.append("record")
                self.at = card.now
                card.now += 1.0  # a copy of nothing takes time too

            def elapsed_time(self, later):
                return later.at - self.at

        return Recorded()


@pytest.fixture
def fake_card(monkeypatch):
    card = FakeCard()
    for name in ("synchronize", "empty_cache", "mem_get_info", "_sleep", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(card, name), raising=False)
    return card


def test_a_card_is_timed_by_its_own_clock_behind_a_head_start(fake_card):
    def function(what):
        fake_card.calls.append(what)
        time.sleep(0.004)
        fake_card.now += 1.5

    found = timing.timed(function, lambda: (fake_card.calls.append("prepare") or "call",), "cuda")
    assert found.work == pytest.approx(2.5e-3)
    assert found.host >= 0.004
    assert fake_card.slept[0] >= 2 * found.host * timing.MOST_CYCLES_A_SECOND - 1
    once = ["prepare", "synchronize"]
    assert fake_card.calls == [*once, "call", "synchronize", *once, "sleep", "record", "call", "record", "synchronize"]


def test_a_case_on_a_card(fake_card, monkeypatch, capsys):
    """The branches for a card, with the CPU in its place; a peer that has no memory left is a row."""

    def no_memory(case):
        def loss(z, target):
            if z.size(2) == 16:  # the check is of a smaller volume
                raise torch.OutOfMemoryError
            return right.make(case)(z, target)

        return loss

    def inputs(case, seed, of_cpu=Case.inputs):
        return of_cpu(dataclasses.replace(case, device="cpu"), seed)

    right = PROVIDERS["ours"]
    monkeypatch.setitem(PROVIDERS, "greedy", dataclasses.replace(right, name="greedy", make=no_memory))
    monkeypatch.setattr(Case, "inputs", inputs)
    monkeypatch.setattr(fake_card, "mem_get_info", lambda: (2**21, 2**21))
    monkeypatch.setattr(torch.cuda, "mem_get_info", fake_card.mem_get_info)
    monkeypatch.setattr(run, "CARD_COPY_BYTES", 2**20)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: fake_card.__dict__.update(now=fake_card.now + 3.0))
    case = Case(16, 3, device="cuda")
    ours, greedy = run.run_case(case, ["ours", "greedy"], 2, memory=True)
    assert ours["status"] == "ok"
    assert ours["milliseconds"] == pytest.approx(4.0)
    assert ours["host_milliseconds"] > 0
    assert ours["forward_allocator_mib"] < 0.1
    assert set(ours) <= set(run.CARD_FIELDS)
    assert greedy["status"] == "failed: OutOfMemoryError"
    assert "milliseconds" not in greedy
    assert greedy["gradient_error"] < 1e-6
    run.print_case(case, [ours, greedy])
    _, header, first, last = capsys.readouterr().out.strip().splitlines()
    assert header.endswith("host ms")
    assert first.split()[:2] == ["ours", "4.000"]
    assert first.endswith(f" {ours['host_milliseconds']:.3f}")
    assert last.split() == ["greedy", "failed:", "OutOfMemoryError"]


def test_monai_dice_of_float16_is_found_wrong():
    """Its sums overflow: the loss is 1 and the gradient 0, or NaN."""
    case = Case(64, 2, dtype="float16")
    rows = {r["provider"]: r for r in run.run_case(case, ["ours", "MONAI DiceLoss"], 2, memory=False)}
    assert rows["ours"]["status"] == "ok"
    assert rows["MONAI DiceLoss"]["status"] == "wrong"


def test_peak_memory_is_of_the_loss_alone():
    case = Case(64, 4)
    found = memory.measure(case, PROVIDERS["ours"].make(case))
    gradient = case.logits_bytes / 2**20
    assert found["forward_allocator_mib"] < 0.1
    assert gradient <= found["both_allocator_mib"] < 1.1 * gradient
    assert memory.measure(case, PROVIDERS["MONAI TverskyLoss"].make(case))["both_allocator_mib"] > 3 * gradient


def test_exponent_of_a_power_law():
    assert growth.exponent([(x, 3 * x**1.5) for x in (2, 7, 40)]) == pytest.approx(1.5)


def test_report_of_growth():
    rows = [{"value": s**3, "voxels": s**3, "provider": "ours", "milliseconds": 1e-6 * 2 * s**3} for s in (32, 64, 128)]
    assert "2.00     2.00     2.00   exponent 1.00" in growth.report("voxels", rows)


def test_table_appends_and_refuses_other_columns(tmp_path):
    ResultsTable(tmp_path / "t.csv", ["a", "b"]).append([{"a": 1.23456, "b": "x"}])
    ResultsTable(tmp_path / "t.csv", ["a", "b"]).append([{"a": 2}])
    with open(tmp_path / "t.csv") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["1.235", "x"], ["2", ""]]
    with pytest.raises(ValueError, match=r"t.csv: expected the columns \['a'\], found \['a', 'b'\]"):
        ResultsTable(tmp_path / "t.csv", ["a"])


def test_largest_patch_is_within_the_budget():
    rows = training_step.largest_patches("demo FCN", training_step.fcn, 14, 180 * 2**20, 64, "cpu")
    sides = {r["loss"]: r for r in rows if r["status"] == "ok"}
    assert sides["our Dice + CE, in place"]["largest_side"] == 64
    assert sides[training_step.WITH_HEAD]["largest_side"] >= 64
    assert sides["our Dice + CE, in place"]["step_peak_mib"] <= 180
    assert sides["MONAI DiceCELoss"]["largest_side"] < 64


def test_pictures_of_what_is_measured(tmp_path):
    """From tables as the benchmarks write them."""
    names = ["ours", "MONAI TverskyLoss"]
    table = ResultsTable(tmp_path / "growth.csv", ["series", "value", "voxels", *run.FIELDS])
    described = run.describe_run()
    for series, case, value in (("voxels", Case(8, 2), 8**3), ("voxels", Case(16, 2), 16**3), ("classes", TINY, 3)):
        rows = run.run_case(case, names, 2, memory=False)
        table.append([{**described, "series": series, "value": value, "voxels": case.voxels, **r} for r in rows])
    core = ResultsTable(tmp_path / "cpu.csv", run.FIELDS)
    name = SETS["plain"]("cpu")[0].name
    measured = {
        "task": "tversky",
        "case": name,
        "provider": "ours",
        "status": "ok",
        "milliseconds": 1,
        "times_floor": 2,
    }
    core.append([{**described, **measured}])
    assert plot.draw_growth(tmp_path, "cpu").stat().st_size > 10_000


def test_the_distance_to_the_floor_is_of_one_run():
    """The newest of those that compared the most, not the newest row of each."""
    rows = [
        ("monday", "a", "ours", 1),
        ("monday", "a", "theirs", 2),
        ("tuesday", "a", "ours", 3),
        ("tuesday", "a", "theirs", 4),
        ("wednesday", "a", "ours", 5),
        ("wednesday", "b", "ours", 6),
    ]
    table = pandas.DataFrame(rows, columns=["date", "case", "provider", "times_floor"]).assign(commit="1")
    chosen = plot.of_one_run(table)
    assert sorted(chosen["times_floor"]) == [3, 4, 6]


def test_summary_of_a_card():
    """A line a case, of one run; multiples of ours; what nobody measured has no column."""
    usual = {"date": "monday", "commit": "1", "task": "tversky", "case": Case(64, 2, 2, device="cuda").name}
    rows = [
        {"provider": "ours", "milliseconds": 0.05, "times_floor": 1.25, "host_milliseconds": 0.1},
        {"provider": "ours, in place", "milliseconds": 0.04},
        {"provider": "ours, triton", "milliseconds": 0.06},
        {"provider": "lean compiled, mask", "milliseconds": 0.2},
        {"provider": "lean compiled, gather", "milliseconds": 0.1},
        {"provider": "MONAI TverskyLoss", "status": "failed: OutOfMemoryError"},
    ]
    rows[0]["both_allocator_mib"] = 1.5 * 2 * 2 * 64**3 * 4 / 2**20
    lines = summary.table(pandas.DataFrame([{**usual, **row} for row in rows]), "tversky").splitlines()
    assert lines[0] == (
        "| case | ours, ms | in place, ms | of the copy | triton, ms | host, ms | gradients held | lean compiled |"
    )
    assert lines[2:] == ["| 2x2x64^3,float32,uint8 | 0.05 | 0.04 | 80 % | 0.06 | 0.100 | 1.50 | 2x |"]


def test_head_compares_the_same_loss_and_gradient(monkeypatch):
    def missing(case):
        raise ImportError(name="no_such_package")

    monkeypatch.setitem(
        PROVIDERS, "MONAI TverskyLoss", dataclasses.replace(PROVIDERS["MONAI TverskyLoss"], make=missing)
    )
    monkeypatch.setattr(head, "LOSSES", ("ours", "ours, in place", "MONAI TverskyLoss"))
    rows = {r["loss"]: r for r in head.measure(Case(16, 3), channels=4, repeats=2)}
    assert rows.pop("MONAI TverskyLoss")["status"] == "missing: no_such_package"
    assert set(rows) == {head.IN_ONE, head.MATMUL, "ours", "ours, in place"}
    for row in rows.values():
        assert row["loss_error"] < 1e-6
        assert row["gradient_error"] < 1e-5
        assert row["milliseconds"] > 0
    assert rows["ours"]["peak_mib"] - rows[head.IN_ONE]["peak_mib"] > rows["ours"]["logits_mib"]


def test_accuracy_late_in_a_training():
    """Ours keeps its digits, what goes through 1 - p does not."""
    rows = {r["provider"]: r for r in accuracy.measure(Case(16, 4), 16, ["ours", "lean eager, mask"])}
    assert 0.9999 < rows["ours"]["mean_probability"] < 1
    assert rows["ours"]["gradient_error"] <= 1e-6
    assert rows["lean eager, mask"]["gradient_error"] > 1e-3
    early = {r["provider"]: r for r in accuracy.measure(Case(16, 4), 0, ["ours", "lean eager, mask"])}
    assert all(r["gradient_error"] <= 1e-6 for r in early.values())


def test_ranks(tmp_path):
    ranks.main(["--processes", "1", "2", "--size", "8", "--rounds", "3", "--out", str(tmp_path)])
    rows = pandas.read_csv(tmp_path / "ranks.csv")
    assert len(rows) == 2 * len(ranks.CLASSES) * len(ranks.WHAT)
    assert (rows["milliseconds"] > 0).all()
    assert (tmp_path / "ranks.png").stat().st_size > 5000
