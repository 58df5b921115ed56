"""The autograd Functions: what is kept between the passes, and how the gradient is differentiated again."""

from __future__ import annotations

import torch

from . import reference
from ._arguments import Options, Volumes
from ._ops import ABSENT, ACTIVATIONS, OPERATORS, REDUCTIONS
from .distributed import sum_over_group


def _table_arguments(options: Options, class_parameters):
    return (
        class_parameters,
        options.alpha,
        options.beta,
        options.gamma,
        options.smooth_nr,
        options.smooth_dr,
        options.include_background,
        options.batch,
        ABSENT[options.absent],
        REDUCTIONS[options.reduction],
    )


class TverskyGradient(torch.autograd.Function):
    """The gradient pass, itself differentiable: its derivative is the reference's."""

    @staticmethod
    def forward(
        grad_loss, logits, target, voxel_weight, coefficients, class_parameters, options, process_group, backend
    ):
        """dL/dlogits for the upstream gradient of the loss."""
        activation = ACTIVATIONS[options.activation]
        return OPERATORS[backend].gradient_pass(
            grad_loss, logits, target, voxel_weight, coefficients, activation, options.ignore_index
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the inputs: the second derivative starts from them."""
        grad_loss, logits, target, voxel_weight, _, class_parameters, options, process_group, _ = inputs
        ctx.save_for_backward(grad_loss, logits, target, voxel_weight, class_parameters)
        ctx.options, ctx.process_group = options, process_group

    @staticmethod
    def backward(ctx, grad_gradient):
        """Differentiates the reference's gradient."""
        if ctx.process_group is not None:
            raise NotImplementedError("process_group: second derivatives over several ranks are not implemented")
        grad_loss, logits, target, voxel_weight, class_parameters = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            z = logits if logits.requires_grad else logits.detach().requires_grad_()
            upstream = grad_loss if grad_loss.requires_grad else grad_loss.detach().requires_grad_()
            loss = reference.checked_loss(
                z, Volumes(target, voxel_weight, False), ctx.options, class_parameters, check_target=False
            )
            (gradient,) = torch.autograd.grad(loss, z, upstream, create_graph=True)
            to_loss, to_logits = torch.autograd.grad(
                gradient, (upstream, z), grad_gradient, create_graph=again, allow_unused=True
            )
        return to_loss, to_logits, *(None,) * 7


class TverskyLoss(torch.autograd.Function):
    """Count pass and table forward, gradient pass backward. Keeps the inputs and a (N, C, 2) table between them."""

    @staticmethod
    def forward(
        logits,
        target,
        voxel_weight,
        class_parameters,
        options,
        raise_bad_input,
        inplace_backward,
        process_group,
        backend,
    ):
        """The loss, and the coefficients that the gradient pass needs."""
        volume = (
            logits,
            target,
            voxel_weight,
            ACTIVATIONS[options.activation],
            options.ignore_index,
            raise_bad_input,
        )
        table = _table_arguments(options, class_parameters)
        ops = OPERATORS[backend]
        if process_group is None:
            return ops.tversky_loss(*volume, *table)
        counts = ops.count_pass(*volume)
        if options.batch:
            counts = counts.sum(0, keepdim=True)
        loss, coefficients = ops.table(sum_over_group(counts, process_group), *table)
        return loss.to(torch.float64 if logits.dtype == torch.float64 else torch.float32), coefficients

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the inputs and the coefficients."""
        logits, target, voxel_weight, class_parameters, options, _, inplace_backward, process_group, backend = inputs
        _, coefficients = output
        ctx.mark_non_differentiable(coefficients)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, voxel_weight, coefficients, class_parameters)
        ctx.options, ctx.inplace_backward, ctx.process_group = options, inplace_backward, process_group
        ctx.backend = backend

    @staticmethod
    def backward(ctx, grad_loss, _):
        """The gradient pass: into a fresh tensor or, where asked and possible, over the logits."""
        if grad_loss is None or not ctx.needs_input_grad[0]:
            return (None,) * 9
        logits, target, voxel_weight, coefficients, class_parameters = ctx.saved_tensors
        options, ops = ctx.options, OPERATORS[ctx.backend]
        activation = ACTIVATIONS[options.activation]
        compiling = torch.compiler.is_compiling()
        differentiable = torch.is_grad_enabled() and not compiling
        if differentiable:
            gradient = TverskyGradient.apply(
                grad_loss,
                logits,
                target,
                voxel_weight,
                coefficients,
                class_parameters,
                options,
                ctx.process_group,
                ctx.backend,
            )
        elif ctx.inplace_backward and not compiling and _may_be_overwritten(logits):
            gradient = logits.detach()
            ops.gradient_pass_(
                gradient, grad_loss, target, voxel_weight, coefficients, activation, options.ignore_index
            )
            # The dispatcher does not do this for us; it makes any later use of the overwritten logits raise.
            torch.autograd.graph.increment_version(logits)
        else:
            gradient = ops.gradient_pass(
                grad_loss, logits, target, voxel_weight, coefficients, activation, options.ignore_index
            )
        return gradient, *(None,) * 8


def _may_be_overwritten(logits: torch.Tensor) -> bool:
    # No two elements may share memory, which the dense layouts guarantee.
    return (
        logits.is_contiguous()
        or (logits.dim() == 5 and logits.is_contiguous(memory_format=torch.channels_last_3d))
        or (logits.dim() == 4 and logits.is_contiguous(memory_format=torch.channels_last))
    )
