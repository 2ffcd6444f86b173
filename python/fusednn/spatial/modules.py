"""Attention over the positions of an image, as a layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..core import dispatch
from ..core.checks import check_positive, check_shape, check_tensor, choice
from . import checks, composite, functional, shortcut
from .reference import OUTPUTS

SCORES = ("positional", "additive")


class SpatialAttention(nn.Module):
    r"""Attend to the positions of an image, conditioned on a hidden state.

    ``map = softmax(s / T)`` over all H·W positions, with the scores

    * ``score="positional"``: a 1×1 convolution of the features plus ``Linear(hidden, H·W)`` (Kim & Canny
      2017);
    * ``score="additive"``: ``v tanh(W f + U h)``, for images of any size (Xu et al. 2015).

    The convolution has no bias: a softmax doesn't see one. Children are torch's layers and hold the
    parameters ``score.weight``, ``hidden.weight``, ``hidden.bias`` and, of additive scores, ``v.weight``;
    they are called only where that does more than their tensors say (hooks, another class). A learned
    temperature is ``exp(log_temperature)``, so that it stays positive.

    Args:
        in_channels: C.
        hidden_size: of the state; 0 for attention without one.
        height: H; with additive scores any image is taken, and None will do.
        width: W, likewise.
        score: ``"positional"`` or ``"additive"``.
        output: what the map makes of the features: ``"scale"``, ``"flatten"``, ``"sum"`` or
            ``"coordinates"`` (soft-argmax, Levine et al. 2016).
        glimpses: G, maps of each image.
        temperature: T, positive; where learning starts if it is learned.
        learn_temperature: whether T is a parameter.
        attention_size: A, rows of W and U; None for `hidden_size`, or `in_channels` if that is 0.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        features ``[N, C, H, W]``; hidden ``[N, hidden_size]``; mask broadcastable to ``[N, 1, H, W]``.
        Returns the map ``[N, G, H, W]`` beside ``[N, G*C, H, W]`` (scale, in the features' memory format),
        ``[N, G*C*H*W]`` (flatten), ``[N, G*C]`` (sum) or ``[N, G, 2]`` (coordinates).

    Dtypes:
        float32, float64; bfloat16 and float16 with scores, softmax and sums in float32.

    Raises:
        ValueError: an option has no such value.
        RuntimeError: a size, dtype or device does not fit; the text names the argument.
    """

    log_temperature: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        height: int | None,
        width: int | None,
        *,
        score: str = "positional",
        output: str = "scale",
        glimpses: int = 1,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        attention_size: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        name = "SpatialAttention"
        choice(name, "score", score, SCORES)
        choice(name, "output", output, OUTPUTS)
        checks.temperature(name, temperature, torch.device("cpu"))
        sizes: dict[str, int | None] = {"in_channels": in_channels, "glimpses": glimpses}
        if score == "positional":
            sizes |= {"height": height, "width": width}
        if attention_size is not None:
            sizes["attention_size"] = attention_size
        check_positive(name, **sizes)
        if hidden_size < 0:
            raise ValueError(f"{name}: hidden_size: got {hidden_size}, expected 0 or more")
        super().__init__()
        self.in_channels, self.hidden_size, self.glimpses = in_channels, hidden_size, glimpses
        self.height, self.width = height, width
        self.score_kind, self.output = score, output
        factory = {"device": device, "dtype": dtype}
        if score == "positional":
            rows, terms = glimpses, glimpses * (height or 0) * (width or 0)
        else:
            rows = terms = attention_size or hidden_size or in_channels
        self.score = nn.Conv2d(in_channels, rows, 1, bias=False, **factory)
        self.hidden = nn.Linear(hidden_size, terms, **factory) if hidden_size else None
        self.v = nn.Linear(rows, glimpses, bias=False, **factory) if score == "additive" else None
        self._fixed_temperature = float(temperature)
        self.register_parameter("log_temperature", None)
        if learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature), **factory))

    @property
    def temperature(self) -> float | Tensor:
        """T: a number, or the tensor ``exp(log_temperature)``."""
        return self._fixed_temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(
        self, features: Tensor, hidden: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the attended features and the map; `hidden` None stands for zeros, mask True: takes part."""
        reasons = composite.against_children(self)
        if not reasons and mask is None and shortcut.applies(features):
            found = shortcut.attend(self, features, hidden)
            if found is not None:
                return found
        checks.check_images("SpatialAttention", "features", features, "[N, C, H, W]")
        self.check_size(features)
        if reasons:
            if not torch.compiler.is_compiling():
                dispatch.record_composite("spatial_attention", reasons)
            return composite.attend(self, features, hidden, mask)
        return functional.spatial_attention(
            features,
            self.score.weight.flatten(1),
            self._hidden_term(features, hidden),
            None if self.v is None else self.v.weight,
            mask=mask,
            temperature=self.temperature,
            output=self.output,
        )

    def check_size(self, features: Tensor) -> None:
        """Raise RuntimeError unless the images are those that the positional scores were made for."""
        if self.score_kind == "positional" and tuple(features.shape[-2:]) != (self.height, self.width):
            raise RuntimeError(
                f"SpatialAttention: features has size {list(features.shape)}, expected images of "
                f"[{self.height}, {self.width}] for positional scores"
            )

    def _hidden_term(self, features: Tensor, hidden: Tensor | None) -> Tensor | None:
        if self.hidden is None:
            if hidden is not None:
                raise RuntimeError("SpatialAttention: hidden: got a state, expected None for hidden_size=0")
            return None
        n = features.shape[0]
        if hidden is None:  # the term of a zero state
            if self.hidden.bias is None:
                return None
            term = self.hidden.bias.expand(n, -1)
        else:
            check_tensor("SpatialAttention", "hidden", hidden)
            why = f"features of size {list(features.shape)}"
            check_shape("SpatialAttention", "hidden", hidden, (n, self.hidden_size), why)
            term = nn.functional.linear(hidden, self.hidden.weight, self.hidden.bias)
        if self.score_kind == "additive":
            return term
        return term.reshape(n, self.glimpses, features.shape[2] * features.shape[3])

    def extra_repr(self) -> str:
        """Say which scores, output and temperature."""
        t = "learned" if self.log_temperature is not None else self._fixed_temperature
        return f"score={self.score_kind!r}, output={self.output!r}, glimpses={self.glimpses}, temperature={t}"
