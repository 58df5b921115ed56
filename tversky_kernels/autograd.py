"""The autograd Functions: they keep the coefficients between the passes, and define second derivatives."""

from __future__ import annotations

import functools
from typing import Any

import torch

from . import reference
from ._arguments import Checked, CheckedRegions, Plan, Volumes
from ._layout import is_dense
from ._ops import LINEAR_OPERATORS, OPERATORS

#: The largest coefficient of kernels that compute in float32; see csrc/common/mathematics.h. The
#: operator `table` does not know them.
MOST_OF_FLOAT = 1e30


def apply(function: Any, *args):
    """`function.apply`, in the form of the Function that costs the least here."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return function.apply_eagerly(*[_unwrap_if_dead(x) if type(x) is _Tensor else x for x in args])


_Tensor = torch.Tensor
# Unwraps a tensor whose torch.func transform has ended, as Function.apply does.
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def _with_eager_form(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    # torch binds the arguments of a Function that has a setup_context to forward's signature at every call, which takes
    # longer than all the rest. Only its transforms (torch.func, vmap) and the compiler need that form. Function.apply
    # itself asks for both at every call; what it calls at last is its base's.
    def forward(ctx, *args):
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    eager = type(function.__name__, (torch.autograd.Function,), {**members, "__doc__": function.__doc__})
    function.apply_eagerly = super(torch.autograd.Function, eager).apply  # type: ignore[attr-defined, misc]
    return function


def _result_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _loss_of_counts(counts, plan: Plan, class_parameters, backend, dtype):
    # The loss and its coefficients.
    if plan.options.batch:
        counts = counts.sum(0, keepdim=True)
    loss, coefficients = OPERATORS[backend].table(counts, class_parameters, *plan.of_table)
    if dtype != torch.float64:
        coefficients = coefficients.clamp(-MOST_OF_FLOAT, MOST_OF_FLOAT)
    return loss.to(dtype), coefficients


def _coefficients_of_counts(upstream, regional: bool = False):
    # From the gradient of the counts (..., C, 3 or 6, one more with regions): dL/dp where g = 0 and where g = 1, with a
    # cross-entropy dL/dCE and dL/dsmoothing, and the upstream gradient left.
    tp, fp, fn, *of_cross_entropy = upstream.unbind(-1)
    of_cross_entropy = of_cross_entropy[: 0 if regional and len(of_cross_entropy) == 1 else 2]
    return upstream.new_ones(()), torch.stack((fp, tp - fn, *of_cross_entropy), -1)


@_with_eager_form
class GradientPass(torch.autograd.Function):
    """The gradient pass, itself differentiable: its derivative is the reference's.

    upstream is the gradient of the loss or, without coefficients, of the counts (N, C, 3 or 6), or of regions' counts.
    """

    @staticmethod
    def forward(
        upstream,
        logits,
        target,
        voxel_weight,
        regions,
        merged,
        coefficients,
        class_parameters,
        plan,
        num_regions,
        backend,
    ):
        """dL/dlogits in a fresh tensor."""
        if num_regions:
            _, coefficients = _coefficients_of_counts(upstream, True)
            volumes = (logits, target, voxel_weight, regions, merged)
            return OPERATORS[backend].region_gradient_pass(coefficients, *volumes, *plan.of_pass)
        if coefficients is None:
            upstream, coefficients = _coefficients_of_counts(upstream)
        return OPERATORS[backend].gradient_pass(upstream, coefficients, logits, target, voxel_weight, *plan.of_pass)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the inputs: the second derivative starts from them."""
        *tensors, coefficients, class_parameters, plan, num_regions, _ = inputs
        ctx.save_for_backward(*tensors, class_parameters)
        ctx.plan, ctx.of_counts, ctx.num_regions = plan, coefficients is None, num_regions

    @staticmethod
    def backward(ctx, grad_gradient):
        """Differentiates the reference's gradient."""
        upstream, logits, target, voxel_weight, ids, merged, class_parameters = ctx.saved_tensors
        volumes = Volumes(target, voxel_weight, target.dim() == logits.dim())
        regions = None if ids is None else CheckedRegions(ids, ctx.num_regions)
        annotated = None if merged is None else ~merged
        checked = Checked(volumes, ctx.plan, class_parameters, {}, regions, annotated)
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases: where upstream itself depends on the logits, that way is autograd's and not to be counted here.
            z, upstream = (x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in (logits, upstream))
            if ctx.of_counts:
                result = reference.checked_counts(z, checked, check_target=False)
                if ctx.num_regions and ids is None:  # one region, with the column for its voxels
                    result = torch.nn.functional.pad(result, (0, 1)).unsqueeze(1)
            else:
                result = reference.checked_loss(z, checked, check_target=False)
            (gradient,) = torch.autograd.grad(result, z, upstream, create_graph=True)
            to_upstream, to_logits = torch.autograd.grad(
                gradient, (upstream, z), grad_gradient, create_graph=again, allow_unused=True
            )
        return to_upstream, to_logits, *(None,) * 9


def _gradient(
    upstream, volume, coefficients, class_parameters, plan: Plan, inplace, backend, of_regions=(None, None, 0)
):
    # Into a fresh tensor or, where asked and possible, over the logits. of_regions: regions, merged and num_regions, 0
    # for an operator that knows none.
    regions, merged, num_regions = of_regions
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        of_table = (coefficients, class_parameters, plan, num_regions)
        return apply(GradientPass, upstream, *volume, regions, merged, *of_table, backend)
    ops = OPERATORS[backend]
    logits, *others = volume
    if num_regions:
        given: tuple = (_coefficients_of_counts(upstream, True)[1],)
        others = [*others, regions, merged]
        gradient_pass, gradient_pass_ = ops.region_gradient_pass, ops.region_gradient_pass_
    else:
        given = (upstream, coefficients) if coefficients is not None else _coefficients_of_counts(upstream)
        gradient_pass, gradient_pass_ = ops.gradient_pass, ops.gradient_pass_
    if inplace and may_overwrite_now(logits, *others):
        gradient = logits.detach()
        gradient_pass_(gradient, *given, *others, *plan.of_pass)
        # The dispatcher does not do this for us; it makes any later use of the overwritten logits raise.
        torch.autograd.graph.increment_version(logits)
        return gradient
    try:
        return gradient_pass(*given, logits, *others, *plan.of_pass)
    except RuntimeError:
        _raise_if_out_of_memory(logits)
        raise


def _raise_if_out_of_memory(like: torch.Tensor) -> None:
    # The stable ABI's errors have lost torch's class and words; an allocation of that size has them.
    if not torch.compiler.is_compiling():
        torch.empty_like(like)


def inplace_allowed(name: str, x: torch.Tensor, asked: bool) -> bool:
    """Whether the backward may overwrite x, as far as the forward knows; an error where x is a leaf or a view of one.

    Autograd does not look at versions of what was saved under hooks (activation checkpointing, `save_on_cpu`), so that
    nothing would tell whoever reads it that it has been overwritten.
    """
    if not isinstance(asked, bool):
        raise TypeError(f"inplace_backward: expected True or False, got {asked!r}")
    if not asked or torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
        return False
    base = x._base
    if x.is_leaf or (base is not None and base.is_leaf):
        what = "a leaf" if x.is_leaf else "a view of a leaf"
        raise ValueError(
            f"inplace_backward: the {name} are {what} that requires a gradient, and would be lost; expected what a "
            "network has computed, or inplace_backward=False"
        )
    # A view shares its version counter with the whole tensor: autograd would call all other views overwritten.
    if base is not None and base.numel() != x.numel():
        return False
    if hooks_are_active():
        return False
    nodes = (x.grad_fn,) if base is None else (x.grad_fn, base.grad_fn)
    return not any(_has_saved_under_hooks(node) for node in nodes if node is not None)


def hooks_are_active() -> bool:
    """Whether saved-tensor hooks are active in this thread."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


@functools.cache
def _saved_names(node: type) -> tuple[str, ...]:
    return tuple(name for name in dir(node) if name.startswith("_raw_saved_"))


def _has_saved_under_hooks(node) -> bool:
    # Whether the operation that made a tensor has saved tensors, that tensor perhaps, under hooks.
    for name in _saved_names(type(node)):  # type: ignore[arg-type] # a type is hashable
        try:
            saved = getattr(node, name)
        except RuntimeError:  # they have been freed, so that nothing reads them
            continue
        for x in saved if isinstance(saved, (list, tuple)) else (saved,):
            if getattr(x, "unpack_hook", None) is not None:
                return True
    return False


def may_overwrite_now(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the backward may write over x: no two elements share memory, and x is not a part of a larger tensor."""
    if torch.compiler.is_compiling() or hooks_are_active() or not is_dense(x):
        return False
    memory = x.untyped_storage()._cdata
    return all(other is None or other.untyped_storage()._cdata != memory for other in others)


@_with_eager_form
class TverskyLoss(torch.autograd.Function):
    """Count pass and table forward, gradient pass backward. Keeps the inputs and a (N, C, 2) table between them."""

    @staticmethod
    def forward(
        logits,
        target,
        voxel_weight,
        class_parameters,
        plan,
        check,
        inplace_backward,
        backend,
    ):
        """The loss, and the coefficients that the gradient pass needs."""
        volume = (logits, target, voxel_weight, *plan.of_pass, check)
        return OPERATORS[backend].tversky_loss(*volume, class_parameters, *plan.of_table)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the inputs and the coefficients."""
        logits, target, voxel_weight, class_parameters, plan, _, inplace_backward, backend = inputs
        _, coefficients = output
        ctx.mark_non_differentiable(coefficients)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, voxel_weight, coefficients, class_parameters)
        ctx.plan, ctx.inplace_backward, ctx.backend = plan, inplace_backward, backend

    @staticmethod
    def backward(ctx, grad_loss, _):
        """The gradient pass."""
        if grad_loss is None or not ctx.needs_input_grad[0]:
            return (None,) * 8
        *volume, coefficients, class_parameters = ctx.saved_tensors
        how = (ctx.plan, ctx.inplace_backward, ctx.backend)
        return _gradient(grad_loss, volume, coefficients, class_parameters, *how), *(None,) * 7


@_with_eager_form
class LinearTverskyLoss(torch.autograd.Function):
    """As `TverskyLoss`, of the logits weight @ features + bias, of which there is never more than a block.

    of_counts: the result is the counts (N, C, 3 or 6) in float64 in place of the loss.
    """

    @staticmethod
    def forward(
        features,
        weight,
        bias,
        target,
        voxel_weight,
        class_parameters,
        plan,
        check,
        inplace_backward,
        backend,
        of_counts,
        regions,
        num_regions,
    ):
        """The loss, and the coefficients that the gradient pass needs."""
        volume = (features, weight, bias, target, voxel_weight)
        if regions is not None:
            of_regions = (regions, num_regions, *plan.of_pass, check)
            return LINEAR_OPERATORS[backend].region_count_pass(*volume, *of_regions), None
        counts = LINEAR_OPERATORS[backend].count_pass(*volume, *plan.of_pass, check)
        if of_counts:
            return counts, None
        return _loss_of_counts(counts, plan, class_parameters, backend, _result_dtype(features))

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the inputs and the coefficients."""
        *tensors, plan, _, inplace_backward, backend, of_counts, regions, num_regions = inputs
        _, coefficients = output
        if not of_counts:
            ctx.mark_non_differentiable(coefficients)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, coefficients, regions)
        ctx.plan, ctx.inplace_backward, ctx.num_regions = plan, inplace_backward, num_regions
        ctx.backend, ctx.of_counts = backend, of_counts

    @staticmethod
    def backward(ctx, upstream, _):
        """The gradient pass; where it is to be differentiated again, the reference's gradient."""
        wanted = ctx.needs_input_grad[:3]
        if upstream is None or not any(wanted):
            return (None,) * 13
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_differentiable_gradients(ctx, upstream, wanted), *(None,) * 10
        # volume: weight, bias, target, voxel_weight
        features, *volume, _, coefficients, regions = ctx.saved_tensors
        ops = LINEAR_OPERATORS[ctx.backend]
        if regions is not None:
            given: tuple = (_coefficients_of_counts(upstream, True)[1],)
            volume = [*volume, regions]
            gradient_pass, gradient_pass_ = ops.region_gradient_pass, ops.region_gradient_pass_
        else:
            given = _coefficients_of_counts(upstream) if ctx.of_counts else (upstream, coefficients)
            gradient_pass, gradient_pass_ = ops.gradient_pass, ops.gradient_pass_
        arguments = (*volume, *ctx.plan.of_pass)
        if wanted[0] and ctx.inplace_backward and may_overwrite_now(features, *volume):
            of_features = features.detach()
            of_head = gradient_pass_(of_features, *given, *arguments)
            torch.autograd.graph.increment_version(features)  # as in _gradient
        else:
            try:
                of_features, *of_head = gradient_pass(*given, features, *arguments, wanted[0])
            except RuntimeError:
                _raise_if_out_of_memory(features)
                raise
        gradients = (x if is_wanted else None for x, is_wanted in zip((of_features, *of_head), wanted, strict=True))
        return *gradients, *(None,) * 10


def _differentiable_gradients(ctx, upstream, wanted):
    # The reference's, of features, weight and bias.
    *head, target, voxel_weight, class_parameters, _, ids = ctx.saved_tensors
    # Aliases: where one of them depends on another, that way is autograd's and not to be counted here.
    head = [x if x is None else x.view_as(x) for x in head]
    volumes = Volumes(target, voxel_weight, target.dim() == head[0].dim())
    logits = reference.linear_logits(*head)
    regions = None if ids is None else CheckedRegions(ids, ctx.num_regions)
    checked = Checked(volumes, ctx.plan, class_parameters, {}, regions)
    of = reference.checked_counts if ctx.of_counts else reference.checked_loss
    inputs = [x for x, is_wanted in zip(head, wanted, strict=True) if is_wanted]
    gradients = iter(torch.autograd.grad(of(logits, checked, check_target=False), inputs, upstream, create_graph=True))
    return [next(gradients) if is_wanted else None for is_wanted in wanted]


@_with_eager_form
class Counts(torch.autograd.Function):
    """Count pass forward, gradient pass backward."""

    @staticmethod
    def forward(logits, target, voxel_weight, regions, merged, num_regions, plan, check, inplace_backward, backend):
        """tp, fp and fn, and with a cross-entropy its sums: (N, C, 3 or 6) in float64; of regions (N, R, C, 4 or 7).

        num_regions: 0 where there are none. merged: (N, C), the classes that belong to class 0; with one region at
        least.
        """
        volume = (logits, target, voxel_weight)
        if num_regions:
            return OPERATORS[backend].region_count_pass(*volume, regions, merged, num_regions, *plan.of_pass, check)
        return OPERATORS[backend].count_pass(*volume, *plan.of_pass, check)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the inputs."""
        *tensors, num_regions, plan, _, inplace_backward, backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.plan, ctx.inplace_backward, ctx.backend, ctx.num_regions = plan, inplace_backward, backend, num_regions

    @staticmethod
    def backward(ctx, upstream):
        """The gradient pass, its coefficients from the upstream gradient of the counts."""
        if not ctx.needs_input_grad[0]:
            return (None,) * 10
        *volume, regions, merged = ctx.saved_tensors
        how = (ctx.plan, ctx.inplace_backward, ctx.backend, (regions, merged, ctx.num_regions))
        return _gradient(upstream, volume, None, None, *how), *(None,) * 9


@_with_eager_form
class MarginalLogits(torch.autograd.Function):
    """`reference.marginal_logits` with no more memory than its result, over which the gradient is written."""

    @staticmethod
    def forward(logits, annotated):
        """The merged logits, and of each voxel those of the background."""
        merged = reference.marginal_logits(logits.detach(), annotated)
        return merged, merged[:, :1].clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the inputs."""
        _, background = output
        ctx.mark_non_differentiable(background)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, background)

    @staticmethod
    def backward(ctx, upstream, _):
        """d merged[0] / d z_k = exp(z_k - merged[0]), for class 0 and all that belong to it."""
        if upstream is None or not ctx.needs_input_grad[0]:
            return None, None
        logits, annotated, background = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            background = reference.marginal_logits(logits, annotated)[:, :1]
        together = ~annotated
        together = torch.cat([together.any(1, keepdim=True), together[:, 1:]], 1)
        together = together.view(*annotated.shape, *(1,) * (logits.dim() - 2))
        share = (logits.to(upstream.dtype) - background).exp()
        gradient = torch.where(together, torch.where(upstream[:, :1] == 0, 0.0, upstream[:, :1] * share), upstream)
        return gradient.to(logits.dtype), None
