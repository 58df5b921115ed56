"""torch.compile, torch.export, AOTInductor, fake tensors, forward-mode derivatives, and options that are tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from common import inputs, loss_and_gradient
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import tversky_kernels as tk

NUMBERS = {
    "alpha": 0.4, "beta": 0.6, "gamma": 0.75, "smooth_nr": 0.1, "smooth_dr": 0.2, "tversky_weight": 0.7,
    "ce_weight": 0.6, "label_smoothing": 0.2,
}  # fmt: skip
PER_CLASS = {
    "alpha": [0.2, 0.5, 0.9],
    "beta": [0.9, 0.5, 0.1],
    "class_weight": [1.0, 2.0, 0.5],
    "ce_class_weight": [1.0, 2.0, 3.0],
}
LAYOUTS = [
    {}, {"batch": True, "reduction": "none"}, {"reduction": "none"}, {"absent": "skip", "include_background": False},
    {"activation": "sigmoid"}, {"squared": True, "alpha": 0.5, "beta": 0.5},
]  # fmt: skip


def volumes():
    logits, target = inputs(2, 3, (6, 7))
    target[0] = target[0].clamp(max=1)  # class 2 is absent
    return logits, target


@pytest.mark.parametrize("name", list(NUMBERS))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_number_as_a_tensor(name, layout):
    """A 0-d tensor is the number, as it is or with a gradient; the derivative is the plain formula's."""
    if name in layout:
        return
    logits, target = volumes()
    for function in (tk.tversky_loss, tk.tversky_ce_loss):
        if name in ("tversky_weight", "ce_weight", "label_smoothing") and function is tk.tversky_loss:
            continue
        expected = loss_and_gradient(function, logits, target, **layout, **{name: NUMBERS[name]})
        found = loss_and_gradient(function, logits, target, **layout, **{name: torch.tensor(NUMBERS[name]).double()})
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
        if layout.get("squared") and name in ("alpha", "beta"):
            continue
        value = torch.tensor(NUMBERS[name], dtype=torch.float64, requires_grad=True)
        found = loss_and_gradient(function, logits, target, **layout, **{name: value})
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)

        def of_value(v, function=function):
            return function(logits.double(), target, **layout, **{name: v})

        assert torch.autograd.gradcheck(of_value, value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", list(PER_CLASS))
def test_learnable_values_of_each_class(name, backend):
    logits, target = volumes()
    value = torch.tensor(PER_CLASS[name], dtype=torch.float64, requires_grad=True)
    expected = loss_and_gradient(tk.tversky_ce_loss, logits, target, **{name: PER_CLASS[name]})
    found = loss_and_gradient(tk.tversky_ce_loss, logits, target, backend=backend, **{name: value})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    z, part = logits[..., :3, :4].double().requires_grad_(), target[..., :3, :4]
    both = (lambda z, v: tk.tversky_ce_loss(z, part, backend=backend, **{name: v}), (z, value))
    assert torch.autograd.gradcheck(*both)
    assert torch.autograd.gradgradcheck(*both)


def test_a_learnable_value_with_the_head_and_in_deep_supervision():
    logits, target = volumes()
    features, weight = torch.randn(2, 4, 6, 7, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    found, expected = [], []
    for results, function in (
        (found, lambda v: tk.linear_tversky_loss(features, weight, None, target, loss="tversky_ce", alpha=v)),
        (expected, lambda v: tk.tversky_ce_loss(torch.einsum("nkhw,ck->nchw", features, weight), target, alpha=v)),
    ):
        alpha = torch.tensor(0.4, requires_grad=True)
        loss = function(alpha)
        results.extend((loss.detach(), *torch.autograd.grad(loss, (alpha, features, weight))))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    alpha = torch.tensor(0.4, requires_grad=True)
    tk.deep_supervision_loss([logits, logits[..., ::2]], target, alpha=alpha).backward()
    assert alpha.grad != 0


def test_a_learnable_value_in_place():
    logits, target = volumes()
    gamma = torch.tensor(0.75, requires_grad=True)
    leaf = logits.clone().requires_grad_()
    expected = torch.autograd.grad(tk.tversky_loss(leaf * 1, target, gamma=gamma), (leaf, gamma))
    found = torch.autograd.grad(tk.tversky_loss(leaf * 1, target, gamma=gamma, inplace_backward=True), (leaf, gamma))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": torch.tensor(0.0)}, ValueError, "gamma: expected a finite number > 0, got 0"),
        ({"smooth_nr": torch.tensor(-1.0)}, ValueError, "smooth_nr: expected a finite number >= 0, got -1"),
        ({"label_smoothing": torch.tensor(1.5)}, ValueError, r"label_smoothing: expected a finite number in \[0, 1\]"),
        ({"gamma": torch.ones(3)}, TypeError, r"gamma: expected a number or a 0-d tensor of one, got a tensor \(3\)"),
        ({"ce_weight": torch.tensor(True)}, TypeError, "ce_weight: expected a number or a 0-d tensor"),
        ({"alpha": torch.tensor(-0.5)}, ValueError, "alpha: expected a finite number >= 0, got -0.5"),
        ({"focal_gamma": torch.ones(2)}, TypeError, "focal_gamma: expected a number or a 0-d tensor"),
    ],
)
def test_wrong_tensors(options, error, message):
    with pytest.raises(error, match=message):
        tk.tversky_ce_loss(*volumes(), **options)


@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("name", list(NUMBERS))
def test_a_schedule_compiles_at_most_twice(name, kind):
    torch._dynamo.reset()
    logits, target = volumes()
    compiled_graphs = []

    def backend(graph, example_inputs):
        compiled_graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(z, t, value):
        return tk.tversky_ce_loss(z, t, **{name: value})

    for i in range(12):
        value = NUMBERS[name] * (1 + i / 100)
        found = compiled(logits, target, torch.tensor(value) if kind == "tensor" else value)
        torch.testing.assert_close(found, tk.tversky_ce_loss(logits, target, **{name: value}), rtol=1e-6, atol=0)
    assert len(compiled_graphs) <= (1 if kind == "tensor" else 2)


def test_a_modules_schedule_compiles_at_most_twice():
    torch._dynamo.reset()
    logits, target = volumes()
    criterion, graphs = tk.TverskyCELoss(ce_weight=1.0), []
    compiled = torch.compile(criterion, fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward)
    for i in range(12):
        criterion.ce_weight = 1 / (1 + i)
        torch.testing.assert_close(compiled(logits, target), tk.tversky_ce_loss(logits, target, ce_weight=1 / (1 + i)))
    assert len(graphs) <= 2


OF_NUMPY = {
    "class_weight": np.array([1.0, 2.0, 3.0]),
    "alpha": np.float32(0.25),
    "beta": np.array([0.25, 0.5, 0.75], np.float32),
    "gamma": np.float64(0.75),
    "ignore_index": np.int64(1),
}


@pytest.mark.parametrize("where", ["closure", "argument", "module"])
@pytest.mark.parametrize("name", list(OF_NUMPY))
def test_compiled_with_numpys_numbers(name, where):
    torch._dynamo.reset()
    logits, target = volumes()
    options = {name: OF_NUMPY[name]}
    expected = loss_and_gradient(tk.tversky_loss, logits, target, **options)
    if where == "argument":
        compiled = torch.compile(
            lambda z, t, v: tk.tversky_loss(z, t, **{name: v}), fullgraph=True, backend="aot_eager"
        )
        found = loss_and_gradient(compiled, logits, target, OF_NUMPY[name])
    elif where == "module":
        found = loss_and_gradient(
            torch.compile(tk.TverskyLoss(**options), fullgraph=True, backend="aot_eager"), logits, target
        )
    else:
        found = loss_and_gradient(
            torch.compile(lambda z, t: tk.tversky_loss(z, t, **options), fullgraph=True, backend="aot_eager"),
            logits,
            target,
        )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dense", [False, True])
def test_compiled_with_an_ignored_label_of_numpy_and_weights(dense):
    torch._dynamo.reset()
    logits, target = volumes()
    weight = torch.rand(2, 6, 7)
    if dense:
        target = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).to(torch.int16)
        target[:, :, 2] = -1
    ignored = np.int64(-1 if dense else 2)
    options = {"voxel_weight": weight, "ignore_index": ignored}
    found = loss_and_gradient(
        torch.compile(lambda z, t, w: tk.tversky_loss(z, t, voxel_weight=w, ignore_index=ignored), fullgraph=True),
        logits, target, weight,
    )  # fmt: skip
    torch.testing.assert_close(
        found, loss_and_gradient(tk.tversky_loss, logits, target, **options), rtol=1e-6, atol=1e-8
    )


EXPORTED = [
    {"alpha": [0.2, 0.3, 0.4], "class_weight": np.array([1.0, 2.0, 3.0])},
    {"alpha": np.float32(0.3), "gamma": np.float64(0.75), "ignore_index": np.int64(1)},
    {"class_weight": torch.tensor([1.0, 2.0, 3.0]), "ce_class_weight": [1.0, 2.0, 3.0]},
]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", EXPORTED)
def test_export(options, strict):
    criterion = tk.TverskyCELoss(**options)
    program = torch.export.export(criterion, volumes(), strict=strict)
    torch.testing.assert_close(program.module()(*volumes()), criterion(*volumes()))


def test_a_package_of_aotinductor_loads(tmp_path):
    """Numbers per class: its constants are JSON, which has no NaN."""
    criterion = tk.TverskyCELoss(**EXPORTED[0])
    program = torch.export.export(criterion, volumes())
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "loss.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(*volumes()), criterion(*volumes()))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_with_tensors_among_the_options(mode):
    logits, target = volumes()
    weight = torch.tensor([1.0, 2.0, 3.0])

    def function(z, t, w):
        return tk.tversky_ce_loss(z, t, class_weight=w, ce_class_weight=w)

    graph = make_fx(function, tracing_mode=mode)(logits, target, weight)
    assert torch.equal(graph(logits, target, weight), function(logits, target, weight))


def test_fake_tensors_with_tensors_among_the_options():
    with FakeTensorMode() as mode:
        logits, target = (mode.from_tensor(x) for x in volumes())
        weight = mode.from_tensor(torch.tensor([1.0, 2.0, 3.0]))
        loss = tk.tversky_loss(logits.requires_grad_(), target, alpha=weight, class_weight=weight)
        assert loss.shape == ()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.shape == logits.shape
        criterion = tk.TverskyLoss(class_weight=weight)
        assert criterion(logits, target).shape == ()


@pytest.mark.parametrize("function", [tk.tversky_loss, tk.tversky_ce_loss, tk.generalized_dice_loss])
def test_forward_mode(function):
    logits, target = volumes()
    logits, tangent = logits.double(), torch.randn(logits.shape, dtype=torch.float64)
    z = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(z, target), z)
    value, along = torch.func.jvp(lambda x: function(x, target), (logits,), (tangent,))
    torch.testing.assert_close(value, function(logits, target))
    torch.testing.assert_close(along, (gradient * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        loss = function(torch.autograd.forward_ad.make_dual(logits, tangent), target)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss).tangent, along)
    assert torch.autograd.gradcheck(lambda x: function(x, target), z, check_forward_ad=True)


def test_hessian_and_forward_mode_of_the_head():
    logits, target = inputs(1, 3, (4,), torch.float64)
    hessian = torch.func.hessian(lambda x: tk.tversky_ce_loss(x, target))(logits)
    expected = torch.func.hessian(lambda x: tk.reference.tversky_ce_loss(x, target))(logits)
    torch.testing.assert_close(hessian, expected)
    features, weight = torch.randn(1, 2, 4), torch.randn(3, 2)

    def head(w):
        return tk.linear_tversky_loss(features, w, None, target)

    _, along = torch.func.jvp(head, (weight,), (torch.ones_like(weight),))
    w = weight.clone().requires_grad_()
    torch.testing.assert_close(along, torch.autograd.grad(head(w), w)[0].sum())


def test_a_call_under_func_overwrites_nothing():
    logits, target = volumes()
    before = logits.clone()
    gradient = torch.func.grad(lambda z: tk.tversky_loss(z * 1, target, inplace_backward=True))(logits)
    assert torch.equal(logits, before)
    torch.testing.assert_close(gradient, loss_and_gradient(tk.tversky_loss, logits, target)[1])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_at_the_ends_of_their_ranges(requires_grad):
    """1 is no exponent, also of an index that smoothing makes negative; 0 of an infinite cross-entropy is nothing."""
    logits, target = volumes()
    target = target.clamp(max=1)
    logits[:, 2] = -torch.inf
    as_tensor = (lambda x: torch.tensor(x, requires_grad=True)) if requires_grad else torch.tensor
    for options, name in (
        ({"smooth_nr": 99.0, "gamma": 1.0}, "gamma"),
        ({"label_smoothing": 0.0}, "label_smoothing"),
        ({"ce_weight": 0.0}, "ce_weight"),
        ({"tversky_weight": 0.0}, "tversky_weight"),
    ):
        expected = loss_and_gradient(tk.tversky_ce_loss, logits, target, **options)
        assert torch.isfinite(expected[0])
        found = loss_and_gradient(tk.tversky_ce_loss, logits, target, **{**options, name: as_tensor(options[name])})
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_tensor_gamma_below_1_of_a_class_that_is_nearly_right():
    """Whose slope where g = 1 no float holds, and meets no g."""
    logits, target = volumes()
    target[:] = 0
    options = {"alpha": 1e-280, "beta": 0.5, "smooth_nr": 0.0, "smooth_dr": 0.0, "reduction": "sum"}
    expected = loss_and_gradient(tk.tversky_loss, logits, target, gamma=0.5, **options)
    for gamma in (torch.tensor(0.5), torch.tensor(0.5, requires_grad=True)):
        found = loss_and_gradient(tk.tversky_loss, logits, target, gamma=gamma, **options)
        assert torch.isfinite(found[1]).all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
