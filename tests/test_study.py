"""The study: data of several modalities, how patches are drawn, recipes, scores, rows that survive an interruption."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

for _module in ("monai", "nibabel", "sklearn", "matplotlib", "pandas", "tqdm", "scipy"):
    pytest.importorskip(_module)

import evaluate
import fetch_open_ms
import nibabel
import recipes
import same_curve
import simulate_ms
import study
import study_report
import train_fcn
import volumes
from patches import PatchDataset
from training import Settings, Trainer

MODALITIES = ("flair", "t1")
ROOT = pathlib.Path(__file__).parent.parent


def ball(size, centre, radius):
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"))
    return ((grid - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(0) < radius**2


def write(path, x, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(x, np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine), path)


def patient(i, size=(26, 24, 22)):
    random = np.random.default_rng(i)
    label = ball(size, (9 + 2 * i, 12, 10), 5)
    brain = ball(size, (13, 12, 11), 11)
    flair = (100 + 10 * random.normal(size=size) + 60 * label) * brain
    t1 = (200 + 10 * random.normal(size=size) - 60 * label) * brain
    return {"flair": flair.astype(np.float32), "t1": t1.astype(np.float32), "lesions": label.astype(np.uint8)}


def write_patients(folder, layout="patient/part", count=3):
    for i in range(count):
        for part, x in patient(i).items():
            name = {
                "patient/part": f"case{i}/{part}.nii.gz",
                "patient_part": f"case{i}_{part}.nii.gz",
                "folders": f"{'masks' if part == 'lesions' else 'images'}/case{i}_{part}.nii.gz",
            }[layout]
            write(folder / name, x)
    return folder


def read(folder, modalities=MODALITIES):
    return volumes.read_folder(folder, modalities=modalities, label="lesions")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = write_patients(tmp_path_factory.mktemp("ms"))
    return [volumes.prepare(v, 2.0, None, crop=True) for v in read(folder)]


# ---- Reading


@pytest.mark.parametrize("layout", ["patient/part", "patient_part", "folders"])
def test_layouts(tmp_path, layout):
    found = read(write_patients(tmp_path, layout))
    assert [v.patient for v in found] == ["case0", "case1", "case2"]
    for i, v in enumerate(found):
        made = patient(i)
        assert v.image.shape == (2, 22, 24, 26)
        assert v.spacing == (2.0, 2.0, 2.0)
        for m, part in enumerate(MODALITIES):  # (z, y, x)
            assert torch.equal(v.image[m], torch.from_numpy(made[part].transpose(2, 1, 0).copy()))
        assert torch.equal(v.label[0], torch.from_numpy(made["lesions"].transpose(2, 1, 0).copy()))


def test_orientation_is_the_headers(tmp_path):
    """Axes that are turned round or swapped in the file come out the same way."""
    made = patient(1)
    write(tmp_path / "a" / "flair.nii.gz", made["flair"])
    write(tmp_path / "a" / "lesions.nii.gz", made["lesions"])
    affine = np.array([[0, 0, 2.0, 0], [-2.0, 0, 0, 46], [0, 2.0, 0, 0], [0, 0, 0, 1]])
    for part in ("flair", "lesions"):  # stored as (y turned round, z, x)
        write(tmp_path / "b" / f"{part}.nii.gz", made[part].transpose(1, 2, 0)[::-1].copy(), affine)
    a, b = read(tmp_path, ["flair"])
    assert torch.equal(a.image, b.image)
    assert torch.equal(a.label, b.label)


def test_masks_without_images_are_left_out(tmp_path):
    write_patients(tmp_path, "folders")
    write(tmp_path / "masks" / "case9_lesions.nii.gz", patient(0)["lesions"])
    assert len(read(tmp_path)) == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "case1" / "t1.nii.gz").unlink(),
            "case1: patient case1 has no t1.nii.gz and no case1_t1.nii.gz",
        ),
        (lambda f: (f / "case1" / "lesions.nii.gz").unlink(), "patient case1 has no lesions.nii.gz"),
        (lambda f: write(f / "case1_t1.nii.gz", patient(1)["t1"]), "patient case1 has the t1 twice"),
        (
            lambda f: write(f / "case1" / "t1.nii.gz", patient(1)["t1"][:-1]),
            r"case1.t1.nii.gz: expected the shape of flair.nii.gz, \(22, 24, 26\), got \(22, 24, 25\)",
        ),
        (
            lambda f: write(f / "case1" / "t1.nii.gz", patient(1)["t1"], np.diag([2, 2, 2.1, 1])),
            "case1.t1.nii.gz: expected the affine of flair.nii.gz",
        ),
        (
            lambda f: write(f / "case1" / "lesions.nii.gz", np.zeros((26, 24, 22), np.uint8)),
            "case1.lesions.nii.gz: the mask is empty",
        ),
        (
            lambda f: write(f / "case1" / "lesions.nii.gz", 2 * patient(1)["lesions"]),
            r"case1.lesions.nii.gz: expected a mask of 0 and 1 \(see --lesion-values\), got 2",
        ),
        (
            lambda f: write(f / "case1" / "lesions.nii.gz", 0.5 * patient(1)["lesions"].astype(np.float32)),
            r"case1.lesions.nii.gz: expected a mask of 0 and 1 \(see --lesion-values\), got 0.5",
        ),
        (
            lambda f: (f / "case1" / "t1.nii.gz").write_bytes((f / "case1" / "t1.nii.gz").read_bytes()[:-2000]),
            "case1.t1.nii.gz: not a readable NIfTI file",
        ),
        (
            lambda f: write(f / "case1" / "t1.nii.gz", np.stack([patient(1)["t1"]] * 2, -1)),
            "case1.t1.nii.gz: expected a volume of three dimensions",
        ),
    ],
)
def test_bad_data_names_its_file(tmp_path, spoil, message):
    folder = write_patients(tmp_path)
    spoil(folder)
    with pytest.raises(volumes.DataError, match=message):
        read(folder)


def test_lesion_values(tmp_path):
    folder = write_patients(tmp_path, count=1)
    x = patient(0)["lesions"]
    write(
        folder / "case0" / "lesions.nii.gz",
        np.where(x, np.where(np.arange(26)[:, None, None] % 2, 2, 4), 0).astype(np.uint8),
    )
    (v,) = volumes.read_folder(folder, modalities=MODALITIES, label="lesions", lesion_values=(2, 4))
    assert v.label.sum() == x.sum()


def test_prepare_crops_and_scales_each_modality(prepared):
    for v in prepared:
        assert v.image.shape[1:] < (22, 24, 26)
        inside = v.image[:, v.image.abs().amin(0) > 0]
        assert torch.allclose(inside.mean(1), torch.zeros(2), atol=0.05)
        assert torch.allclose(inside.std(1), torch.ones(2), atol=0.05)
        assert v.label.sum() > 100


def test_prepare_refuses_a_spacing_that_loses_the_lesion():
    label = torch.zeros(1, 20, 20, 20, dtype=torch.uint8)
    label[0, 10, 10, 10] = 1
    volume = volumes.Volume("a", torch.rand(1, 20, 20, 20), label, (1.0, 1.0, 1.0))
    with pytest.raises(volumes.DataError, match="a: no lesion is left at 4, 4, 4 mm"):
        volumes.prepare(volume, 4.0, None)
    label[0, 8:12, 8:12, 8:12] = 1
    assert volumes.prepare(volume, (1.0, 2.0, 1.0), (0.0, 1.0)).image.shape == (1, 20, 10, 20)


def test_train_fcn_on_modalities(tmp_path, capsys):
    write_patients(tmp_path / "data")
    options = [
        *("--data", tmp_path / "data", "--modalities", *MODALITIES, "--label", "lesions", "--spacing", 2, "--crop"),
        *("--z-score", "--features", 2, "--levels", 2, "--patch-size", 16, 16, 16, "--steps", 2, "--fold", 1),
        *("--norm", "instance", "--no-loss-cost", "--out", tmp_path / "out"),
    ]
    assert train_fcn.main([str(o) for o in options]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert results[0]["patient"] == "case1"
    assert 0 <= results[0]["lesion_sensitivity"] <= 1
    assert results[0]["false_lesions"] >= 0
    # By two processes: the same patches, so the same weights.
    again = [*options, "--out", tmp_path / "workers", "--workers", 2]
    assert train_fcn.main([str(o) for o in again]) == 0
    ours, theirs = (torch.load(tmp_path / d / "fold_1.pt", weights_only=True) for d in ("out", "workers"))
    assert ours["log"] == theirs["log"]
    capsys.readouterr()


def test_sweep(tmp_path, capsys):
    write_patients(tmp_path / "data", count=2)
    options = [
        *("--data", tmp_path / "data", "--modalities", "flair", "--label", "lesions", "--spacing", 2, "--z-score"),
        *("--features", 2, "--levels", 2, "--patch-size", 16, 16, 16, "--steps", 1, "--fold", 0, "--workers", 0),
        *("--sweep", "beta", "--out", tmp_path / "out"),
    ]
    assert train_fcn.main([str(o) for o in options]) == 0
    table = (tmp_path / "out" / "sweep.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table[1:]] == [f"{1 - b:.1g} / {b:g}" for b in recipes.BETAS]
    assert (tmp_path / "out" / "beta_0.9" / "results.csv").exists()
    assert "One seed a setting" in capsys.readouterr().out


# ---- Patches and training


def dataset(prepared, sampling, steps=40, batch=3, **options):
    return PatchDataset(prepared, (8, 8, 8), batch, steps, sampling, key=(1, 2), **options)


def centres_on_lesion(data, indices):
    """For each patch whether its middle is a lesion's voxel (a flip moves the middle by one)."""
    return [bool(data[i]["label"][0, 3:5, 3:5, 3:5].any()) for i in indices]


def test_balanced_patches(prepared):
    centred = np.mean(centres_on_lesion(dataset(prepared, "balanced"), range(120)))
    more = np.mean(centres_on_lesion(dataset(prepared, "balanced", lesion_share=0.9), range(120)))
    anywhere = np.mean(centres_on_lesion(dataset(prepared, "uniform"), range(120)))
    assert anywhere < centred - 0.15
    assert 0.5 <= centred < 0.85  # a background voxel may lie beside a lesion
    assert more > centred + 0.1


def test_foreground_oversampling_is_nnu_nets(prepared):
    """The last third of each batch; of a batch of two, the second."""
    for batch, oversampled in ((3, {2}), (2, {1}), (6, {4, 5}), (1, {0})):
        data = dataset(prepared, "foreground", batch=batch)
        forced = {i % batch for i in range(20 * batch) if data.crop_of(i) is data.centred[1.0]}
        assert forced == oversampled
    data = dataset(prepared, "foreground")
    assert all(centres_on_lesion(data, range(2, 120, 3)))
    assert not all(centres_on_lesion(data, range(0, 120, 3)))


def test_two_step_patches(prepared):
    data = dataset(prepared, "two-step", steps=10)
    assert all(data.crop_of(i) is data.centred[0.5] for i in range(15))
    assert all(data.crop_of(i) is data.anywhere for i in range(15, 30))


def test_a_patch_depends_on_its_number_alone(prepared):
    first, second = dataset(prepared, "foreground"), dataset(prepared, "foreground")
    backwards = {i: second[i] for i in reversed(range(12))}
    for i in range(12):
        for key in ("image", "label"):
            assert type(first[i][key]) is torch.Tensor
            assert torch.equal(first[i][key], backwards[i][key])
    other = PatchDataset(prepared, (8, 8, 8), 3, 40, "foreground", key=(1, 3))
    assert not torch.equal(first[0]["image"], other[0]["image"])


def settings(**options):
    small = {"patch_size": (8, 8, 8), "batch_size": 2, "features": 2, "levels": 2, "steps": 6, "lr": 1e-2}
    return Settings(**(small | options))


def test_two_step_training_ends_with_the_last_layer(prepared):
    trainer = Trainer(settings(sampling="two-step", steps=8), recipes.RECIPES["ce-two-step"].loss(), prepared)
    states = []
    step = trainer._train_step

    def watched(image, label):
        step(image, label)
        states.append({name: p.detach().clone() for name, p in trainer.network.named_parameters()})

    trainer._train_step = watched
    trainer.train(progress=False)
    changed = [{n for n in a if not torch.equal(a[n], b[n])} for a, b in itertools.pairwise(states)]
    assert all(len(names) > 2 for names in changed[:3])
    assert all(names == {"head.weight", "head.bias"} for names in changed[3:])


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_recipes_train(prepared, name):
    recipe = recipes.RECIPES[name]
    trainer = Trainer(settings(sampling=recipe.sampling or "foreground"), recipe.loss(), prepared)
    trainer.train(progress=False)
    assert len(trainer.log) == 6
    assert all(np.isfinite(row[2]) for row in trainer.log)


def test_recipes_are_what_they_say(prepared):
    """Each against the formula of its paper, in plain operations."""
    torch.manual_seed(0)
    z, t = torch.randn(2, 2, 4, 5, 6), torch.randint(0, 2, (2, 1, 4, 5, 6))
    p, g = z.double().softmax(1)[:, 1], t[:, 0].double()
    tp, fp, fn = (p * g).sum(), (p * (1 - g)).sum(), ((1 - p) * g).sum()
    ce = -(g * p.log() + (1 - g) * (1 - p).log())
    weights = 1 + 19 * g
    expected = {f"tversky-{b:.1g}".replace("0.", "."): 1 - tp / (tp + (1 - b) * fp + b * fn) for b in recipes.BETAS}
    expected |= {
        "focal-tversky": (1 - tp / (tp + 0.3 * fp + 0.7 * fn)) ** 0.75,
        "dice-ce": 1 - tp / (tp + 0.5 * (fp + fn)) + ce.mean(),
        "ce": ce.mean(),
        "ce-weighted": (weights * ce).sum() / weights.sum(),
        "ce-balanced": ce.mean(),
        "ce-two-step": ce.mean(),
    }
    assert expected.keys() == recipes.RECIPES.keys()
    for name, value in expected.items():
        found = recipes.RECIPES[name].loss()(z, t.to(torch.uint8)).item()
        assert found == pytest.approx(value.item(), rel=1e-4), name
    assert set(recipes.BETAS.values()) <= recipes.RECIPES.keys()


def test_kernels_and_reference_train_alike(prepared):
    """The short version of same_curve.py: float32 and bfloat16."""
    for amp, tolerance in ((False, 1e-4), (True, 2e-2)):
        table = same_curve.curves(prepared, settings(steps=20, amp=amp, norm="instance", lr=2e-3))
        assert np.abs(table.ours / table.reference - 1).max() <= tolerance
        assert np.abs(table.ours / table.reference - 1)[0] <= (1e-6 if not amp else 1e-3)


# ---- Scores


def test_lesion_scores():
    truth, probability = np.zeros((12, 12, 12)), np.zeros((12, 12, 12))
    truth[1:3, 1:3, 1:3] = truth[6:8, 6:8, 6:8] = truth[10, 10, 10] = 1
    truth[3, 3, 3] = 1  # touches the first by a corner: one lesion with it
    probability[2, 2, 2] = 0.9  # one voxel is enough
    probability[6:8, 6:8, 6:8] = 0.4  # below the threshold
    probability[1, 10, 1:3] = probability[5, 1, 10] = 0.7  # two false ones
    found = evaluate.lesion_scores(truth, probability)
    assert found == {"lesion_sensitivity": pytest.approx(1 / 3), "false_lesions": 2}
    assert evaluate.lesion_scores(truth, probability, 0.3)["lesion_sensitivity"] == pytest.approx(2 / 3)
    nothing = evaluate.lesion_scores(np.zeros((3, 3, 3)), np.ones((3, 3, 3)))
    assert np.isnan(nothing["lesion_sensitivity"])
    assert nothing["false_lesions"] == 1


def test_curve_is_the_counts_at_each_threshold():
    random = np.random.default_rng(0)
    truth, probability = random.random(5000) < 0.1, random.random(5000) ** 3
    probability[:20] = 0.5  # on a threshold: it counts
    found = evaluate.curve(truth, probability)
    assert found["lesion"] == truth.sum()
    for i, threshold in enumerate(evaluate.THRESHOLDS):
        assert found["tp"][i] == (probability[truth] >= threshold).sum()
        assert found["fp"][i] == (probability[~truth] >= threshold).sum()
    assert evaluate.THRESHOLDS[len(evaluate.THRESHOLDS) // 2] == 0.5


def test_two_estimates_of_the_area_agree():
    random = np.random.default_rng(1)
    for share in (0.3, 0.03):
        truth = random.random(20000) < share
        score = random.normal(size=20000) + 1.5 * truth
        area = evaluate.scores(truth, score)["APR"]
        assert evaluate.lower_trapezoid(truth, score) == pytest.approx(area, abs=0.003)
    # By hand: positives at ranks 1 and 3 of four.
    truth, score = np.array([1, 0, 1, 0]), np.array([4.0, 3, 2, 1])
    assert evaluate.scores(truth, score)["APR"] == pytest.approx((1 + 2 / 3) / 2)
    # Recall 0 to 1/2: precision 1; 1/2 to 1: from 1/2, the lowest at 1/2, to 2/3, the highest at 1.
    assert evaluate.lower_trapezoid(truth, score) == pytest.approx(0.5 * 1 + 0.5 * (1 / 2 + 2 / 3) / 2)


# ---- The study


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """One data set of three patients, two recipes."""
    write_patients(tmp_path / "data" / "tiny")
    data = study.DataSet("three balls", "tiny", MODALITIES, "lesions", 2.0, second_rater="lesions")
    monkeypatch.setattr(study, "DATA_SETS", {"tiny": data})
    monkeypatch.setattr(study, "SEEDS", {"tiny": 2})
    monkeypatch.setattr(study, "make_simulated", lambda *_: None)
    monkeypatch.setattr(study, "SMALL", settings(sampling="foreground", steps=4, norm="instance"))
    monkeypatch.setattr(study_report, "DATA_SETS", study.DATA_SETS)
    monkeypatch.setattr(study_report, "SEEDS", study.SEEDS)
    monkeypatch.chdir(tmp_path)

    class Pool:  # in this process, which has the data set
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, *arguments):
            job = study.concurrent.futures.Future()
            job.set_result(function(*arguments))
            return job

    monkeypatch.setattr(study.concurrent.futures, "ProcessPoolExecutor", Pool)
    study.read_data.cache_clear()
    return tmp_path


def run_study(folder, *options):
    threads = torch.get_num_threads()
    try:
        return study.main(["--data", str(folder / "data"), "--out", str(folder / "out"), *map(str, options)])
    finally:
        torch.set_num_threads(threads)


def test_study_goes_on_and_reports(tiny, capsys):
    only = ["--only", "tiny/tversky-.[57]/*", "--only", "tiny/ce"]
    assert run_study(tiny, "--list", *only) == 0
    assert "18 runs, 0 done, 18 left" in capsys.readouterr().out
    assert run_study(tiny, "--seeds", 1, "--only", "tiny/ce", "--minutes", 1e-9) == 0
    assert not (tiny / "out" / "rows.jsonl").exists()  # no time for any
    assert run_study(tiny, "--seeds", 1, *only) == 0
    path = tiny / "out" / "rows.jsonl"
    rows = study.read_rows(path)
    assert len(rows) == len({r["run"] for r in rows}) == 9
    assert {p["patient"] for r in rows for p in r["patients"]} == {"case0", "case1", "case2"}
    assert all(0 < r["loss_share"] < 1 and len(r["loss"]) == 1 for r in rows)
    # Cut off in the middle of a row, as by a power failure: that run is done again, nothing else.
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    assert run_study(tiny, *only) == 0
    output = capsys.readouterr()
    assert "line 9: not a whole row" in output.err
    assert "18 runs, 8 done, 10 left" in output.out
    rows = study.read_rows(path)
    assert len(rows) == len({r["run"] for r in rows}) == 18
    assert path.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:8]))
    # A run is the same whenever it is done.
    for before, after in zip(map(json.loads, whole.splitlines()), rows, strict=False):
        if before["run"] == after["run"]:
            assert before["patients"] == after["patients"]
            assert before["loss"] == after["loss"]

    page = tiny / "page.md"
    names = [
        "table 1",
        "claims",
        "progress",
        "cost",
        "area",
        "means tiny",
        "differences tiny",
        "findings tiny",
        "agreement tiny",
    ]
    page.write_text("\n".join(f"<!-- {n} -->\nstale\n<!-- /{n} -->\n" for n in names))
    assert study_report.main([str(tiny / "out"), "--out", str(tiny / "report"), "--page", str(page)]) == 0
    text = page.read_text()
    assert "stale" not in text
    assert "3 patients, 2 seeds" in text
    assert "| case0 | 100.0 | 100.0 | 100.00 | 100.0 |" in text  # the second rater is the first here
    for name in ("precision_recall.png", "beta.png", "patients.png", "losses.png", "summary_tiny.csv"):
        assert (tiny / "report" / name).stat().st_size > 500


def test_study_refuses(tiny, capsys):
    assert run_study(tiny, "--only", "heart/*") == 2
    assert "nothing to run" in capsys.readouterr().err
    (tiny / "out").mkdir(exist_ok=True)
    (tiny / "out" / "rows.jsonl").write_text(json.dumps({"run": "x", "setting": "full", "seconds": 1}) + "\n")
    assert run_study(tiny) == 2
    assert "rows of the setting full" in capsys.readouterr().err
    (tiny / "data" / "tiny" / "case1" / "t1.nii.gz").unlink()
    study.read_data.cache_clear()
    assert run_study(tiny) == 2
    assert "patient case1 has no t1.nii.gz" in capsys.readouterr().err


def test_differences_are_paired():
    """A recipe that is 0.1 better for every patient and seed is so, however much patients and seeds differ."""
    random = np.random.default_rng(0)
    lines = []
    for i in range(8):
        for seed in range(3):
            dsc = random.random()
            for recipe, more in ((recipes.BASELINE, 0.0), ("tversky-.7", 0.1), ("ce", 0.1 * random.normal())):
                lines.append({"recipe": recipe, "patient": i, "seed": seed, "fold": i, "DSC": dsc + more})
    import pandas

    table = pandas.DataFrame(lines)
    better = study_report.difference(table, "tversky-.7", "DSC")
    assert better.mean == pytest.approx(0.1)
    assert better.low == pytest.approx(0.1)
    assert better.high == pytest.approx(0.1)
    assert better.p == pytest.approx(2 / 2**8)
    assert better.is_clear
    noise = study_report.difference(table, "ce", "DSC")
    assert noise.low < 0 < noise.high
    assert not noise.is_clear


def test_intervals_have_their_share():
    """Of a hundred studies of a difference of 0, about 95 intervals hold it (patients and seeds both vary)."""
    random = np.random.default_rng(1)
    held = 0
    for _ in range(100):
        values = random.normal(size=(12, 1)) + random.normal(size=(12, 3))
        low, high = study_report.interval(values, random)
        held += low <= 0 <= high
    assert 84 <= held <= 99


# ---- Getting and simulating data


def make_repository(folder, patients=("patient07", "patient19")):
    """As muschellij2/open_ms_data has it, small."""
    names = {"flair": "FLAIR_N4_x_regtoMNI", "t1": "T1_N4_x_regtoMNI", "t2": "T2_N4_x_regtoMNI"}
    names["lesions"] = "GOLD_STANDARD_N4_x_regtoMNI"
    for i, p in enumerate(patients):
        made = patient(i)
        for part, name in names.items():
            write(folder / "cross_sectional" / "MNI" / p / f"{name}.nii.gz", made["t1" if part == "t2" else part])
        write(folder / "cross_sectional" / "MNI" / p / "T1POST_N4_x_regtoMNI.nii.gz", made["t1"])
        write(folder / "cross_sectional" / "coregistered" / p / "FLAIR.nii.gz", made["t1"])
    write(folder / "cross_sectional" / "MNI" / "patient01" / f"{names['lesions']}.nii.gz", patient(0)["lesions"])
    return folder


@pytest.fixture
def small_grid(monkeypatch):
    monkeypatch.setattr(fetch_open_ms, "SHAPE", (26, 24, 22))
    monkeypatch.setattr(fetch_open_ms, "known_hashes", dict)


def test_fetch_from_a_clone(tmp_path, small_grid, capsys):
    source = make_repository(tmp_path / "clone")
    assert fetch_open_ms.main([str(tmp_path / "out"), "--source", str(source)]) == 0
    assert "2 of 30 patients" in (output := capsys.readouterr().out)
    assert "CC-BY" in output
    assert "doi:10.1007/s12021-017-9348-7" in output
    found = volumes.read_folder(tmp_path / "out", modalities=("flair", "t1", "t2"), label="lesions")
    assert [v.patient for v in found] == ["patient07", "patient19"]
    assert (tmp_path / "out" / "patient01" / "lesions.nii.gz").exists()
    assert torch.equal(found[0].image[1], found[0].image[2])  # T1 is not T1 with contrast
    assert fetch_open_ms.main([str(tmp_path / "out"), "--source", str(source)]) == 0  # again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clone", "out"]


def test_fetch_by_git(tmp_path, small_grid, monkeypatch):
    source = make_repository(tmp_path / "upstream")
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["config", "uploadpack.allowFilter", "true"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(fetch_open_ms, "REPOSITORY", source.as_uri())
    assert fetch_open_ms.fetch(tmp_path / "out", None) == ["patient07", "patient19"]
    assert not list(tmp_path.glob("tmp*"))


def test_fetch_without_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch_open_ms, "REPOSITORY", (tmp_path / "nowhere").as_uri())
    assert fetch_open_ms.main([str(tmp_path / "out")]) == 2
    assert "Without a network: clone it where there is one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spoilt", ["shape", "hash", "mask", "truncated"])
def test_fetch_refuses(tmp_path, small_grid, monkeypatch, capsys, spoilt):
    source = make_repository(tmp_path / "clone")
    folder = source / "cross_sectional" / "MNI" / "patient07"
    flair, mask = folder / "FLAIR_N4_x_regtoMNI.nii.gz", folder / "GOLD_STANDARD_N4_x_regtoMNI.nii.gz"
    digest = fetch_open_ms.content_hash(flair)
    monkeypatch.setattr(fetch_open_ms, "known_hashes", lambda: {"patient07/flair.nii.gz": digest})
    if spoilt == "shape":
        write(folder / "T1_N4_x_regtoMNI.nii.gz", patient(0)["t1"][1:])
    elif spoilt == "mask":
        write(mask, 3 * patient(0)["lesions"])
    elif spoilt == "truncated":
        flair.write_bytes(flair.read_bytes()[:-100])
    else:
        write(flair, patient(0)["flair"] + 1)
    message = {
        "shape": "t1.nii.gz: expected the shape",
        "hash": "flair.nii.gz: it is not the file that the study was made with",
        "mask": "lesions.nii.gz: expected a mask of 0 and 1",
        "truncated": "flair.nii.gz: not a whole gzip file",
    }[spoilt]
    assert fetch_open_ms.main([str(tmp_path / "out"), "--source", str(source)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    # Compressed in another way it is the same image.
    if spoilt == "hash":
        with gzip.open(flair, "wb", compresslevel=1) as file:
            write(tmp_path / "again.nii", patient(0)["flair"])
            file.write((tmp_path / "again.nii").read_bytes())
        assert fetch_open_ms.content_hash(flair) == digest


def test_fetch_touches_nothing_of_others(tmp_path, small_grid, capsys):
    source = make_repository(tmp_path / "clone")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("three years")
    assert fetch_open_ms.main([str(tmp_path / "home"), "--source", str(source)]) == 2
    assert "expected a new folder" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_known_hashes_are_whole():
    known = fetch_open_ms.known_hashes()
    assert len(known) == 39
    assert all(len(digest) == 64 for digest in known.values())
    assert {name.split("/")[0] for name in known} == set(fetch_open_ms.PATIENTS)


def test_simulation(tmp_path, monkeypatch, capsys):
    """From masks and a template that are small: the contrasts point the right way, the seed decides."""
    size = (40, 44, 36)
    brain = ball(size, (20, 22, 18), 15)
    white = ball(size, (20, 22, 18), 10)
    names = {p: f"mni_icbm152_{p}_tal_nlin_sym_09a_converted.nii.gz" for p in ("t1", "wm", "gm")}
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    for part, x in (("wm", white), ("gm", brain & ~white), ("t1", 0.7 * brain + 0.3 * white)):
        write(tmp_path / "mni" / names[part], x.astype(np.float32), affine)
    for i in range(4):
        write(
            tmp_path / "masks" / f"p{i}_lesions.nii.gz",
            ball(size, (18, 20 + i, 18), 3 + i / 2).astype(np.uint8),
            affine,
        )
    monkeypatch.setattr(simulate_ms, "BRAIN_BOX", ((10.0, 70.0), (14.0, 74.0), (6.0, 66.0)))
    monkeypatch.setattr(simulate_ms, "DEFORMATION", {"sigma_range": (3, 4), "magnitude_range": (1, 2)})
    monkeypatch.setattr(simulate_ms, "SPOTS", 3)
    command = ["--masks", str(tmp_path / "masks"), "--template", str(tmp_path / "mni"), "--subjects", "3"]
    for out in ("a", "b"):
        assert simulate_ms.main([str(tmp_path / out), *command]) == 0
    found, again = (
        volumes.read_folder(tmp_path / out, modalities=simulate_ms.MODALITIES, label="lesions") for out in ("a", "b")
    )
    assert [v.patient for v in found] == ["simulated01", "simulated02", "simulated03"]
    assert "Simulated images" in (tmp_path / "a" / "README.txt").read_text()
    for v, w in zip(found, again, strict=True):
        assert torch.equal(v.image, w.image)
        lesion, near = v.label[0] > 0, (v.image[1] > 0) & (v.label[0] == 0)
        flair, t1, t2 = (x[lesion].mean() / x[near].mean() for x in v.image)
        assert flair > 1.1
        assert t1 < 1.0
        assert t2 > 1.1
    assert not torch.equal(found[0].image, found[1].image)
    assert simulate_ms.main([str(tmp_path / "c"), *command[:-1], "9"]) == 2
    assert "--subjects: expected 1 to 4" in capsys.readouterr().err


# ---- Many ranks


def torchrun(folder, out, *options, ranks=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-port", free_port()]
    command += [ROOT / "examples" / "train_fcn.py", "--data", folder, "--out", out, "--spacing", 2, "--z-score"]
    command += [
        "--modalities",
        *MODALITIES,
        "--label",
        "lesions",
        "--features",
        2,
        "--levels",
        2,
        "--norm",
        "none",
    ]  # behind a norm a bias has no gradient but noise
    command += ["--patch-size", 16, 16, 16, "--batch-size", 4, "--lr", 1e-2, "--fold", 1, "--workers", 0, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [str(c) for c in (command if ranks > 1 else [sys.executable, *command[7:]])]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_ranks_train_as_one(tmp_path):
    """The weights of one process but for rounding, also where the run is interrupted and goes on."""
    write_patients(tmp_path / "data")
    found = {}
    for name, ranks in (("one", 1), ("two", 2)):
        result = torchrun(tmp_path / "data", tmp_path / name, "--steps", 6, "--no-loss-cost", ranks=ranks)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.count("Held-out patients") == 1
        found[name] = torch.load(tmp_path / name / "fold_1.pt", weights_only=True)
    first = torchrun(tmp_path / "data", tmp_path / "again", "--steps", 3, "--no-loss-cost")
    assert first.returncode == 0, first.stderr[-3000:]
    second = torchrun(tmp_path / "data", tmp_path / "again", "--steps", 6, "--no-loss-cost", "--resume")
    assert second.returncode == 0, second.stderr[-3000:]
    found["again"] = torch.load(tmp_path / "again" / "fold_1.pt", weights_only=True)
    for name, weight in found["one"]["network"].items():
        torch.testing.assert_close(found["two"]["network"][name], weight, rtol=1e-3, atol=1e-4)
        assert torch.equal(found["two"]["network"][name], found["again"]["network"][name])
    losses = {name: [row[2] for row in of["log"]] for name, of in found.items()}
    np.testing.assert_allclose(losses["two"], losses["one"], rtol=1e-4)
    uneven = torchrun(tmp_path / "data", tmp_path / "uneven", "--steps", 1, "--batch-size", 3)
    assert uneven.returncode != 0
    assert "--batch-size: expected a multiple of the 2 ranks, got 3" in uneven.stderr
