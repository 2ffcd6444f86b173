"""Declares an op once: reference, fake kernel, backends and gradients.

    lstm_cell_backward = Op(reference.lstm_cell_backward, ("grad_input", ...), ...)
    lstm_cell_forward = Op(reference.lstm_cell_forward, ("h", "c", "gates"),
                           gradients=Gradients(lstm_cell_backward), ...)

The reference's signature is the op's: its name, its arguments and their types make the schema of
``torch.ops.fusednn.<name>``, and the named tuple, the *call*, that fakes, predicates, plans and gradients
read. docs/design/004-ops.md argues it.
"""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import native, settings
from .backends import Backend, implementation
from .dispatch import Implementation, Operation
from .gradients import Autograd, Gradients
from .transforms import may_need_backward, needs_torchs_ops

OPS: dict[str, Op] = {}
"""Every op by its name."""

_library = torch.library.Library("fusednn", "FRAGMENT")


# Types as the schema writes them. An int may be a symbol, where torch traces with dynamic shapes.
_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "Sequence[int]": "int[]",
    "Sequence[bool]": "bool[]",
    "int": "SymInt",
    "float": "float",
    "bool": "bool",
    "str": "str",
}


def schema_of(reference: Callable[..., Any], results: Sequence[str]) -> str:
    """Return the schema of a function of annotated arguments; keyword-only ones are no part of it."""
    parameters = inspect.signature(reference).parameters.values()
    arguments = [f"{_TYPES[p.annotation]} {p.name}" for p in parameters if p.kind is not p.KEYWORD_ONLY]
    returned = ", ".join(f"Tensor {name}" for name in results)
    return f"{reference.__name__}({', '.join(arguments)}) -> ({returned})"


def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    made: Any = collections.namedtuple(name, fields)  # type: ignore[misc]
    return made


class Op:
    """An op of ``torch.ops.fusednn``, and its table of backends.

    Args:
        reference: plain PyTorch; its module is in the folder of the family.
        results: their names.
        fake: makes tensors like the results, from a call.
        backends: in the order in which ``auto`` tries them; the reference comes last by itself.
        like: the argument that decides on device and dtype; the first tensor that must be there by default.
        gradients: of a forward.
        flops: of a call that has shapes in place of tensors, for ``torch.utils.flop_counter``.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        results: Sequence[str],
        *,
        fake: Callable[[Any], Any],
        backends: Sequence[Backend] = (),
        like: str | None = None,
        gradients: Gradients | None = None,
        flops: Callable[[Any], int] | None = None,
    ) -> None:
        self.name, self.reference, self.results = reference.__name__, reference, tuple(results)
        self.family = reference.__module__.split(".")[-2]
        schema = schema_of(reference, results)
        parsed = torch._C.parse_schema(f"fusednn::{schema}")
        kinds = {a.name: str(a.type) for a in parsed.arguments}
        self.arguments = tuple(kinds)
        self.Call = _named_tuple(self.name, self.arguments)
        self.tensors = tuple(a for a, kind in kinds.items() if kind in ("Tensor", "Optional[Tensor]"))
        self.like = like or next(a for a, kind in kinds.items() if kind == "Tensor")
        rows = [implementation(backend, self.name, self.family, self.like) for backend in backends]
        last = Implementation("reference", lambda call: self.reference(*call))
        self.table = Operation(self.name, (*rows, last))
        self._torchs = next((b for b in backends if b.name == "torch"), None)
        native.compare(self.name, self.arguments)
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.overload = getattr(torch.ops.fusednn, self.name).default
        self._register(fake, gradients, flops)
        OPS[self.name] = self

    def __call__(self, *args: Any, wanted: Sequence[str] = ()) -> Any:
        """Call the op; or torch's, where the table says so; or the reference, where only torch's ops will do.

        `wanted` names the results that the caller uses; none: all of them.
        """
        call = self.Call(*args)
        floating = getattr(call, self.like).dtype.is_floating_point
        if not floating or needs_torchs_ops(*(getattr(call, name) for name in self.tensors)):
            return self.reference(*call)
        if self._torchs is not None and self._takes_torchs(self._torchs, call, wanted or self.results):
            return self.table(call)
        return self.overload(*call)

    def _takes_torchs(self, torchs: Backend, call: Any, wanted: Sequence[str]) -> bool:
        """Whether torch's op serves a call in place of this one: then its gradients are torch's, too.

        Not in a traced graph, which does not see which backend will be asked for where it runs. Where torch's
        op gives all results, a recorded call stays with ours, whose backward has a table of its own.
        """
        partial = bool(torchs.returns)
        return (
            set(wanted) <= set(torchs.returns or self.results)
            and not torch.compiler.is_compiling()
            and (partial or not may_need_backward(*(getattr(call, name) for name in self.tensors)))
            and settings.backend() in ("auto", "torch")
            and self.table.choose(call).backend == "torch"
        )

    def _register(
        self,
        fake: Callable[[Any], Any],
        gradients: Gradients | None,
        flops: Callable[[Any], int] | None,
    ) -> None:
        name = f"fusednn::{self.name}"
        _library.impl(self.name, lambda *args: self.table(self.Call(*args)), "CompositeExplicitAutograd")
        torch.library.register_fake(name, lambda *args: fake(self.Call(*args)), lib=_library)
        if gradients is not None:
            autograd = Autograd(self, gradients)
            torch.library.register_autograd(
                name, autograd.backward, setup_context=autograd.save, lib=_library
            )
        if flops is not None:
            packet = getattr(torch.ops.fusednn, self.name)
            register_flop_formula(packet)(lambda *args, **_: flops(self.Call(*args)))
