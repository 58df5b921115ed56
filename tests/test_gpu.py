"""What only a card can show. The kernels' results are tests/gpu_kernels, which `make gpu-check` runs there."""

from __future__ import annotations

import pytest
import torch
from common import inputs, loss_and_gradient

import tversky_kernels as tk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    reason = tk.available_backends()[request.param]
    assert reason is True, reason
    return request.param


@pytest.mark.parametrize("classes", [2, 4, 33])
def test_same_bits_a_hundred_times(backend, classes):
    logits, target = (x.cuda() for x in inputs(2, classes, (40, 50, 64), torch.bfloat16))
    first = loss_and_gradient(tk.tversky_loss, logits, target, backend=backend)
    for _ in range(100):
        loss, gradient = loss_and_gradient(tk.tversky_loss, logits, target, backend=backend)
        assert torch.equal(loss, first[0])
        assert torch.equal(gradient, first[1])


@pytest.mark.parametrize("classes", [2, 5, 33])
def test_more_than_2_to_the_31_elements(backend, classes):
    """Against counts that are summed slab by slab, and the gradient against that of the last slab."""
    slabs, per_slab = 8, 2**31 // classes // 8 // 1024 * 1024 + 1024
    torch.manual_seed(0)
    logits = torch.randn(1, classes, slabs * per_slab, dtype=torch.bfloat16, device="cuda")
    target = torch.randint(0, classes, (1, slabs * per_slab), dtype=torch.uint8, device="cuda")
    assert logits.numel() > 2**31
    counts = torch.zeros(3, classes, dtype=torch.float64, device="cuda")
    for k in range(slabs):
        part = slice(k * per_slab, (k + 1) * per_slab)
        p = logits[0, :, part].float().softmax(0).double()
        g = target[0, part] == torch.arange(classes, device="cuda")[:, None]
        counts += torch.stack(((p * g).sum(1), (p * ~g).sum(1), ((1 - p) * g).sum(1)))
        del p, g
    tp, fp, fn = counts
    expected = (1 - (tp + 1e-5) / (tp + 0.3 * fp + 0.7 * fn + 1e-5)).mean()
    logits *= torch.ones((), dtype=logits.dtype, device="cuda", requires_grad=True)
    loss = tk.tversky_loss(logits, target, backend=backend, inplace_backward=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss * 1e9, logits)
    sums = gradient[0, :, -per_slab:].float().sum(0)
    assert sums.abs().max().item() <= 0.05 * gradient[0, :, -per_slab:].float().abs().max().item()
    assert gradient[0, :, -1000:].abs().max() > 0


def test_on_another_stream(backend):
    logits, target = (x.cuda() for x in inputs(1, 3, (64, 64, 64)))
    expected = loss_and_gradient(tk.tversky_loss, logits, target, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = logits * 1.0  # there only after the sleep
        loss, gradient = loss_and_gradient(tk.tversky_loss, late, target, backend=backend)
    stream.synchronize()
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


#: None, lists and a tensor on the host, of which the device gets its own once.
OPTIONS = [{}, {"alpha": [0.3, 0.4], "beta": 0.7, "class_weight": torch.tensor([0.5, 1.0])}]


@pytest.mark.parametrize(("classes", "options"), [(2, OPTIONS[0]), (2, OPTIONS[1]), (4, {}), (33, {})])
def test_in_a_cuda_graph(backend, classes, options):
    logits, target = (x.cuda() for x in inputs(2, classes, (32, 32, 32)))
    z = logits.clone().requires_grad_()

    def step():
        loss = tk.tversky_loss(z, target, backend=backend, **options)
        return loss, *torch.autograd.grad(loss, z)

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    other, _ = inputs(2, classes, (32, 32, 32), seed=1)
    with torch.no_grad():
        z.copy_(other)
    graph.replay()
    expected = loss_and_gradient(tk.tversky_loss, other.cuda(), target, backend=backend, **options)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("options", OPTIONS)
def test_no_synchronisation(backend, options):
    logits, target = (x.cuda() for x in inputs(1, 2, (32, 32, 32)))
    loss_and_gradient(tk.tversky_loss, logits, target, backend=backend, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradient(tk.tversky_loss, logits, target, backend=backend, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_backward_holds_one_gradient(backend):
    logits, target = (x.cuda() for x in inputs(1, 4, (128, 128, 128), target_dtype=torch.uint8))
    for inplace, most in ((False, 1.02), (True, 0.02)):
        z = logits.clone().requires_grad_() if not inplace else logits * torch.ones((), device="cuda").requires_grad_()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = tk.tversky_loss(z, target, backend=backend, inplace_backward=inplace)
        torch.autograd.grad(loss, z)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before <= most * logits.numel() * 4


def test_a_head_holds_blocks_of_logits_and_does_not_synchronise(backend):
    _, target = inputs(1, 118, (128, 128, 128), target_dtype=torch.uint8)
    target, layer = target.cuda(), torch.nn.Conv3d(16, 118, 1).cuda()
    features = torch.randn(1, 16, 128, 128, 128, device="cuda", requires_grad=True)

    def step():
        features.grad, layer.weight.grad, layer.bias.grad = None, None, None
        tk.linear_tversky_loss(features, layer.weight, layer.bias, target, backend=backend).backward()

    step()
    torch.cuda.synchronize()
    features.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    logits_bytes = 118 * 128**3 * 4
    assert torch.cuda.max_memory_allocated() - before <= features.nbytes + logits_bytes // 8


def test_a_bad_label_gives_nan_and_check_target_raises(backend):
    logits, target = (x.cuda() for x in inputs(1, 4, (16, 16)))
    target[0, 3, 3] = 4
    assert torch.isnan(tk.tversky_loss(logits, target, backend=backend))
    with pytest.raises(ValueError, match="got 4"):
        tk.tversky_loss(logits, target, backend=backend, check_target=True)


def test_compiled(backend):
    logits, target = (x.cuda() for x in inputs(1, 4, (16, 16)))
    expected = loss_and_gradient(tk.tversky_loss, logits, target, backend=backend)
    compiled = torch.compile(lambda z, t: tk.tversky_loss(z, t, backend=backend), fullgraph=True)
    loss, gradient = loss_and_gradient(compiled, logits, target)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient, expected[1])
