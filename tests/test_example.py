"""The example: trains, resumes to the same weights, reports, and says what is wrong with bad data."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

for _module in ("monai", "nibabel", "pydicom", "skimage", "sklearn", "matplotlib", "pandas", "tqdm"):
    pytest.importorskip(_module)

import evaluate
import fetch_lung_ct
import nibabel
import pandas
import train_fcn
import volumes
from fcn import FCN
from loss_cost import peak_bytes
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

import tversky_kernels as tk

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def train(*arguments):
    """Runs the command line in this process, for an import of everything it needs takes seconds."""
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = train_fcn.main([str(a) for a in arguments])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            print("" if isinstance(error.code, int) else error.code, file=sys.stderr)
        finally:
            torch.set_num_threads(threads)
    return Result(code, out.getvalue(), err.getvalue())


SMALL = [
    *("--features", 2, "--levels", 2, "--patch-size", 16, 16, 16, "--spacing", 2, "--lr", 1e-3, "--z-score"),
    *("--checkpoint-every", 2, "--threads", 1, "--workers", 0),
]


def ball(size, centre, radius):
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"))
    return ((grid - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(0) < radius**2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three volumes of a bright ball in noise, as NIfTI."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for i in range(3):
        label = ball((24, 22, 20), (8 + 3 * i, 11, 10), 5)
        image = random.normal(size=label.shape) + 4 * label
        for name, x in (("image", image.astype(np.float32)), ("label", label.astype(np.uint8))):
            nibabel.save(nibabel.Nifti1Image(x, np.diag([2.0, 2.0, 2.0, 1.0])), folder / f"case{i}_{name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    result = train("--data", data, "--out", out, "--steps", 6, *SMALL)
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result


def test_run_reports_what_the_paper_reports(finished):
    out, result = finished
    report = json.loads((out / "results.json").read_text())
    assert [r["patient"] for r in report["results"]] == ["case0", "case1", "case2", "mean", "pooled"]
    for row in report["results"]:
        for name in ("DSC", "sensitivity", "specificity", "F2", "APR"):
            assert 0 <= row[name] <= 1
    cost = report["loss_cost"]
    patch_mib = 2 * 16**3 * 4 / 2**20
    assert cost["tversky_kernels"]["MiB"] == pytest.approx(patch_mib, rel=0.01)
    assert cost["tversky_kernels, in place"]["MiB"] < 0.01
    assert cost["MONAI TverskyLoss (naive)"]["MiB"] > 2 * patch_mib
    assert all(c["seconds"] > 0 for c in cost.values())
    for name in ("precision_recall.png", "slices_case0.png", "slices_case2.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert str(out / name) in result.stdout
    assert len(pandas.read_csv(out / "results.csv")) == 5
    log = pandas.read_csv(out / "log.csv")
    assert list(zip(log.fold, log.step, strict=True)) == [(f, s) for f in range(3) for s in range(1, 7)]


def test_interrupted_run_ends_at_the_same_weights(data, tmp_path):
    options = ["--data", data, "--fold", 1, "--no-loss-cost", "--steps", 60, *SMALL]
    assert train(*options, "--out", tmp_path / "whole").returncode == 0
    command = [sys.executable, ROOT / "examples" / "train_fcn.py", *options, "--out", tmp_path / "killed"]
    process = subprocess.Popen(
        [str(c) for c in command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoint, deadline = tmp_path / "killed" / "fold_1.pt", time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(checkpoint, weights_only=True)["step"] < 60, "it was too quick to be interrupted"
    result = train(*options, "--out", tmp_path / "killed", "--resume")
    assert result.returncode == 0, result.stderr
    whole, resumed = (torch.load(tmp_path / d / "fold_1.pt", weights_only=True) for d in ("whole", "killed"))
    assert whole["step"] == resumed["step"] == 60
    assert whole["log"] == resumed["log"]
    for name, weight in whole["network"].items():
        assert torch.equal(weight, resumed["network"][name]), name


def test_resume_refuses_another_runs_checkpoint(data, finished):
    out, _ = finished
    result = train("--data", data, "--out", out, "--steps", 6, "--resume", "--fold", 0, *SMALL, "--alpha", 0.5)
    assert result.returncode != 0
    assert "other settings (alpha)" in result.stderr


def test_resume_refuses_a_corrupt_checkpoint(data, tmp_path):
    (tmp_path / "fold_0.pt").write_bytes(b"not a checkpoint")
    result = train("--data", data, "--out", tmp_path, "--steps", 2, "--resume", "--fold", 0, *SMALL)
    assert result.returncode != 0
    assert "fold_0.pt: not a readable checkpoint" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--loss", "dice", "--backend", "monai"],
        ["--loss", "cross-entropy"],
        ["--loss", "focal-tversky", "--backend", "reference"],
        ["--loss", "regional-tversky"],
        ["--amp"],
    ],
)
def test_other_losses_and_amp(data, tmp_path, options):
    result = train("--data", data, "--out", tmp_path, "--steps", 1, "--fold", 2, "--no-loss-cost", *SMALL, *options)
    assert result.returncode == 0, result.stderr


def test_backends_train_alike(data, tmp_path):
    losses = {}
    for backend in ("cpu", "reference", "monai"):
        out = tmp_path / backend
        result = train(
            "--data", data, "--out", out, "--steps", 3, "--fold", 0, "--no-loss-cost", *SMALL, "--backend", backend
        )
        assert result.returncode == 0, result.stderr
        losses[backend] = list(pandas.read_csv(out / "log.csv").loss)
    assert losses["cpu"] == pytest.approx(losses["reference"], rel=1e-4)
    assert losses["cpu"] == pytest.approx(losses["monai"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--patch-size", 15, 16, 16], "--patch-size: expected multiples of 2"),
        (["--steps", 0], "--steps: expected at least 1"),
        (["--fold", 7], "--fold: expected 0 to 2"),
        (["--backend", "monai", "--loss", "cross-entropy"], "--backend monai: expected --loss tversky or dice"),
    ],
)
def test_bad_options(data, tmp_path, options, message):
    result = train("--data", data, "--out", tmp_path, "--steps", 1, *SMALL, *options)
    assert result.returncode != 0
    assert message in result.stderr


def test_backend_that_is_not_there(data, tmp_path):
    if tk.available_backends()["cuda"] is not True:
        with pytest.raises(ValueError, match="backend: 'cuda' is not available"):
            train("--data", data, "--out", tmp_path, "--steps", 1, *SMALL, "--backend", "cuda")


def test_missing_data(tmp_path):
    for folder, message in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "neither sub-folders with DICOM")):
        with pytest.raises(volumes.DataError, match=message):
            volumes.read_folder(folder)
    result = train("--data", tmp_path / "nowhere")
    assert result.returncode == 2
    assert "no such folder" in result.stderr


def test_bad_nifti(data, tmp_path):
    for name, message in (
        ("missing", "patient a has no label.nii.gz and no a_label.nii.gz"),
        ("corrupt", "not a readable NIfTI"),
        ("shape", "a_label.nii.gz: expected the shape of a_image.nii.gz"),
        ("flipped", "a_label.nii.gz: expected the affine of a_image.nii.gz"),
        ("shifted", "a_label.nii.gz: expected the affine of a_image.nii.gz"),
        ("nan", "a_label.nii.gz: it has values that are not finite"),
        ("nan_image", "a_image.nii.gz: it has values that are not finite"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a_image.nii.gz").write_bytes((data / "case0_image.nii.gz").read_bytes())
        if name == "corrupt":
            (folder / "a_label.nii.gz").write_bytes((data / "case0_label.nii.gz").read_bytes()[:100])
        elif name == "shape":
            nibabel.save(nibabel.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)), folder / "a_label.nii.gz")
        elif name != "missing":
            images = {kind: nibabel.load(data / f"case0_{kind}.nii.gz") for kind in ("image", "label")}
            for kind, file in images.items():
                x, affine = np.array(file.dataobj, dtype=np.float32), file.affine.copy()
                if kind == "label":
                    affine[0, 3] += 2.0 * (name == "shifted")
                    affine = affine @ np.diag([-1, 1, 1, 1]) if name == "flipped" else affine
                x[3, 3, 3] = np.nan if name == ("nan" if kind == "label" else "nan_image") else x[3, 3, 3]
                nibabel.save(nibabel.Nifti1Image(x, affine), folder / f"a_{kind}.nii.gz")
        with pytest.raises(volumes.DataError, match=message):
            volumes.read_folder(folder)


def write_dicom(folder, slices=6, size=(16, 20)):
    """A tiny CT with one square contour around a bright square on slices 2 and 3."""
    folder.mkdir()
    frame = generate_uid()

    def base(kind, modality):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d = Dataset()
        d.file_meta, d.SOPClassUID, d.SOPInstanceUID = meta, kind, meta.MediaStorageSOPInstanceUID
        d.Modality, d.FrameOfReferenceUID, d.PatientID = modality, frame, "test"
        return d

    for k in range(slices):
        d = base(CTImageStorage, "CT")
        d.Rows, d.Columns, d.BitsAllocated, d.BitsStored, d.HighBit = *size, 16, 16, 15
        d.PixelRepresentation, d.SamplesPerPixel, d.PhotometricInterpretation = 0, 1, "MONOCHROME2"
        d.PixelSpacing, d.SliceThickness = [1.0, 2.0], 3.0
        d.ImageOrientationPatient, d.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-10.0, 5.0, 30.0 - 3 * k]
        d.RescaleSlope, d.RescaleIntercept = 1, -1000
        pixels = np.zeros(size, np.uint16)
        pixels[4:9, 3:8] = 1000
        d.PixelData = pixels.tobytes()
        d.save_as(folder / f"{k}.dcm", enforce_file_format=True)
    s = base(RTStructureSetStorage, "RTSTRUCT")
    roi, contours = Dataset(), Dataset()
    roi.ROINumber, roi.ROIName = 1, "GTV-1"
    contours.ReferencedROINumber, contours.ContourSequence = 1, []
    for k in (2, 3):
        c = Dataset()
        # Rows 4 to 8 (1 mm) and columns 3 to 7 (2 mm), by the outer edges of their voxels.
        corners = [(-10 + 2 * x, 5 + 1 * y) for x, y in ((2.5, 3.5), (7.5, 3.5), (7.5, 8.5), (2.5, 8.5))]
        c.ContourGeometricType, c.NumberOfContourPoints = "CLOSED_PLANAR", 4
        c.ContourData = [v for x, y in corners for v in (x, y, 30.0 - 3 * k)]
        contours.ContourSequence.append(c)
    s.StructureSetROISequence, s.ROIContourSequence = [roi], [contours]
    s.save_as(folder / "structures.dcm", enforce_file_format=True)
    return folder


def test_dicom_contours_land_on_their_voxels(tmp_path):
    volume = volumes.read_dicom(write_dicom(tmp_path / "p"), "GTV-1")
    assert volume.spacing == (3.0, 1.0, 2.0)
    expected = np.zeros((6, 16, 20), bool)
    expected[2:4, 4:9, 3:8] = True  # the order of the slices is turned round: 2 and 3 of 6 become 3 and 2
    assert (volume.label[0].numpy().astype(bool) == expected).all()
    assert (volume.image[0].numpy()[expected] == 0).all()
    assert volume.image.min() == -1000


def test_bad_dicom(tmp_path):
    def broken(name, change):
        folder = write_dicom(tmp_path / name)
        change(folder)
        return folder

    for name, change, message in (
        ("corrupt", lambda f: (f / "3.dcm").write_bytes(b"nothing" * 40), r"3\.dcm: not a readable DICOM"),
        (
            "truncated",
            lambda f: (f / "3.dcm").write_bytes((f / "3.dcm").read_bytes()[:-200]),
            r"3\.dcm: not a readable",
        ),
        ("slice", lambda f: (f / "3.dcm").unlink(), "slices are missing or doubled"),
        ("contours", lambda f: (f / "structures.dcm").unlink(), "no RTSTRUCT"),
        ("images", lambda f: [(f / f"{k}.dcm").unlink() for k in range(6)], "no CT slices"),
    ):
        with pytest.raises(volumes.DataError, match=message):
            volumes.read_dicom(broken(name, change), "GTV-1")
    with pytest.raises(volumes.DataError, match="no structure 'heart', only GTV-1"):
        volumes.read_dicom(write_dicom(tmp_path / "name"), "heart")


def test_prepare_keeps_the_lesions_volume():
    label = torch.from_numpy(ball((30, 60, 60), (15, 30, 30), 12)).to(torch.uint8)[None]
    volume = volumes.Volume("a", label.float() * 400 - 1000, label, (2.0, 1.0, 1.0))
    small = volumes.prepare(volume, 3.0, (-1000.0, 400.0))
    assert small.image.shape == small.label.shape == (1, 20, 20, 20)
    assert small.label.sum().item() * 27 == pytest.approx(label.sum().item() * 2, rel=0.1)
    assert small.image.min() >= -1
    assert small.image.max() <= 1


def test_scores():
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    probability = np.array([0.9, 0.8, 0.7, 0.1, 0.6, 0.2, 0.1, 0.1, 0.0, 0.0])
    found = evaluate.scores(truth, probability)  # 3 found, 1 missed, 1 false
    assert found["DSC"] == pytest.approx(6 / 8)
    assert found["sensitivity"] == pytest.approx(3 / 4)
    assert found["specificity"] == pytest.approx(5 / 6)
    assert found["F2"] == pytest.approx(5 * 3 / (5 * 3 + 4 * 1 + 1))
    assert evaluate.scores(truth, truth)["APR"] == 1
    nothing = evaluate.scores(np.zeros(10), probability)
    assert np.isnan(nothing["DSC"])
    assert nothing["specificity"] == pytest.approx(6 / 10)


def test_network_is_the_papers():
    network = FCN(1, 2, features=4, levels=3)
    assert network(torch.zeros(1, 1, 16, 8, 12)).shape == (1, 2, 16, 8, 12)
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv3d)]
    assert [c.out_channels for c in convolutions] == [4, 4, 8, 8, 16, 16, 4, 4, 8, 8, 2]
    assert [c.kernel_size for c in convolutions] == [(3, 3, 3)] * 10 + [(1, 1, 1)]
    assert not any(isinstance(m, torch.nn.InstanceNorm3d) for m in network.modules())


def test_learns_the_ball(data, tmp_path):
    """Forty steps are enough to find a bright ball in a patient that was never seen."""
    result = train(
        *("--data", data, "--out", tmp_path, "--steps", 40, "--fold", 1, "--no-loss-cost", *SMALL),
        *("--norm", "instance", "--lr", 2e-2, "--features", 4),
    )
    assert result.returncode == 0, result.stderr
    row = json.loads((tmp_path / "results.json").read_text())["results"][0]
    assert row["DSC"] > 0.8


def test_peak_bytes():
    def holds_three():
        a = torch.zeros(1 << 18)
        b = a + 1
        return a + b

    assert peak_bytes(holds_three, torch.device("cpu")) == 3 * (1 << 20)


def test_fetch_is_not_repeated(tmp_path, monkeypatch):
    (tmp_path / "pat_1").mkdir()
    for i in range(fetch_lung_ct.FILES):
        (tmp_path / "pat_1" / f"{i}.dcm").touch()
    monkeypatch.setattr(fetch_lung_ct.packages.subprocess, "run", lambda *_: pytest.fail("it has all files already"))
    fetch_lung_ct.fetch(tmp_path)


def test_fetch_removes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fetch_lung_ct.packages.subprocess, "run", lambda *_: pytest.fail("it refuses before it downloads")
    )
    precious = tmp_path / "home" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("three years")
    for directory in (precious.parent, precious):
        with pytest.raises(SystemExit, match="expected a new or an empty folder"):
            fetch_lung_ct.fetch(directory)
    assert precious.read_text() == "three years"


def test_fetch_takes_a_wheel_of_a_known_hash_alone(tmp_path, monkeypatch):
    asked = []

    def run(command):
        asked.append((command, pathlib.Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(fetch_lung_ct.packages.subprocess, "run", run)
    with pytest.raises(SystemExit, match="could not download"):
        fetch_lung_ct.fetch(tmp_path / "new")
    ((command, requirement),) = asked
    assert {"--require-hashes", "--only-binary", ":all:"} <= set(command)
    assert f"--hash=sha256:{fetch_lung_ct.SHA256}" in requirement
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files", [2, 3])
def test_fetch_reads_a_source_archive(tmp_path, monkeypatch, files):
    import tarfile

    def run(command):
        with tarfile.open(pathlib.Path(command[command.index("--dest") + 1]) / "p-1.tar.gz", "w:gz") as archive:
            for name in ("p-1/data/a.nii", "p-1/data/sub/b.nii", "p-1/data/c.txt", "p-1/other/d.nii"):
                (tmp_path / "x").write_text(name)
                archive.add(tmp_path / "x", name)
        return subprocess.CompletedProcess(command, 0)

    packages = fetch_lung_ct.packages
    monkeypatch.setattr(packages.subprocess, "run", run)
    how = ("p==1", "0" * 64, lambda name: name.endswith(".nii"), files, "p-1/data/", tmp_path / "new", True)
    if files == 3:
        with pytest.raises(SystemExit, match="expected 3 files in p==1, found 2"):
            packages.unpack(*how)
        assert not (tmp_path / "new").exists()
        return
    packages.unpack(*how)
    found = {str(p.relative_to(tmp_path / "new")) for p in (tmp_path / "new").rglob("*") if p.is_file()}
    assert found == {"a.nii", "sub/b.nii"}
    assert (tmp_path / "new" / "sub" / "b.nii").read_text() == "p-1/data/sub/b.nii"


def test_help_is_complete():
    result = train("--help")
    assert result.returncode == 0
    for name in ("--loss", "--backend", "--resume", "--amp", "--seed", "--patch-size", "--folds"):
        assert name in result.stdout
    assert train_fcn.parse_arguments([]).lr == 1e-4
