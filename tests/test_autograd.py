"""What autograd, torch.compile and the dispatcher see."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from common import inputs, loss_and_gradient

import tversky_kernels as tk
from tversky_kernels._ops import ops

OPTIONS = [
    {},
    {"gamma": 0.75, "batch": True, "reduction": "none"},
    {"alpha": [0.1, 0.5, 0.9], "class_weight": [1, 2, 0], "ignore_index": 1, "reduction": "none"},
    {"activation": "sigmoid", "include_background": False, "absent": "skip", "reduction": "sum"},
    {"activation": "none", "gamma": 2.0},
]


def cpu(logits, target, **options):
    return tk.tversky_loss(logits, target, backend="cpu", **options)


def leaf(*arguments, **options):
    logits, target = inputs(*arguments, **options)
    return logits.requires_grad_(), target


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_gradcheck_and_gradgradcheck(options, classes):
    options = dict(options)
    for name in ("alpha", "class_weight"):
        if name in options:
            options[name] = [0.1 * (c + 1) for c in range(classes)]
    logits, target = leaf(2, classes, (3,), torch.float64)
    assert torch.autograd.gradcheck(lambda z: cpu(z, target, **options), logits)
    assert torch.autograd.gradgradcheck(lambda z: cpu(z, target, **options), logits)


def test_gradgradcheck_with_voxel_weight():
    logits, target = leaf(1, 3, (2, 3), torch.float64)
    weight = torch.rand(1, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda z: cpu(z, target, voxel_weight=weight), logits)


def test_second_derivative_where_the_upstream_gradient_depends_on_the_logits():
    logits, target = leaf(2, 3, (3,), torch.float64)
    assert torch.autograd.gradgradcheck(lambda z: cpu(z, target).square(), logits)
    assert torch.autograd.gradgradcheck(lambda z: (cpu(z, target, reduction="none") * z.mean()).exp(), logits)


def test_create_graph_gives_the_kernels_gradient():
    logits, target = leaf(1, 3, (9, 9))
    plain, differentiable = (
        torch.autograd.grad(cpu(logits, target), logits, create_graph=create)[0] for create in (False, True)
    )
    assert torch.equal(plain, differentiable)
    assert differentiable.requires_grad
    (second,) = torch.autograd.grad(differentiable.square().sum(), logits)
    assert torch.isfinite(second).all()
    assert second.abs().max() > 0


def test_third_derivative():
    logits, target = leaf(1, 2, (3,), torch.float64)
    expected = logits.detach().clone().requires_grad_()
    for z, backend in ((logits, "cpu"), (expected, "reference")):
        x = tk.tversky_loss(z, target, backend=backend)
        for _ in range(3):
            (x,) = torch.autograd.grad(x.sum(), z, create_graph=True)
        z.third = x
    torch.testing.assert_close(logits.third, expected.third)


def test_upstream_gradient_scales():
    logits, target = leaf(2, 3, (50,))
    (one,) = torch.autograd.grad(cpu(logits, target), logits)
    (many,) = torch.autograd.grad(cpu(logits, target) * -1024, logits)
    assert torch.equal(many, -1024 * one)


def test_no_gradient_asked_no_gradient_made():
    logits, target = inputs(1, 3, (20,))
    assert not cpu(logits, target).requires_grad
    with torch.no_grad():
        assert not cpu(logits.requires_grad_(), target).requires_grad


def test_retain_graph():
    logits, target = leaf(1, 3, (20,))
    loss = cpu(logits, target)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)


@pytest.mark.parametrize("classes", [1, 2, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_inplace_backward(classes, dtype, channels_last):
    logits, target = inputs(2, classes, (11, 12, 13), dtype)
    options = {"activation": "sigmoid"} if classes == 1 else {"ignore_index": 0}
    _, expected = loss_and_gradient(cpu, logits, target, **options)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last_3d)
    logits = logits * torch.ones((), dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(cpu(logits, target, inplace_backward=True, **options), logits)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(gradient, expected)
    assert not gradient.requires_grad


def test_overwritten_logits_raise_when_used_again():
    weight = torch.ones(1, 3, 20, requires_grad=True)
    logits = weight * torch.randn(1, 3, 20)
    _, target = inputs(1, 3, (20,))
    loss = cpu(logits, target, inplace_backward=True)
    other = logits.square().sum()  # keeps the logits for its own gradient
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_inplace_through_a_network_gives_the_same_parameters_gradients():
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 4, 3, padding=1)
    image, (_, target) = torch.randn(1, 1, 12, 12, 12), inputs(1, 4, (12, 12, 12))
    gradients = []
    for inplace in (False, True):
        network.zero_grad()
        cpu(network(image), target, inplace_backward=inplace).backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["expanded", "sliced"])
def test_inplace_falls_back_where_memory_is_shared(layout):
    base = torch.randn(1, 3, 8, 9)
    logits = base.expand(4, -1, -1, -1) if layout == "expanded" else torch.randn(4, 6, 8, 9)[:, ::2]
    target = torch.randint(0, 3, (4, 8, 9))
    _, expected = loss_and_gradient(cpu, logits.contiguous(), target)
    before = logits.clone()
    leaf = base.requires_grad_() if layout == "expanded" else torch.ones((), requires_grad=True)
    logits = (base * 1).expand(4, -1, -1, -1) if layout == "expanded" else (logits * leaf)
    if layout == "sliced":
        logits = torch.cat((logits, logits), 1)[:, ::2]
        _, expected = loss_and_gradient(cpu, logits.detach().contiguous(), target)
        before = logits.detach().clone()
    (gradient,) = torch.autograd.grad(cpu(logits, target, inplace_backward=True), logits)
    assert torch.equal(gradient, expected)
    assert torch.equal(logits, before)


def test_inplace_keeps_the_logits_for_second_derivatives():
    logits, target = leaf(1, 3, (20,), torch.float64)
    logits = logits * 1
    before = logits.detach().clone()
    (gradient,) = torch.autograd.grad(cpu(logits, target, inplace_backward=True), logits, create_graph=True)
    assert torch.equal(logits, before)
    torch.autograd.grad(gradient.sum(), logits)


@pytest.mark.parametrize("options", OPTIONS)
def test_compile_gives_the_same_numbers(options):
    torch._dynamo.reset()
    logits, target = leaf(2, 3, (6, 7))

    def function(z, t):
        return cpu(z, t, **options).sum()

    expected = loss_and_gradient(function, logits, target)
    loss, gradient = loss_and_gradient(torch.compile(function, fullgraph=True), logits, target)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert torch.equal(gradient, expected[1])


def test_compile_with_auto_inplace_and_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z, t: tk.tversky_loss(z, t, inplace_backward=True, backend="auto"), fullgraph=True, dynamic=True
    )
    for spatial in ((5, 6), (9, 4), (12, 13)):
        logits, target = inputs(2, 3, spatial)
        before = logits.clone()
        expected = loss_and_gradient(cpu, logits, target)
        loss, gradient = loss_and_gradient(compiled, logits, target)
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])
        assert torch.equal(logits, before)


def test_compiled_module_in_a_network():
    torch._dynamo.reset()
    torch.manual_seed(0)
    network, criterion = torch.nn.Conv3d(1, 3, 3, padding=1), tk.TverskyLoss(class_weight=torch.tensor([1.0, 2.0, 3.0]))
    image, (_, target) = torch.randn(1, 1, 8, 8, 8), inputs(1, 3, (8, 8, 8))
    criterion(network(image), target).backward()
    expected = network.weight.grad.clone()
    network.zero_grad()
    torch.compile(lambda x, t: criterion(network(x), t), fullgraph=True)(image, target).backward()
    torch.testing.assert_close(network.weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_functional_gradient():
    logits, target = inputs(1, 3, (20,))
    gradient = torch.func.grad(lambda z: cpu(z, target))(logits)
    assert torch.equal(gradient, loss_and_gradient(cpu, logits, target)[1])


def test_vmap_over_samples():
    """The reference computes it; labels are not checked, for vmap reads no values, and bad ones give NaN."""
    logits, target = inputs(4, 3, (20,))
    found = torch.func.vmap(lambda z, t: cpu(z[None], t[None]))(logits, target)
    torch.testing.assert_close(found.mean(), cpu(logits, target))
    gradient = torch.func.vmap(torch.func.grad(lambda z, t: cpu(z[None], t[None])))(logits, target)
    torch.testing.assert_close(gradient / 4, loss_and_gradient(cpu, logits, target)[1])
    target[2, 5] = 3
    found = torch.func.vmap(lambda z, t: cpu(z[None], t[None]))(logits, target)
    assert torch.isnan(found).tolist() == [False, False, True, False]


def test_activation_checkpointing():
    weight = torch.randn(1, 3, 20, requires_grad=True)
    _, target = inputs(1, 3, (20,))
    cpu(weight * 2, target).backward()
    expected, weight.grad = weight.grad, None
    torch.utils.checkpoint.checkpoint(lambda w: cpu(w * 2, target), weight, use_reentrant=False).backward()
    assert torch.equal(weight.grad, expected)


def test_autocast():
    network, image = torch.nn.Conv2d(1, 3, 1), torch.randn(1, 1, 8, 8)
    _, target = inputs(1, 3, (8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(image)
        loss = cpu(logits, target)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(network.weight.grad).all()


#: voxel_weight, activation, ignore_index, overlap, cross_entropy, focal_gamma, nearest_exact
PLAIN = (None, 0, None, 0, 0, 0.0, False)
#: tversky_weight, ce_weight, label_smoothing, ce_mean
CE_TABLE = (1.0, 0.5, 0.1, 0)
TABLE = (None, 0.3, 0.7, 1.0, 1e-5, 1e-5, True, False, 0, 2, *CE_TABLE)


def op_arguments(name, cross_entropy):
    logits, target = inputs(2, 3, (4, 5))
    how = (torch.rand(2, 4, 5), 0, 1, 0, cross_entropy, 2.0 if cross_entropy else 0.0, False)
    loss, coefficients = ops.tversky_loss(logits, target, *how, 2, *TABLE)
    return {
        "count_pass": (logits, target, *how, 2),
        "table": (torch.rand(2, 3, 6 if cross_entropy else 3, dtype=torch.float64), *TABLE),
        "tversky_loss": (logits, target, *how, 2, *TABLE),
        "gradient_pass": (torch.ones_like(loss), coefficients, logits, target, *how),
        "gradient_pass_": (logits, torch.ones_like(loss), coefficients, target, *how),
    }[name]


@pytest.mark.parametrize("cross_entropy", [0, 1, 2])
@pytest.mark.parametrize("name", ["count_pass", "table", "tversky_loss", "gradient_pass", "gradient_pass_"])
def test_opcheck(name, cross_entropy):
    torch.library.opcheck(getattr(ops, name).default, op_arguments(name, cross_entropy))


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize(("batch", "background"), [(False, True), (True, False), (True, True), (False, False)])
def test_opcheck_of_every_shape_of_loss(reduction, batch, background):
    logits, target = inputs(2, 3, (4, 5))
    table = (
        torch.rand(4, 3, dtype=torch.float64),
        0.3,
        0.7,
        0.75,
        1e-5,
        1e-5,
        background,
        batch,
        2,
        reduction,
        *CE_TABLE,
    )
    torch.library.opcheck(ops.tversky_loss.default, (logits, target, *PLAIN, 2, *table))


def test_operators_check_their_arguments():
    logits, target = inputs(2, 3, (4, 5))
    loss, coefficients = ops.tversky_loss(logits, target, *PLAIN, 2, *TABLE)
    for arguments, message in (
        ((logits.int(), target, *PLAIN, 2), "logits: expected"),
        ((logits, target.float(), *PLAIN, 2), "target: expected class indices"),
        ((logits, target[:1], *PLAIN, 2), "target: expected size 2 in dimension 0, got 1"),
        ((logits, target[..., :0], *PLAIN, 2), "target: expected size 5 in dimension 2, got 0"),
        ((logits, logits[:, :2], *PLAIN, 2), "target: expected size 3 in dimension 1, got 2"),
        ((logits, logits.cfloat(), *PLAIN, 2), "target: expected class indices"),
        ((logits, target[0], *PLAIN, 2), "target: expected 3 dimensions, got 2"),
        ((logits, target, target, *PLAIN[1:], 2), "voxel_weight: expected"),
        ((logits, target, None, 7, *PLAIN[2:], 2), "activation: expected"),
        ((logits, target, None, 0, None, 3, 0, 0.0, False, 2), "overlap: expected"),
        ((logits, target, None, 0, None, 0, 3, 0.0, False, 2), "cross_entropy: expected"),
        ((logits, target, None, 2, None, 0, 1, 0.0, False, 2), "cross_entropy: expected"),
        ((logits, target, None, 0, None, 0, 1, -1.0, False, 2), "focal_gamma: expected"),
        ((logits[:, :0], target, *PLAIN, 2), "at least one class"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.count_pass(*arguments)
    with pytest.raises(RuntimeError, match="coefficients: expected"):
        ops.gradient_pass(loss, coefficients[:, :2], logits, target, *PLAIN)
    with pytest.raises(RuntimeError, match="grad_loss: its shape"):
        ops.gradient_pass(torch.ones(2, 9), coefficients, logits, target, *PLAIN)
    with pytest.raises(RuntimeError, match="counts: expected"):
        ops.table(torch.rand(2, 3, 3), *TABLE)
    with pytest.raises(RuntimeError, match="class_parameters: expected"):
        ops.table(torch.rand(2, 3, 3).double(), torch.rand(3, 2).double(), *TABLE[1:])


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "activation": "sigmoid"}])
@pytest.mark.parametrize("dense", [False, True])
def test_export(options, dense):
    """torch.export traces the loss as its operators."""
    logits, target = inputs(2, 3, (4, 5))
    target = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float() if dense else target
    criterion = tk.TverskyCELoss(backend="cpu", **options)
    program = torch.export.export(criterion, (logits, target))
    assert any("tversky_kernels.tversky_loss" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(logits, target), criterion(logits, target))
    counts = torch.export.export(CountsModule(), (logits, target)).module()(logits, target)
    torch.testing.assert_close(counts, torch.stack(tk.overlap_counts(logits, target)))


class CountsModule(torch.nn.Module):
    def forward(self, logits, target):
        return torch.stack(tk.overlap_counts(logits, target, backend="cpu"))


def test_what_cannot_be_walked_is_copied_once():
    """Logits without one stride from voxel to voxel: one copy for both passes, and the gradient of the original."""
    wide = torch.randn(2, 3, 8, 12)
    _, target = inputs(2, 3, (8, 6))
    expected = loss_and_gradient(cpu, wide[..., ::2].contiguous(), target)
    copies = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if function in (torch.ops.aten.clone.default, torch.ops.aten.contiguous.default):
                copies.append(result.shape)
            return result

    logits = wide.clone()[..., :6].copy_(wide[..., ::2]).requires_grad_()
    with Watch():
        loss = cpu(logits, target)
        (gradient,) = torch.autograd.grad(loss, logits)
    assert copies == [logits.shape]
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(gradient, expected[1])


def test_unasked_a_gradients_storage_can_be_resized():
    """As FSDP and others free storages."""
    script = """
import torch, tversky_kernels as tk
logits = torch.randn(1, 4, 48, 224, 224, requires_grad=True)
tk.tversky_loss(logits, torch.zeros(1, 48, 224, 224, dtype=torch.uint8)).backward()
assert logits.grad.nbytes > 32 << 20
assert torch.ops.tversky_kernels.cpu_gradient_memory(None) == (False, 0, 0)
storage = logits.grad.untyped_storage()
assert storage.resizable()
storage.resize_(0)
storage.resize_(logits.nbytes)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TVERSKY_KERNELS_KEEP_GRADIENT"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
