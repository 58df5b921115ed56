"""Bad input is told by name, by the public function and the reference alike."""

from __future__ import annotations

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import inputs
from torch._subclasses.fake_tensor import FakeTensorMode

import tversky_kernels as tk
from tversky_kernels import _arguments, _ops, _options

LOGITS, TARGET = inputs(2, 3, (4, 5))


def variants():
    yield "kernels", tk.tversky_loss
    yield "reference", tk.reference.tversky_loss


@pytest.fixture(params=["kernels", "reference"])
def loss(request):
    return dict(variants())[request.param]


CASES = {
    "float target of index shape": (
        {"target": TARGET.float()},
        TypeError,
        r"target: class indices .*\(2, 4, 5\).*float32.*long",
    ),
    "float target with a channel": ({"target": TARGET[:, None].float()}, TypeError, "target: class indices"),
    "target that requires a gradient": (
        {"target": TARGET.float().requires_grad_()},
        TypeError,
        "target: class indices",
    ),
    "label -1": ({"target": TARGET - 1}, ValueError, r"target: expected labels in \[0, 3\), got -1"),
    "label C": (
        {"target": torch.full_like(TARGET, 3)},
        ValueError,
        r"target: expected labels in \[0, 3\), got 3",
    ),
    "label C and an ignore_index": (
        {"target": torch.full_like(TARGET, 3), "ignore_index": 255},
        ValueError,
        r"or the ignore_index 255, got 3",
    ),
    "huge label": ({"target": torch.full_like(TARGET, 2**40)}, ValueError, f"got {2**40}"),
    "255 in uint8": ({"target": torch.full_like(TARGET, 255).to(torch.uint8)}, ValueError, "got 255"),
    "-1 in int8": ({"target": torch.full_like(TARGET, -1).to(torch.int8)}, ValueError, "got -1"),
    "no class": ({"logits": LOGITS[:, :0]}, ValueError, r"logits: expected at least one class.*\(2, 0, 4, 5\)"),
    "one class and softmax": ({"logits": LOGITS[:, :1]}, ValueError, "logits: softmax over one class.*sigmoid"),
    "one dimension": ({"logits": LOGITS[0, 0, 0]}, ValueError, r"logits: expected the shape \(N, C, \*spatial\)"),
    "integer logits": ({"logits": LOGITS.int()}, TypeError, "logits: expected float16.*int32"),
    "complex logits": ({"logits": LOGITS.cfloat()}, TypeError, "logits: expected float16.*complex64"),
    "logits are a list": ({"logits": [1.0]}, TypeError, "logits: expected a tensor, got list"),
    "target is an array": ({"target": TARGET.numpy()}, TypeError, "target: expected a tensor, got ndarray"),
    "batch mismatch": ({"target": TARGET[:1]}, ValueError, r"target: for logits \(2, 3, 4, 5\) expected.*\(1, 4, 5\)"),
    "space mismatch": ({"target": TARGET[..., :-1]}, ValueError, r"target: for logits.*got \(2, 4, 4\)"),
    "uint16 target": ({"target": TARGET.to(torch.uint16)}, TypeError, "target: class indices.*uint16"),
    "dense with too few channels": ({"target": LOGITS[:, :2]}, ValueError, r"target: for logits.*got \(2, 2, 4, 5\)"),
    "complex dense target": ({"target": LOGITS.cfloat()}, TypeError, "target: expected bool.*complex64"),
    "negative alpha": ({"alpha": -0.1}, ValueError, "alpha: expected a finite number >= 0, got -0.1"),
    "NaN beta": ({"beta": float("nan")}, ValueError, "beta: expected a finite number >= 0, got nan"),
    "alpha is a string": ({"alpha": "0.3"}, TypeError, "alpha: expected a number or one number a class, got str"),
    "alpha is a bool": ({"alpha": True}, TypeError, "alpha: expected a number"),
    "two alphas for three classes": (
        {"alpha": [0.1, 0.2]},
        ValueError,
        r"alpha: expected a number or 3 numbers.*\(2\)",
    ),
    "one negative alpha": ({"alpha": [0.1, -0.2, 0.1]}, ValueError, r"alpha\[1\]: expected.*got -0.2"),
    "negative alpha tensor": ({"alpha": torch.tensor([0.1, -0.5, 0.3])}, ValueError, "alpha: expected.*got -0.5"),
    "negative class_weight": ({"class_weight": [1, 1, -1]}, ValueError, r"class_weight\[2\]: expected.*got -1"),
    "too many class weights": ({"class_weight": torch.ones(4)}, ValueError, "class_weight: expected.*3 numbers"),
    "complex class_weight": ({"class_weight": torch.ones(3).cfloat()}, TypeError, "class_weight: expected real"),
    "gamma 0": ({"gamma": 0}, ValueError, "gamma: expected a finite number > 0, got 0"),
    "gamma is a list": ({"gamma": [0.75]}, TypeError, "gamma: expected a number > 0, got list"),
    "reduction is a list": ({"reduction": ["mean"]}, ValueError, r"reduction: expected one of .*\['mean'\]"),
    "gamma is None": ({"gamma": None}, TypeError, "gamma: expected a number > 0, got NoneType"),
    "negative smooth_nr": ({"smooth_nr": -1e-5}, ValueError, "smooth_nr: expected"),
    "infinite alpha": ({"alpha": float("inf")}, ValueError, "alpha: expected"),
    "infinite alpha and beta": ({"alpha": float("inf"), "beta": float("inf")}, ValueError, "alpha: expected"),
    "no alpha and beta": ({"alpha": None, "beta": None}, TypeError, "alpha: expected"),
    "infinite smooth_dr": ({"smooth_dr": float("inf")}, ValueError, "smooth_dr: expected"),
    "unknown activation": ({"activation": "relu"}, ValueError, "activation: expected one of 'softmax'.*'relu'"),
    "unknown reduction": ({"reduction": "average"}, ValueError, "reduction: expected one of .*'average'"),
    "unknown absent": ({"absent": None}, ValueError, "absent: expected one of 'keep'"),
    "batch is a number": ({"batch": 1}, TypeError, "batch: expected True or False, got 1"),
    "include_background is a string": ({"include_background": "no"}, TypeError, "include_background: expected True"),
    "squared is a number": (
        {"squared": 1, "alpha": 0.5, "beta": 0.5},
        TypeError,
        "squared: expected True or False, got 1",
    ),
    "squared with two weights": ({"squared": True}, ValueError, "squared: expected alpha and beta to be one number"),
    "squared with a weight a class": (
        {"squared": True, "alpha": [0.5] * 3, "beta": [0.5] * 3},
        ValueError,
        "squared: expected alpha and beta to be one",
    ),
    "squared and soft_label": (
        {"squared": True, "soft_label": True, "alpha": 0.5, "beta": 0.5},
        ValueError,
        "squared: expected False with",
    ),
    "soft_label is None": ({"soft_label": None}, TypeError, "soft_label: expected True"),
    "ignore_index is a float": ({"ignore_index": 1.0}, TypeError, "ignore_index: expected an integer or None, got 1.0"),
    "ignore_index is too large": ({"ignore_index": 2**63}, ValueError, "ignore_index: expected a 64-bit integer"),
    "check_target is a string": ({"check_target": "yes"}, TypeError, "check_target: expected None, True or False"),
    "voxel_weight of another shape": (
        {"voxel_weight": torch.ones(2, 3, 4, 5)},
        ValueError,
        r"voxel_weight: for logits.*expected \(2, 4, 5\) or \(2, 1, 4, 5\), got \(2, 3, 4, 5\)",
    ),
    "voxel_weight is int64": ({"voxel_weight": TARGET}, TypeError, "voxel_weight: expected bool, uint8 or"),
    "negative voxel_weight": ({"voxel_weight": -torch.ones(2, 4, 5)}, ValueError, "voxel_weight: expected values >= 0"),
    "NaN in voxel_weight": (
        {"voxel_weight": torch.full((2, 4, 5), torch.nan)},
        ValueError,
        "voxel_weight: expected values >= 0, got nan",
    ),
    "voxel_weight that requires a gradient": (
        {"voxel_weight": torch.ones(2, 4, 5, requires_grad=True)},
        ValueError,
        "voxel_weight: expected constants",
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_bad_input(loss, case):
    changed, error, message = CASES[case]
    arguments = {"logits": LOGITS, "target": TARGET, **changed}
    logits, target = arguments.pop("logits"), arguments.pop("target")
    with pytest.raises(error, match=message):
        loss(logits, target, **arguments)


def test_bad_label_for_the_binary_case(loss):
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 2\), got 2"):
        loss(LOGITS[:, :1], torch.full((2, 4, 5), 2), activation="sigmoid")


def test_what_was_right_once_is_not_taken_for_what_equals_it(loss):
    loss(LOGITS, TARGET, gamma=1.0, batch=True)
    with pytest.raises(TypeError, match="batch: expected True or False, got 1"):
        loss(LOGITS, TARGET, gamma=1.0, batch=1)
    with pytest.raises(TypeError, match="gamma: expected a number > 0, got bool"):
        loss(LOGITS, TARGET, gamma=True, batch=True)


def test_unknown_argument(loss):
    with pytest.raises(TypeError, match="colour"):
        loss(LOGITS, TARGET, colour="red")


def test_defaults_are_the_signatures():
    """What the reference and deep_supervision_loss take for granted is what the functions' signatures say."""
    run = {"process_group", "sample_group", "grad_reduction", "inplace_backward", "check_target", "backend"}
    for function, expected in (
        (tk.tversky_loss, _options.TVERSKY_DEFAULTS),
        (tk.tversky_ce_loss, _options.TVERSKY_DEFAULTS | _options.CE_DEFAULTS),
    ):
        parameters = inspect.signature(function).parameters.values()
        found = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY and p.name not in run}
        assert found == expected


def test_inplace_backward_is_a_flag():
    with pytest.raises(TypeError, match="inplace_backward: expected True or False, got 1"):
        tk.tversky_loss(LOGITS, TARGET, inplace_backward=1)


@pytest.mark.parametrize("bad", [{"target": TARGET + 1}, {"voxel_weight": -torch.ones(2, 4, 5)}])
def test_check_target_false_gives_nan(loss, bad):
    logits = LOGITS.clone().requires_grad_()
    arguments = {"target": TARGET, **bad}
    value = loss(logits, arguments.pop("target"), check_target=False, **arguments)
    assert torch.isnan(value)
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.isnan(gradient).any()


def test_the_first_bad_label_is_named_whatever_the_threads(threads):
    logits, target = inputs(2, 3, (64, 64, 64))
    target[1, 63, 63, 63], target[1, 0, 0, 0], target[0, 40, 0, 0] = 77, 66, 55
    for count in (1, 2, 4):
        threads(count)
        with pytest.raises(ValueError, match="got 55"):
            tk.tversky_loss(logits, target)


def test_nothing_is_lost_when_an_error_is_raised():
    logits = LOGITS.clone().requires_grad_()
    logits = logits * 1
    with pytest.raises(ValueError, match="got 3"):
        tk.tversky_loss(logits, torch.full_like(TARGET, 3), inplace_backward=True)
    assert torch.equal(logits, LOGITS)
    assert logits._version == 0


def test_accepted_forms_agree(loss):
    expected = loss(LOGITS, TARGET, alpha=0.3, beta=0.7, class_weight=[1.0, 1.0, 1.0])
    for alpha in (0.3, [0.3] * 3, (0.3,) * 3, torch.tensor([0.3] * 3).double(), torch.tensor(0.3).double()):
        torch.testing.assert_close(loss(LOGITS, TARGET, alpha=alpha, beta=0.7), expected)
    torch.testing.assert_close(loss(LOGITS, TARGET[:, None], class_weight=1), expected)


def test_numbers_and_arrays_of_numpy(loss):
    """Frequencies of classes, and what a configuration was read into."""
    weight = np.array([0.2, 1.0, 3.0], np.float32)
    options = {"gamma": 0.75, "ignore_index": 1, "smooth_nr": 0.5}
    expected = loss(LOGITS, TARGET, alpha=0.25, beta=0.75, class_weight=weight.tolist(), **options)
    options = {"gamma": np.float32(0.75), "ignore_index": np.int64(1), "smooth_nr": np.float16(0.5)}
    for alpha in (np.float32(0.25), np.array(0.25), np.full(3, 0.25), list(np.full(3, 0.25, np.float32))):
        for beta in (0.75, np.float64(0.75), np.float32(0.75)):
            assert torch.equal(loss(LOGITS, TARGET, alpha=alpha, beta=beta, class_weight=weight, **options), expected)
    assert torch.equal(
        loss(LOGITS, TARGET, alpha=np.float32(0.5), beta=np.float32(0.5), squared=True),
        loss(LOGITS, TARGET, alpha=0.5, beta=0.5, squared=True),
    )
    for wrong, error, message in (
        (np.ones(4), ValueError, "class_weight: expected a number or 3 numbers"),
        (np.array([True, False, True]), TypeError, r"class_weight\[0\]: expected a number >= 0, got bool"),
        (np.array([1.0, -2.0, 1.0]), ValueError, r"class_weight\[1\]: expected a finite number >= 0, got -2.0"),
        (np.ones((3, 3)), TypeError, r"class_weight\[0\]: expected a number >= 0, got list"),
    ):
        with pytest.raises(error, match=message):
            loss(LOGITS, TARGET, class_weight=wrong)
    with pytest.raises(TypeError, match="ignore_index: expected an integer or None"):
        loss(LOGITS, TARGET, ignore_index=np.float32(1))


def test_class_parameters_are_made_once():
    """A copy to an accelerator at every step would make the host wait."""
    options = {"alpha": [0.3, 0.4, 0.5], "beta": 0.7, "class_weight": (1.0, 2.0, 3.0)}
    first, again = (_arguments.check_arguments(LOGITS, TARGET, **options).class_parameters for _ in range(2))
    assert first is again
    other = _arguments.check_arguments(LOGITS, TARGET, **{**options, "alpha": [0.3, 0.4, 0.6]}).class_parameters
    assert other[0].tolist() == [0.3, 0.4, 0.6]
    ones = _arguments.check_arguments(LOGITS, TARGET, alpha=[1.0, 1.0, 1.0]).class_parameters
    assert torch.equal(ones[0], torch.ones(3))
    with pytest.raises(TypeError, match=r"alpha\[0\]: expected a number >= 0, got bool"):
        tk.tversky_loss(LOGITS, TARGET, alpha=[True, 1.0, 1.0])
    with pytest.raises(TypeError, match=r"alpha\[1\]: expected a number >= 0, got list"):
        tk.tversky_loss(LOGITS, TARGET, alpha=[1.0, [1.0], 1.0])


def test_class_parameters_of_the_host_are_numbers_elsewhere():
    weight = torch.tensor([1.0, 2.0, 3.0])
    elsewhere = LOGITS.to("meta"), TARGET.to("meta")
    first, again = (
        _arguments.check_arguments(*elsewhere, class_weight=weight, beta=1).class_parameters for _ in range(2)
    )
    assert first is again
    assert first.is_meta
    with pytest.raises(ValueError, match="class_weight: expected a number or 3 numbers"):
        _arguments.check_arguments(*elsewhere, class_weight=torch.ones(4))


def test_class_parameters_of_one_mode_do_not_reach_another():
    options = {"alpha": [0.31, 0.32, 0.33], "class_weight": [1.5, 2.5, 3.5]}
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(LOGITS), mode.from_tensor(TARGET)
        tk.tversky_loss(*fake, backend="reference", check_target=False, **options)
    torch.func.grad(lambda z: tk.tversky_loss(z, TARGET, **options))(LOGITS)
    with torch.inference_mode():
        expected = tk.tversky_loss(LOGITS, TARGET, **options)
    logits = LOGITS.clone().requires_grad_()
    loss = tk.tversky_loss(logits, TARGET, **options)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.isfinite(logits.grad).all()


def test_tensors_that_are_not_strided():
    """Nested, sparse and MKL-DNN's: an error that names the argument, wherever one stands."""
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(3, 5)])
    jagged = torch.nested.nested_tensor([torch.randn(4, 3), torch.randn(5, 3)], layout=torch.jagged)
    logits, target = torch.randn(2, 3, 4), torch.zeros(2, 3, 4)
    kinds = {
        "nested": (nested, jagged),
        "sparse_coo": (logits.to_sparse(),),
        "sparse_csr": (logits.to_sparse_csr(),),
        "mkldnn": (logits.to_mkldnn(),),
    }
    for kind, tensors in kinds.items():
        for x in tensors:
            message = f"expected a dense tensor, got a {kind} one"
            for loss in (tk.tversky_loss, tk.reference.tversky_loss, tk.overlap_counts, tk.generalized_dice_loss):
                with pytest.raises(TypeError, match=f"logits: {message}"):
                    loss(x, target)
                with pytest.raises(TypeError, match=f"target: {message}"):
                    loss(logits, x)
            with pytest.raises(TypeError, match=f"voxel_weight: {message}"):
                tk.tversky_loss(logits, target, voxel_weight=x)
            with pytest.raises(TypeError, match=f"features: {message}"):
                tk.linear_tversky_loss(x, torch.randn(3, 3), None, target)
            with pytest.raises(TypeError, match=f"logits: {message}"):
                tk.deep_supervision_loss([x], target)


def test_loaded_again():
    """The package itself can be; its operators are registered once, which a second time says."""
    script = """
import importlib, sys, torch
import tversky_kernels as tk
importlib.reload(tk)
print(tk.tversky_loss(torch.randn(1, 2, 4), torch.zeros(1, 4, dtype=torch.long)).item() > 0)
for again in (lambda: importlib.reload(tk._ops), lambda: importlib.import_module("tversky_kernels")):
    try:
        again()
    except ImportError as error:
        print(error)
    for name in [name for name in sys.modules if name.startswith("tversky_kernels")]:
        del sys.modules[name]
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    once = "a process registers the operators of tversky_kernels once; start a new one to load it again"
    assert result.stdout.splitlines() == ["True", once, once], result.stdout + result.stderr


def test_errors_of_kernels_are_passed_on(monkeypatch):
    """Only what a kernel has found in the data is said again, and nothing is read for it."""
    reads = []
    monkeypatch.setattr(_arguments, "raise_for_bad_values", lambda *_: reads.append(1))

    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def function(z, **options):
        return tk.tversky_loss(z, TARGET, **options)

    for name in ("tversky_loss", "count_pass"):
        operators = _ops.OPERATORS["cpu"]._replace(**{name: fail})
        monkeypatch.setitem(_ops.OPERATORS, "cpu", operators)
    for check_target in (None, True, False):
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            function(LOGITS, check_target=check_target)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            tk.overlap_counts(LOGITS, TARGET, check_target=check_target)
    assert not reads
