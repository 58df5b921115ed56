"""Which backend runs."""

from __future__ import annotations

import functools
import pathlib
import sys
import sysconfig
import types

import pytest
import torch
from common import inputs, relative
from processes import run

import tversky_kernels as tk
from tversky_kernels import _backends

LOGITS, TARGET = inputs(1, 3, (4, 5))


def test_available_backends():
    backends = tk.available_backends()
    assert list(backends) == ["cpu", "cuda", "triton", "blocks", "reference"]
    assert backends["cpu"] is True, "the tests expect the compiled kernels"
    assert backends["blocks"] is backends["reference"] is True
    for name in ("cuda", "triton"):
        assert backends[name] is True or isinstance(backends[name], str)


def test_auto_takes_the_kernels_and_falls_back_for_what_they_lack():
    cpu = torch.device("cpu")
    assert _backends.choose("auto", cpu, None) == "cpu"
    assert _backends.choose("auto", cpu, "dense targets") == "reference"
    assert _backends.choose("auto", torch.device("meta"), None) == "reference"


def test_auto_takes_the_faster_one_on_a_gpu(monkeypatch):
    missing = set()
    monkeypatch.setattr(_backends, "_available", lambda name, index: name not in missing or "not here")
    monkeypatch.setattr(_backends, "TRITON_CAN_COMPILE", True)
    gpu = torch.device("cuda")
    assert _backends.choose("auto", gpu, None) == "cuda"
    assert _backends.choose("auto", gpu, None, triton_first=True) == "triton"
    monkeypatch.setattr(_backends, "TRITON_CAN_COMPILE", False)
    assert _backends.choose("auto", gpu, None, triton_first=True) == "cuda"
    monkeypatch.setattr(_backends, "TRITON_CAN_COMPILE", True)
    missing.add("triton")
    assert _backends.choose("auto", gpu, None, triton_first=True) == "cuda"
    missing.add("cuda")
    assert _backends.choose("auto", gpu, None) == "blocks"
    assert _backends.choose("auto", gpu, "the gradient of a target") == "reference"


@pytest.mark.parametrize(
    ("code", "runs", "does_not"),
    [
        ("sm_80", ["8.0", "8.6", "8.9"], ["7.5", "9.0", "10.0", "12.0"]),
        ("sm_86", ["8.6", "8.9"], ["8.0", "9.0"]),
        ("sm_120", ["12.0", "12.1"], ["10.0", "8.0"]),
        ("compute_90", ["9.0", "10.3", "12.0"], ["8.0", "8.9", "7.5"]),
        ("sm_80 sm_90 compute_90", ["8.0", "8.6", "9.0", "10.0", "12.1"], ["7.5", "6.0"]),
        ("", [], ["8.0", "9.0"]),
    ],
)
def test_which_cards_run_what_nvcc_compiled(code, runs, does_not):
    for expected, cards in ((True, runs), (False, does_not)):
        for card in cards:
            capability = tuple(map(int, card.split(".")))
            assert _backends.has_code_for(tuple(code.split()), capability) is expected, card


@pytest.fixture
def card(monkeypatch):
    """A function that lets the package find a card of this compute capability, and kernels for it from 8.0 on."""

    def put(major, minor, driver=(13, 0), compiler=(13, 0)):
        found = types.SimpleNamespace(name="a card", major=major, minor=minor)
        library = _backends._ops.CudaLibrary(("sm_80", "sm_90", "compute_90"), compiler, driver)
        forget()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
        monkeypatch.setattr(_backends._ops, "cuda_library", lambda: library)
        for name in ("CUDA_MISSING", "TRITON_MISSING"):
            monkeypatch.setattr(_backends._ops, name, None)
        return torch.device("cuda", 0)

    def forget():
        _backends._card.cache_clear()
        _backends._too_old_for_cuda.cache_clear()

    yield put
    forget()


def test_a_card_that_is_too_old_for_a_backend_gets_another(card):
    for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
        assert _backends.choose("auto", card(*capability), None) == "cuda"
    gpu = card(7, 5)
    found = tk.available_backends()
    assert found["triton"] is True
    assert found["cuda"] == "it was compiled for sm_80, sm_90, compute_90, not for the compute capability 7.5 of a card"
    assert _backends.choose("auto", gpu, None) == "triton"
    with pytest.raises(ValueError, match=r"backend: 'cuda' is not available: it was compiled for sm_80, .* of a card"):
        _backends.choose("cuda", gpu, None)
    gpu = card(6, 1)
    assert tk.available_backends()["triton"] == "Triton takes a compute capability of 7.0 or more, a card has 6.1"
    assert _backends.choose("auto", gpu, None) == "blocks"


@pytest.mark.parametrize(
    ("driver", "runs"), [((13, 0), True), ((13, 1), True), ((14, 0), True), ((12, 9), False), ((0, 0), True)]
)
def test_a_driver_that_is_too_old_for_the_library(card, driver, runs):
    assert _backends.choose("auto", card(9, 0, driver), None) == ("cuda" if runs else "triton")
    if not runs:
        expected = "it was compiled by CUDA 13.0, the driver here runs CUDA 12.9"
        assert tk.available_backends()["cuda"] == expected


def test_a_driver_that_is_too_old_for_the_librarys_ptx(card):
    for capability, expected in (((8, 6), "cuda"), ((12, 0), "triton")):
        assert _backends.choose("auto", card(*capability, compiler=(13, 1)), None) == expected
    said = "it was compiled by CUDA 13.1, the driver here runs CUDA 13.0, and only its PTX is for a card"
    assert tk.available_backends()["cuda"] == said


def test_a_torch_for_rocm_gets_triton(card, monkeypatch):
    """Its cards have numbers of their own, and their tensors are on "cuda" too."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for capability in ((9, 4), (6, 0)):
        assert _backends.choose("auto", card(*capability), None) == "triton"
    assert tk.available_backends()["cuda"] == f"torch {torch.__version__} is built for ROCm"


def test_more_classes_than_cuda_takes(card):
    gpu = card(9, 0)
    for dtype, most in ((torch.float32, 2000), (torch.bfloat16, 2000), (torch.float64, 1000)):
        for classes, expected in ((most, "cuda"), (most + 1, "triton")):
            case = types.SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, classes, 8))
            beyond = _backends.beyond_cuda(case)
            assert _backends.choose("auto", gpu, None, unsupported_by_cuda=beyond) == expected
    with pytest.raises(
        ValueError, match=r"'cuda' does not compute more than 1000 classes of torch.float64; expected 'auto'"
    ):
        _backends.choose("cuda", gpu, None, unsupported_by_cuda=beyond)
    assert _backends.choose("triton", gpu, None, unsupported_by_cuda=beyond) == "triton"


def test_what_is_available_is_asked_and_not_traced(monkeypatch):
    """torch.compile could not trace all that torch tells of a card."""
    asked = []

    @functools.wraps(_backends._available)
    def untraceable(backend, index=None):
        asked.append(sys._getframe().f_code.co_name)
        return True

    monkeypatch.setattr(_backends, "_available", untraceable)
    compiled = torch.compile(tk.tversky_loss, fullgraph=True, backend="eager")
    for _ in range(2):
        assert relative(compiled(LOGITS, TARGET), tk.reference.tversky_loss(LOGITS, TARGET)) < 1e-6
    assert asked == ["untraceable"]


#: A size that cuda's kernels for one label a voxel do not take.
ODD = {"voxels": 2**22 + 1}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"focal_gamma": 2.0}, True),
        ({"squared": True}, True),
        ({"classes": 144}, False),
        ({"classes": 145}, True),
        ({"contiguous": False}, True),
        ({"voxels": 2**22 + 2}, True),
        ({**ODD, "is_cuda": False}, False),
        ({**ODD, "dtype": torch.float64}, False),
        ({**ODD, "logits": 2**24 - 1}, False),
        ({**ODD, "label_smoothing": 0.0}, False),
        ({**ODD, "ce_weight": 0.0}, False),
        ({**ODD, "activation": "sigmoid"}, False),
        ({**ODD, "dense": True}, False),
    ],
    ids=str,
)
def test_triton_is_taken_for_label_smoothing_of_many_logits_by_kernels_for_any_target(changes, expected):
    facts = {"is_cuda": True, "dtype": torch.bfloat16, "logits": 2**24, "label_smoothing": 0.1, "focal_gamma": 0.0}
    facts |= {"squared": False, "classes": 4, "voxels": 2**22, "contiguous": True}
    facts |= {"ce_weight": 1.0, "activation": "softmax", "dense": False, **changes}
    case = types.SimpleNamespace(
        numel=lambda: facts["logits"],
        shape=(1, facts["classes"], facts["voxels"]),
        stride=lambda dimension: facts["voxels"],
        is_contiguous=lambda: facts["contiguous"],
        **facts,
    )
    assert _backends.faster_by_triton(case, case, facts["dense"]) is expected


@pytest.mark.parametrize(("logits", "expected"), [(2**24, True), (2**24 - 1, False)])
def test_triton_is_taken_for_regions_of_many_logits(logits, expected):
    case = types.SimpleNamespace(is_cuda=True, numel=lambda: logits)
    assert _backends.faster_by_triton(case, None, False, regional=True) is expected


def test_a_named_backend_never_falls_back():
    dense = torch.nn.functional.one_hot(TARGET, 3).movedim(-1, 1).float().requires_grad_()
    with pytest.raises(ValueError, match="backend: 'cpu' does not compute the gradient of a target"):
        tk.tversky_loss(LOGITS, dense, backend="cpu")
    with torch.no_grad():
        tk.tversky_loss(LOGITS, dense, backend="cpu")
    with pytest.raises(ValueError, match="backend: 'cpu' expects tensors on cpu, got logits on meta"):
        tk.tversky_loss(LOGITS.to("meta"), TARGET.to("meta"), backend="cpu")
    for name in ("cuda", "triton"):
        reason = "is not available" if tk.available_backends()[name] is not True else "expects tensors on"
        with pytest.raises(ValueError, match=f"backend: '{name}' {reason}"):
            tk.tversky_loss(LOGITS, TARGET, backend=name)
    with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of 'cpu'.*got 'gpu'"):
        tk.tversky_loss(LOGITS, TARGET, backend="gpu")


def test_preferred_backend_changes_auto_and_nothing_else(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(_backends, "PREFERRED", "reference")
    assert _backends.choose("auto", cpu, None) == "reference"
    assert _backends.choose("cpu", cpu, None) == "cpu"
    monkeypatch.setattr(_backends, "PREFERRED", "cuda")
    assert _backends.choose("auto", cpu, None) == "cpu"
    monkeypatch.setattr(_backends, "PREFERRED", "nonsense")
    with pytest.raises(ValueError, match=r"TVERSKY_KERNELS_BACKEND: expected auto or one of .*'nonsense'"):
        tk.tversky_loss(LOGITS, TARGET)


@pytest.mark.parametrize(("value", "chosen"), [("reference", "reference"), ("auto", "cpu"), ("", "cpu")])
def test_environment_names_the_preferred_backend(value, chosen):
    program = "import torch, tversky_kernels._backends as b; print(b.choose('auto', torch.device('cpu'), None))"
    result = run([sys.executable, "-c", program], {"TVERSKY_KERNELS_BACKEND": value})
    assert result.stdout.split() == [chosen], result.stderr


@pytest.mark.parametrize(
    ("environment", "can"), [({"CC": "cc"}, True), ({"CC": "", "PATH": "no compiler here"}, False)]
)
def test_whether_triton_finds_a_compiler(environment, can):
    has_headers = (pathlib.Path(sysconfig.get_config_var("INCLUDEPY")) / "Python.h").exists()
    program = "import tversky_kernels._backends as b; print(b.TRITON_CAN_COMPILE)"
    assert run([sys.executable, "-c", program], environment).stdout.split() == [str(can and has_headers)]


def test_without_the_compiled_library(monkeypatch):
    monkeypatch.setattr(_backends._ops, "CPU_MISSING", "it was not built")
    assert tk.available_backends()["cpu"] == "it was not built"
    assert relative(tk.tversky_loss(LOGITS, TARGET), tk.reference.tversky_loss(LOGITS, TARGET)) < 1e-6
    with pytest.raises(ValueError, match="backend: 'cpu' is not available: it was not built"):
        tk.tversky_loss(LOGITS, TARGET, backend="cpu")


def test_devices_must_agree():
    with pytest.raises(ValueError, match="target: expected it on the logits' device cpu, got meta"):
        tk.tversky_loss(LOGITS, TARGET.to("meta"))
    with pytest.raises(ValueError, match="voxel_weight: expected it on the logits' device cpu, got meta"):
        tk.tversky_loss(LOGITS, TARGET, voxel_weight=torch.ones(1, 4, 5, device="meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_reference_on_cuda():
    logits, target = LOGITS.cuda(), TARGET.cuda()
    expected = tk.reference.tversky_loss(LOGITS, TARGET)
    torch.testing.assert_close(tk.tversky_loss(logits, target).cpu(), expected)
    assert torch.isnan(tk.tversky_loss(logits, target + 1))
    with pytest.raises(ValueError, match="got 3"):
        tk.tversky_loss(logits, target + 1, check_target=True)
