"""Swap torch's layers of a model for fusednn's, in place, and back.

A layer is swapped by giving the same object another class, so nothing that refers to it notices:
docs/design/005-replace-layers.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from .attention.modules import MultiheadAttention
from .attention.transformer import TransformerEncoderLayer
from .conv.modules import DepthwiseConv2d
from .rnn.modules import GRUCell, LSTMCell

# A row per layer. Each class of fusednn subclasses torch's, takes its arguments and adds no state to them.
REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.Conv2d: DepthwiseConv2d,
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
}

# Set on the layers that replace_layers swapped, so that restore_layers leaves alone those that the model's
# author made fusednn's. An ordinary attribute: it survives deepcopy and pickle, and is in no state_dict.
_MARK = "_fusednn_replaces"

Predicate = Callable[[str, nn.Module], bool]
Filter = str | type[nn.Module] | Predicate


@dataclass(frozen=True)
class Entry:
    """What became of one layer.

    ``names`` are all the names that the model has for it (``""`` is the model itself), ``was`` and ``now``
    its class before and after, ``changed`` whether it was swapped, ``reason`` why not, else empty.
    """

    names: tuple[str, ...]
    was: type[nn.Module]
    now: type[nn.Module]
    reason: str = ""

    @property
    def changed(self) -> bool:
        """Whether the layer was swapped."""
        return self.was is not self.now

    @property
    def label(self) -> str:
        """All of the layer's names."""
        return " = ".join(name or "(the model itself)" for name in self.names)

    @property
    def fate(self) -> str:
        """The classes before and after, or why the layer stays, in words."""
        then = f"-> {_name(self.now)}" if self.changed else f"stays: {self.reason}"
        return f"{_name(self.was)} {then}"

    def __str__(self) -> str:
        """Write the layer and its fate as a line."""
        return f"{self.label}: {self.fate}"

    __repr__ = __str__


@dataclass(frozen=True)
class Report:
    """What :func:`replace_layers` or :func:`restore_layers` did with each candidate; prints as text.

    ``unused`` holds the filters that chose no candidate, such as a mistyped name.
    """

    entries: tuple[Entry, ...]
    unused: tuple[str, ...] = ()

    @property
    def changed(self) -> tuple[Entry, ...]:
        """The layers that were swapped."""
        return tuple(e for e in self.entries if e.changed)

    @property
    def unchanged(self) -> tuple[Entry, ...]:
        """The candidates that were left as they were."""
        return tuple(e for e in self.entries if not e.changed)

    def __str__(self) -> str:
        """Lay the report out as a summary and a line for each fate; `entries` has every candidate."""
        lines = [f"{len(self.changed)} of {len(self.entries)} candidates changed"]
        by_fate: dict[str, list[Entry]] = {}
        for entry in self.entries:
            by_fate.setdefault(entry.fate, []).append(entry)
        for fate, (first, *others) in by_fate.items():
            grouped = others and f"{1 + len(others)} x {fate}: {first.label} … {others[-1].label}"
            lines.append(f"  {grouped or first}")
        lines += [f"  {text} matched no candidate" for text in self.unused]
        return "\n".join(lines)

    __repr__ = __str__


def replace_layers(
    model: nn.Module,
    include: Filter | Iterable[Filter] | None = None,
    exclude: Filter | Iterable[Filter] = (),
) -> Report:
    """Swap torch's layers in ``model`` for fusednn's, in place.

    Candidates are the modules of ``model``, itself among them, whose class is one that fusednn replaces or a
    subclass of it. Only exact classes are swapped (parametrized ones too): a subclass, or a layer whose
    ``forward`` was assigned on the instance, computes something that fusednn does not know. Parameters,
    buffers, hooks, parametrizations, the training flag and the ``state_dict`` stay the same objects, and so
    does the layer itself; optimizers and tied weights need no care. A second call changes nothing.

    Args:
        model: the module to search.
        include: what to swap: one or several filters; None stands for everything.
        exclude: what to leave as it is; stronger than ``include``. A filter is a pattern on the module's
            name (``"decoder.*"``; ``*`` crosses dots; any name of a shared module counts), a class
            (subclasses match too) or a function of name and module that returns a bool.

    Returns:
        A :class:`Report` with an :class:`Entry` for each candidate.

    Raises:
        TypeError: ``model`` is no module, or a filter is none of the above. Nothing was swapped then.
    """
    wanted, unwanted = _Filters("include", include), _Filters("exclude", exclude)

    def fate(names: tuple[str, ...], module: nn.Module) -> tuple[type[nn.Module], str] | None:
        torch_class = _replaced_class(module)
        if torch_class is None:
            return None
        excluded_by = unwanted.first_match(names, module)
        included = include is None or wanted.first_match(names, module) is not None
        if isinstance(module, REPLACEMENTS[torch_class]):
            return type_before_parametrizations(module), f"already {_name(REPLACEMENTS[torch_class])}"
        if excluded_by is not None:
            return REPLACEMENTS[torch_class], f"excluded by {excluded_by}"
        if not included:
            return REPLACEMENTS[torch_class], "not in include"
        reason = _reason_against(module, torch_class)
        if not reason and torch_class is nn.Conv2d and module.groups != module.in_channels:
            reason = f"not depthwise: got groups={module.groups}, expected groups = in_channels"
        return REPLACEMENTS[torch_class], reason

    entries = _swap_all(model, fate)
    return Report(entries, (*wanted.unused(), *unwanted.unused()))


def restore_layers(model: nn.Module) -> Report:
    """Undo :func:`replace_layers`: give each layer that it swapped its torch class again, in place.

    Layers that were built as fusednn's stay so.

    Args:
        model: the module to search; the one given to ``replace_layers``, or a copy or a part of it.

    Returns:
        A :class:`Report` with an :class:`Entry` for each of fusednn's layers.

    Raises:
        TypeError: ``model`` is no module.
    """

    def fate(_names: tuple[str, ...], module: nn.Module) -> tuple[type[nn.Module], str] | None:
        torch_class = _replaced_class(module)
        if torch_class is None or not isinstance(module, REPLACEMENTS[torch_class]):
            return None
        if _MARK not in vars(module):
            return torch_class, "built as such, not by replace_layers"
        return torch_class, _reason_against(module, REPLACEMENTS[torch_class])

    return Report(_swap_all(model, fate))


def _swap_all(
    model: nn.Module, fate: Callable[[tuple[str, ...], nn.Module], tuple[type[nn.Module], str] | None]
) -> tuple[Entry, ...]:
    """Ask ``fate`` for each module's new class and the reason against it, then swap; None: no candidate."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    fates = [(m, tuple(n), found) for m, n in names.items() if (found := fate(tuple(n), m)) is not None]
    entries = []
    for module, its_names, (new_class, reason) in fates:
        was = type_before_parametrizations(module)
        if not reason:
            _set_class(module, new_class)
        entries.append(Entry(its_names, was, type_before_parametrizations(module), reason))
    return tuple(entries)


def _replaced_class(module: nn.Module) -> type[nn.Module] | None:
    return next((c for c in REPLACEMENTS if isinstance(module, c)), None)


def _reason_against(module: nn.Module, exact: type[nn.Module]) -> str:
    if type_before_parametrizations(module) is not exact:
        return f"a subclass of {_name(exact)}, whose forward may compute something else"
    if "forward" in vars(module):
        return "its forward was assigned on the instance"
    return ""


def _set_class(module: nn.Module, new_class: type[nn.Module]) -> None:
    if is_parametrized(module):
        # The derived class holds the parametrized properties. Copies of the module share it: leave it alone.
        namespace = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(f"Parametrized{new_class.__name__}", (new_class,), namespace)
    else:
        module.__class__ = new_class
    if new_class in REPLACEMENTS:
        delattr(module, _MARK)
    else:
        setattr(module, _MARK, True)


class _Filters:
    """The filters of one argument, and which of them have matched."""

    def __init__(self, argument: str, filters: Any) -> None:
        if filters is None:
            filters = ()
        elif isinstance(filters, (str, type)) or callable(filters):
            filters = (filters,)
        elif not isinstance(filters, Iterable):
            raise TypeError(f"{argument}: got {type(filters).__name__}, expected filters")
        self._argument = argument
        self._filters = tuple(filters)
        self._matched: set[int] = set()
        for f in self._filters:
            valid = issubclass(f, nn.Module) if isinstance(f, type) else isinstance(f, str) or callable(f)
            if not valid:
                raise TypeError(f"{argument}: got {f!r}, expected a name, a module class or a function")

    def first_match(self, names: tuple[str, ...], module: nn.Module) -> str | None:
        """Try every filter, and describe the first that matches."""
        matches = [i for i, f in enumerate(self._filters) if _matches(f, names, module)]
        self._matched.update(matches)
        return _describe(self._filters[matches[0]]) if matches else None

    def unused(self) -> list[str]:
        """Describe the filters that never matched."""
        return [
            f"{self._argument} {_describe(f)}" for i, f in enumerate(self._filters) if i not in self._matched
        ]


def _matches(f: Filter, names: tuple[str, ...], module: nn.Module) -> bool:
    if isinstance(f, str):
        return any(fnmatchcase(name, f) for name in names)
    if isinstance(f, type):
        return isinstance(module, f)
    return any(f(name, module) for name in names)


def _describe(f: Filter) -> str:
    if isinstance(f, str):
        return repr(f)
    return _name(f) if isinstance(f, type) else getattr(f, "__qualname__", repr(f))


def _name(c: type) -> str:
    package = c.__module__.split(".")[0]
    if package == "torch" and getattr(nn, c.__name__, None) is c:
        return f"torch.nn.{c.__name__}"
    return f"fusednn.{c.__name__}" if package == "fusednn" else c.__qualname__
