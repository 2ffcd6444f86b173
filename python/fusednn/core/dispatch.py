"""Which backend serves a call, and why the others do not.

An :class:`Operation` holds its implementations in the order in which ``auto`` tries them. Each has a
predicate that returns the reasons why it can't serve a call (none: it can), so that the same text explains a
fallback, an error, and :func:`explain`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from . import settings

logger = logging.getLogger("fusednn")

Reasons = list[str]


def no_reasons(*_args: Any) -> Reasons:
    """Nothing speaks against any call."""
    return []


def no_plan(*_args: Any) -> dict[str, Any]:
    """What a backend has to tell that plans nothing."""
    return {}


@dataclass(frozen=True)
class Implementation:
    """One backend's version of an operation.

    ``unsupported`` returns why it can't serve a call; ``unprofitable`` why ``auto`` should leave the call to
    another one, a matter of measurement that a backend asked for by name ignores. ``plan`` returns how it
    would go about a call that it serves, values by name, for :func:`explain`.
    """

    backend: str
    run: Callable[..., Any]
    unsupported: Callable[..., Reasons] = no_reasons
    unprofitable: Callable[..., Reasons] = no_reasons
    plan: Callable[..., dict[str, Any]] = no_plan


@dataclass(frozen=True)
class Explanation:
    """The backend that one call of an operation takes, its plan, and the reasons against each other one."""

    operation: str
    requested: str
    backend: str | None
    passed_over: dict[str, tuple[str, ...]]
    plan: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Lay the choice out as a line, one for the plan, and a line per backend that was passed over."""
        lines = [f"{self.operation}: {self.backend or 'no backend'} (asked for: {self.requested})"]
        if self.plan:
            lines.append("  plan: " + ", ".join(f"{name} {value}" for name, value in self.plan.items()))
        for name, reasons in self.passed_over.items():
            lines += [f"  not {name}: {reason}" for reason in reasons]
        return "\n".join(lines)


class Explanations(tuple[Explanation, ...]):
    """What :func:`explain` found, a call each; prints as text."""

    __slots__ = ()

    def __str__(self) -> str:
        """Join the texts of the calls."""
        return "\n".join(map(str, self)) or "no fusednn operation was called"

    __repr__ = __str__


_recorder: ContextVar[list[Explanation] | None] = ContextVar("fusednn_recorder", default=None)


def explaining() -> bool:
    """Whether :func:`explain` wants to see the operations of this call."""
    return _recorder.get() is not None


def record_composite(operation: str, reasons: Reasons) -> None:
    """Let :func:`explain` know of a layer that calls torch's own layers one by one, and why it must."""
    recorder = _recorder.get()
    if recorder is not None:
        passed_over = {"fused": tuple(reasons)}
        recorder.append(Explanation(operation, settings.backend(), "composite", passed_over))


def record_choice(operation: str, chosen: str, passed_over: dict[str, tuple[str, ...]]) -> None:
    """Let :func:`explain` know which way a layer took that its operations can't tell, and why not another."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append(Explanation(operation, settings.backend(), chosen, passed_over))


class Operation:
    """A named operation and its implementations, best first."""

    def __init__(self, name: str, implementations: Sequence[Implementation]) -> None:
        self.name = name
        self.implementations = tuple(implementations)
        self._by_backend = {i.backend: i for i in self.implementations}
        self._said: set[tuple[str, ...]] = set()

    def __call__(self, *args: Any) -> Any:
        """Run the call on the backend that :meth:`choose` picks."""
        self.record(*args)
        return self.choose(*args).run(*args)

    def record(self, *args: Any) -> None:
        """Let :func:`explain` know of a call."""
        recorder = _recorder.get()
        if recorder is not None:
            recorder.append(self.explain(*args))

    def choose(self, *args: Any) -> Implementation:
        """Return the implementation for this call.

        Raises:
            RuntimeError: the backend asked for by name can't serve the call; the text has every reason.
        """
        requested = settings.backend()
        if requested != "auto":
            reasons = self._reasons_against(requested, args)
            if reasons:
                raise RuntimeError(_refusal(self.name, requested, reasons))
            return self._by_backend[requested]
        passed_over: list[str] = []
        by_choice = False  # the reference is then no fallback: it was measured to be faster
        for implementation in self.implementations:
            reasons = implementation.unsupported(*args)
            if not reasons:
                reasons = implementation.unprofitable(*args)
                by_choice = by_choice or bool(reasons)
            if not reasons:
                if passed_over and implementation.backend in ("torch", "reference") and not by_choice:
                    self._say_once(passed_over)
                return implementation
            passed_over += [f"{implementation.backend}: {reason}" for reason in reasons]
        raise RuntimeError(_refusal(self.name, requested, passed_over))

    def explain(self, *args: Any) -> Explanation:
        """Return the choice for this call and the reasons against every other backend; runs nothing."""
        requested = settings.backend()
        chosen: str | None = None
        passed_over: dict[str, tuple[str, ...]] = {}
        if requested != "auto" and not self._reasons_against(requested, args):
            chosen = requested
        for backend in settings.BACKENDS[1:] if requested != "auto" else self._auto_order():
            reasons = self._reasons_against(backend, args)
            if requested == "auto":
                implementation = self._by_backend.get(backend)
                reasons = reasons or (implementation.unprofitable(*args) if implementation else [])
                if not reasons and chosen is None:
                    chosen = backend
                    continue
                reasons = reasons or [f"{chosen} comes first"]
            elif backend == chosen:
                continue
            else:
                reasons = reasons or [f"{requested} was asked for"]
            passed_over[backend] = tuple(reasons)
        plan = self._by_backend[chosen].plan(*args) if chosen is not None else {}
        return Explanation(self.name, requested, chosen, passed_over, plan)

    def _auto_order(self) -> Iterable[str]:
        own = [i.backend for i in self.implementations]
        return own + [b for b in settings.BACKENDS[1:] if b not in own]

    def _reasons_against(self, backend: str, args: tuple[Any, ...]) -> Reasons:
        implementation = self._by_backend.get(backend)
        if implementation is None:
            return [f"{self.name} has no {backend} implementation"]
        return implementation.unsupported(*args)

    def _say_once(self, passed_over: list[str]) -> None:
        key = tuple(passed_over)
        if key not in self._said:
            self._said.add(key)
            logger.warning(
                "%s: falls back to the reference, correct but slower (said once): %s",
                self.name,
                "; ".join(passed_over),
            )


def _refusal(operation: str, requested: str, reasons: Iterable[str]) -> str:
    listed = "\n".join(f"  - {reason}" for reason in reasons)
    return (
        f"{operation}: backend {requested!r} can't serve this call:\n{listed}\n"
        "Ask for 'auto' to let fusednn choose, or 'reference' for plain PyTorch."
    )


def explain(module_or_function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Explanations:
    """Say which backend each fusednn operation of a call takes, and why not the others.

    Args:
        module_or_function: a module or function that uses fusednn's layers, at any depth.
        *inputs: its positional arguments.
        **kwargs: its keyword arguments.

    Returns:
        A tuple of :class:`Explanation`, one for each operation called, in order; ``print`` shows it as text.

    The call is made once, as it stands (gradients are recorded if they would be). An error it raises, such
    as a backend asked for by name that can't serve, is part of the explanation if an operation raised it.
    """
    found: list[Explanation] = []
    token = _recorder.set(found)
    try:
        module_or_function(*inputs, **kwargs)
    except RuntimeError:
        if not found or found[-1].backend is not None:
            raise
    finally:
        _recorder.reset(token)
    return Explanations(found)
