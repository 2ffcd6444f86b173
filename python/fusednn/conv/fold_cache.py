"""Folded weights kept between calls, and never used for sources that have changed.

A fold is used again only if each tensor that it was made from is the same object at the same address, its
version counter is the same, and, on a CPU, so are up to 64 of its elements, spread evenly: they see what the
counter misses, writes through ``.data`` or numpy, where these are broad. docs/design/002-weight-cache.md
has the reasoning and the limit. On other devices, where reading elements back would make the device wait, the
counter and the address decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core import settings

if TYPE_CHECKING:
    from typing_extensions import Self

_SAMPLES = 32
_PLAIN = (Tensor, nn.Parameter)  # exact types: a subclass may keep its data elsewhere


class FoldCache:
    """The fold of one layer. Copies and files of the layer start without one."""

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(self, sources: Sequence[Tensor | None], options: Any, make: Callable[[], Any]) -> Any:
        """Return ``make()``, made without gradients, or kept of the same sources and options."""
        keyed = settings.weight_cache_enabled() and all(t is None or _can_be_keyed(t) for t in sources)
        if keyed and self._entry is not None and self._entry.serves(sources, options):
            return self._entry.value
        # Not inference tensors: those have no version, by which kernels know their packed copies.
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        if keyed:
            self._entry = _Entry(sources, options, value)
        return value

    def clear(self) -> None:
        """Forget the fold, and let go of the tensors that it was made from."""
        self._entry = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldCache:
        return FoldCache()

    def __reduce__(self) -> tuple[type[FoldCache], tuple[()]]:
        return FoldCache, ()


class FoldingModule(nn.Module):
    """A layer with folded weights in `_folds`, which a change of mode, device or dtype lets go of."""

    _folds: FoldCache

    def train(self, mode: bool = True) -> Self:
        """Switch the mode, and let go of folded weights."""
        self._folds.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._folds.clear()
        return super()._apply(*args, **kwargs)


class _Entry:
    def __init__(self, sources: Sequence[Tensor | None], options: Any, value: Any) -> None:
        self.sources, self.options, self.value = tuple(sources), options, value
        self.state = _state(self.sources)
        # Views: they show what is written to the sources, and keep each address from being used again.
        self.samples = [_sample(t) for t in self.sources if t is not None and t.device.type == "cpu"]
        self.seen = torch.cat(self.samples) if self.samples else None

    def serves(self, sources: Sequence[Tensor | None], options: Any) -> bool:
        return (
            options == self.options
            and all(a is b for a, b in zip(self.sources, sources, strict=True))
            and _state(sources) == self.state
            and (self.seen is None or torch.equal(torch.cat(self.samples), self.seen))
        )


def _can_be_keyed(t: Tensor) -> bool:
    return type(t) in _PLAIN and not t.is_inference()


def _state(sources: Sequence[Tensor | None]) -> list[tuple[Any, ...] | None]:
    return [None if t is None else (t._version, t.data_ptr(), t.shape, t.dtype) for t in sources]


def _sample(t: Tensor) -> Tensor:
    """A view of elements that are evenly spread over the memory that the tensor spans."""
    sizes_and_strides = zip(t.shape, t.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in sizes_and_strides) if t.numel() else 0
    step = max(1, (span - 1) // (_SAMPLES - 1))
    return t.detach().as_strided(((span + step - 1) // step,), (step,))
