"""inplace_backward: the right gradient or an error, whatever reads the memory that is overwritten."""

from __future__ import annotations

import pytest
import torch
from common import inputs

import tversky_kernels as tk

LOSSES = {
    "tversky_loss": lambda z, t, **o: tk.tversky_loss(z, t, **o),
    "tversky_ce_loss": lambda z, t, **o: tk.tversky_ce_loss(z, t, **o),
    "overlap_counts": lambda z, t, **o: tk.overlap_counts(z, t, **o).tp.square().sum(),
    "generalized_dice_loss": lambda z, t, **o: tk.generalized_dice_loss(z, t, **o),
    "deep_supervision_loss": lambda z, t, **o: tk.deep_supervision_loss([z], t, **o),
    "monai": lambda z, t, **o: tk.compat.monai.DiceCELoss(softmax=True, to_onehot_y=True, **o)(z, t[:, None]),
    "nnunet": lambda z, t, **o: tk.compat.nnunet.DC_and_CE_loss({}, {}, **o)(z, t[:, None]),
    "smp": lambda z, t, **o: tk.compat.smp.DiceLoss("multiclass", **o)(z, t),
    "smp, focal": lambda z, t, **o: tk.compat.smp.FocalLoss("multiclass", **o)(z, t),
    "kornia": lambda z, t, **o: tk.compat.kornia.dice_loss(z, t, "macro", **o),
    "nnunet, levels": lambda z, t, **o: tk.compat.nnunet.LevelsLoss({"ce_weight": 1.0, **o})(z, t[:, None]),
}
ACTIVATIONS = {"none": lambda x: x * 1, "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


def identity_hooks():
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def gradient_of(network, leaf, **run):
    leaf = leaf.detach().clone().requires_grad_()
    network(leaf, **run).backward()
    return leaf.grad


HOOKS = {
    "checkpoint": lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False),
    "save_on_cpu": lambda f, x: _under(torch.autograd.graph.save_on_cpu(), f, x),
    "identity hooks": lambda f, x: _under(identity_hooks(), f, x),
}


def _under(context, f, x):
    with context:
        return f(x)


@pytest.mark.parametrize("hook", list(HOOKS))
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("name", list(LOSSES))
def test_the_loss_under_hooks(name, activation, hook):
    leaf, target = inputs(2, 3, (5, 6))

    def network(x, inplace):
        return LOSSES[name](ACTIVATIONS[activation](x), target, inplace_backward=inplace)

    expected = gradient_of(network, leaf, inplace=False)
    found = gradient_of(lambda x: HOOKS[hook](lambda y: network(y, True), x), leaf)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("hook", list(HOOKS))
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_the_network_under_hooks(activation, hook):
    """The loss itself is outside: what made the logits saved them where autograd does not look at versions."""
    leaf, target = inputs(2, 3, (5, 6))
    function = ACTIVATIONS[activation]
    expected = gradient_of(lambda x: tk.tversky_loss(function(x), target), leaf)
    for shape in ((2, 3, 5, 6), (2, 3, 30)):  # and a view of what was saved
        found = gradient_of(
            lambda x, shape=shape: tk.tversky_loss(
                HOOKS[hook](function, x).view(shape), target.view(2, *shape[2:]), inplace_backward=True
            ),
            leaf,
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_reentrant_checkpoint(activation):
    """Without hooks autograd sees what has been overwritten, and says so."""
    leaf, target = inputs(2, 3, (5, 6))

    def network(x, inplace):
        return tk.tversky_loss(ACTIVATIONS[activation](x), target, inplace_backward=inplace)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(lambda y: network(y, True), x, use_reentrant=True)

    if activation == "none":
        assert torch.equal(gradient_of(checkpointed, leaf), gradient_of(network, leaf, inplace=False))
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient_of(checkpointed, leaf)


def test_the_backward_under_hooks():
    leaf, target = inputs(2, 3, (5, 6))
    expected = gradient_of(lambda x: tk.tversky_loss(x * 2, target), leaf)
    leaf.requires_grad_()
    logits = leaf * 2
    before = logits.detach().clone()
    loss = tk.tversky_loss(logits, target, inplace_backward=True)
    with identity_hooks():
        loss.backward()
    assert torch.equal(leaf.grad, expected)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("hooks", [False, True])
def test_a_retained_second_backward(hooks):
    leaf, target = inputs(2, 3, (5, 6))
    leaf.requires_grad_()
    with identity_hooks() if hooks else torch.enable_grad():
        loss = tk.tversky_loss(leaf * 2, target, inplace_backward=True)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    if hooks:
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], first)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_the_head_under_hooks():
    features, target = inputs(2, 4, (5, 6))
    target = target % 3
    weight, bias = torch.randn(3, 4), torch.randn(3)

    def network(x, inplace):
        return tk.linear_tversky_loss(torch.tanh(x), weight, bias, target, inplace_backward=inplace)

    expected = gradient_of(network, features, inplace=False)
    for hook in HOOKS.values():
        found = gradient_of(lambda x, hook=hook: hook(lambda y: network(y, True), x), features)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [*LOSSES, "linear_tversky_loss"])
@pytest.mark.parametrize("view", [False, True])
def test_a_leaf_is_an_error(name, view):
    logits, target = inputs(2, 3, (5, 6))
    leaf = logits.clone().requires_grad_()
    asked = leaf[:] if view else leaf
    loss = LOSSES.get(name, lambda z, t, **o: tk.linear_tversky_loss(z, torch.randn(3, 3), None, t, **o))
    with pytest.raises(ValueError, match=f"inplace_backward: .* are a {'view of a leaf' if view else 'leaf'}"):
        loss(asked, target, inplace_backward=True)
    assert torch.equal(leaf, logits)
    with torch.no_grad():  # nothing is overwritten
        loss(asked, target, inplace_backward=True)
    loss(logits, target, inplace_backward=True)


def test_parts_of_one_tensor():
    """Whose versions are one: autograd would call the others overwritten."""
    leaf, target = inputs(1, 3, (2, 6, 7))
    leaf, target = leaf.requires_grad_(), target[:, 0]

    def network(inplace):
        levels = torch.stack([leaf[:, :, 0], leaf[:, :, 1] * 2], 1).unbind(1)
        return tk.deep_supervision_loss(levels, target, inplace_backward=inplace)

    expected = torch.autograd.grad(network(False), leaf)
    assert torch.equal(torch.autograd.grad(network(True), leaf)[0], expected[0])


def test_a_target_in_the_same_memory():
    leaf = torch.rand(1, 3, 40).softmax(1).requires_grad_()
    for make in (
        lambda z: {"target": z.detach()},
        lambda z: {"target": z.detach() > 0.3, "voxel_weight": z.detach()[:, 0]},
    ):
        found = []
        for inplace in (False, True):
            z = leaf * 1
            loss = tk.tversky_loss(z, **make(z), activation="none", inplace_backward=inplace)
            found.append(torch.autograd.grad(loss, z)[0].clone())
        assert torch.equal(*found)


def test_in_place_it_is_where_nothing_forbids_it():
    """So that the tests above do not pass because nothing is ever overwritten."""
    leaf, target = inputs(2, 3, (5, 6))
    for name, loss in LOSSES.items():
        z = leaf.clone().requires_grad_() * 1
        (gradient,) = torch.autograd.grad(loss(z, target, inplace_backward=True), z)
        assert not torch.equal(z, leaf), name
        assert name == "deep_supervision_loss" or gradient.data_ptr() == z.data_ptr(), name


class Exponential(torch.autograd.Function):
    """Keeps its output, for its own gradient."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * y


@pytest.mark.parametrize("function", [torch.tanh, Exponential.apply])
def test_logits_whose_graph_has_been_freed(function):
    leaf, target = inputs(1, 3, (5, 6))
    logits = function(leaf.requires_grad_())
    expected = tk.tversky_loss(logits, target)
    expected.backward()
    assert torch.equal(tk.tversky_loss(logits, target, inplace_backward=True), expected)


def test_a_function_of_ones_own_under_hooks():
    leaf, target = inputs(1, 3, (5, 6))
    expected = gradient_of(lambda x: tk.tversky_loss(x.exp(), target), leaf)
    found = gradient_of(
        lambda x: tk.tversky_loss(_under(identity_hooks(), Exponential.apply, x), target, inplace_backward=True), leaf
    )
    assert torch.equal(found, expected)
