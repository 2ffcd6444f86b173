"""The gradients of an op, found by name from its schema and its backward's.

A backward's arguments are called as the forward's arguments and results that they are; ``grad_<result>`` is
a cotangent, ``grad_<argument>`` among the backward's results a gradient, and ``output_mask`` says which of
those are wanted, in their order. A gradient that the mask leaves out is an empty tensor, since a schema
can't return an optional one.

What must be seen through (second derivatives, cotangents that are mapped or have tangents) is autograd's own
work, through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import settings
from .transforms import gradients_by_autograd, under_transform

if TYPE_CHECKING:
    from .op import Op

ByName = dict[str, Any]


def results_of(output: Any) -> tuple[Any, ...]:
    """Results of an op as a tuple, where it has one, too."""
    return output if isinstance(output, tuple) else (output,)


@dataclass(frozen=True)
class Gradients:
    """How the gradients of a forward are made.

    Args:
        op: the backward.
        by: in place of `op`: a function of the call, of the cotangents by result, and of which gradients of
            `of` are wanted; returns those of `of`, in order.
        of: the arguments that `by` differentiates.
        shared: gradients that serve arguments of another name: ``{"bias_ih": "bias"}``.
        passed: arguments whose gradient is a result's cotangent as it is: ``{"residual": "out"}``.
        copied: results that are kept as copies, since the caller may write into them.
        saved_if: a bool argument without which the forward leaves out what the backward needs; the backward
            then runs it again with it.
        constant: results of a call, by name, that have no gradient although the backward takes one.
    """

    op: Op | None = None
    by: Callable[[Any, Mapping[str, Tensor | None], Sequence[bool]], Sequence[Tensor | None]] | None = None
    of: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    passed: Mapping[str, str] = field(default_factory=dict)
    copied: tuple[str, ...] = ()
    saved_if: str | None = None
    constant: Callable[[Any], tuple[str, ...]] = lambda _call: ()


class Autograd:
    """What ``torch.library.register_autograd`` asks of a forward: what to save, and the backward."""

    def __init__(self, forward: Op, gradients: Gradients) -> None:
        self.forward, self.gradients = forward, gradients
        backward = gradients.op
        if backward is None:
            self.kept: tuple[str, ...] = ()
            self.differentiable = forward.results
            self.made = gradients.of
        else:
            self.kept = tuple(r for r in forward.results if r in backward.arguments)
            self.differentiable = tuple(r for r in forward.results if f"grad_{r}" in backward.arguments)
            self.made = tuple(r.removeprefix("grad_") for r in backward.results)
        shared = gradients.shared
        # The gradient for each argument that has one, by name.
        self.gradient_of = {a: shared.get(a, a) for a in forward.arguments if shared.get(a, a) in self.made}

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what the backward needs."""
        forward, g = self.forward, self.gradients
        call = forward.Call(*inputs)
        found = dict(zip(forward.results, results_of(output), strict=True))
        kept = {r: found[r].detach().clone() if r in g.copied else found[r] for r in self.kept}
        ctx.save_for_backward(*(getattr(call, name) for name in forward.tensors), *kept.values())
        ctx.call = call._replace(**dict.fromkeys(forward.tensors))
        constant = g.constant(call)
        ctx.differentiable = tuple(r for r in self.differentiable if r not in constant)
        ctx.mark_non_differentiable(*(t for r, t in found.items() if r not in ctx.differentiable))
        ctx.set_materialize_grads(False)
        ctx.backend = settings.backend()

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return a gradient, or None, for each argument."""
        forward = self.forward
        given = dict(zip(forward.results, grads, strict=True))
        cotangents = {r: g if r in ctx.differentiable else None for r, g in given.items()}
        if all(grad is None for grad in cotangents.values()):
            return (None,) * len(forward.arguments)
        saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
        call = ctx.call._replace(**dict(zip(forward.tensors, saved, strict=False)))
        needs = dict(zip(forward.arguments, ctx.needs_input_grad, strict=True))
        if torch.is_grad_enabled() or under_transform(*cotangents.values()):
            found = self._through_reference(call, cotangents, needs)
        else:
            kept = dict(zip(self.kept, saved[len(forward.tensors) :], strict=True))
            with settings.use_backend(ctx.backend):
                found = self._by_backward(call, kept, cotangents, needs)
        found |= {argument: cotangents[result] for argument, result in self.gradients.passed.items()}
        return tuple(found.get(a) if needs[a] else None for a in forward.arguments)

    def _through_reference(self, call: Any, cotangents: ByName, needs: Mapping[str, bool]) -> ByName:
        names = tuple(self.gradient_of)

        def forward(*tensors: Any) -> tuple[Tensor, ...]:
            differentiated = call._replace(**dict(zip(names, tensors, strict=True)))
            return results_of(self.forward.reference(*differentiated))

        tensors, wanted = [getattr(call, n) for n in names], [needs[n] for n in names]
        found = gradients_by_autograd(forward, tensors, tuple(cotangents.values()), wanted)
        return dict(zip(names, found, strict=True))

    def _by_backward(self, call: Any, kept: ByName, cotangents: ByName, needs: Mapping[str, bool]) -> ByName:
        g = self.gradients
        mask = [any(needs[a] for a, of in self.gradient_of.items() if of == name) for name in self.made]
        if g.op is None:
            assert g.by is not None
            return dict(zip(self.made, g.by(call, cotangents, mask), strict=True))
        if g.saved_if is not None and not getattr(call, g.saved_if):
            call = call._replace(**{g.saved_if: True})
            kept = dict(zip(self.forward.results, results_of(self.forward.overload(*call)), strict=True))
        known = {**call._asdict(), **kept, **{f"grad_{r}": c for r, c in cotangents.items()}}
        known["output_mask"] = mask
        results = results_of(g.op.overload(*(known[a] for a in g.op.arguments)))
        by_name = dict(zip(self.made, results, strict=True))
        return {argument: by_name[name] for argument, name in self.gradient_of.items()}
