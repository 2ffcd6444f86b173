"""Attention over the positions of an image as functions: check, then call the op."""

from __future__ import annotations

from torch import Tensor

from ..core.checks import check_same_kind, check_shape, check_tensors, choice
from ..core.transforms import autocast_enabled
from . import checks, ops, reference


def spatial_softmax(
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_coordinates: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax over all positions of each map: ``softmax(logits / temperature)`` over H·W, not over one axis.

    The expected coordinates are ``sum over positions of (x, y) * map``, the soft-argmax of Levine et al.
    (2016). x grows along the width and y along the height; position i of n lies at
    ``(2 i - (n - 1)) / (n - 1)``, rounded once: -1 is the first centre, 1 the last, as
    ``torch.linspace(-1, 1, n)`` up to its rounding (numpy's and torch's differ there by an ulp, too); -1 if
    n = 1. They are summed before the map is rounded to a 16-bit dtype.

    Args:
        logits: ``[N, G, H, W]``, floating point.
        mask: bool, broadcastable to ``[N, G, H, W]``; True takes part. Nothing of a masked position is read:
            NaN or inf there reaches neither results nor gradients.
        temperature: a positive number, or a tensor that holds one, which gets a gradient (NaN results if it
            isn't positive). Any positive value is safe: small ones tend to a one-hot map, large ones to a
            uniform one.
        return_coordinates: return the expected coordinates, too.

    Returns:
        The map ``[N, G, H, W]``, and coordinates ``[N, G, 2]`` (x, y) if asked for, of the logits' dtype.
        Where there is nothing to attend to (all masked, or all -inf), both are 0, and so are the gradients.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the text names the argument.
        TypeError: an argument is of another type.
        ValueError: the temperature is not positive.
    """
    name = "spatial_softmax"
    checks.check_images(name, "logits", logits, "[N, G, H, W]")
    learned, fixed = checks.temperature(name, temperature, logits.device)
    flat = checks.mask_of(name, mask, logits.shape, logits.device)
    map, xy = ops.spatial_softmax_forward(logits, flat, learned, fixed, return_coordinates)
    return (map, xy) if return_coordinates else map


def spatial_attention(
    features: Tensor,
    weight: Tensor,
    hidden_term: Tensor | None = None,
    v: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    output: str = "scale",
) -> tuple[Tensor, Tensor]:
    """Score every position of an image, softmax the scores over all positions, and weigh the features by it.

    ``s = weight f + hidden_term`` without `v` (Kim & Canny 2017), ``s = v tanh(weight f + hidden_term)`` with
    it (Xu et al. 2015); ``map = softmax(s / temperature)`` over H·W. A constant added to all scores of a map
    changes nothing, so there is no bias of the score.

    Args:
        features: ``[N, C, H, W]``, floating point, in either memory format.
        weight: ``[G, C]``, a row for each of G maps (glimpses); with `v`: ``[A, C]``.
        hidden_term: what a state adds to the scores, ``[N, G, H*W]``; with `v`: ``[N, A]``; or None.
        v: ``[G, A]`` or None.
        mask: bool, broadcastable to ``[N, 1, H, W]``, for all maps of a sample; True takes part. Nothing of a
            masked position is read: NaN or inf there reaches neither results nor gradients.
        temperature: a positive number, or a tensor that holds one, which gets a gradient.
        output: ``"scale"``: features times map, ``[N, G*C, H, W]``, in the features' memory format;
            ``"flatten"``: the same as ``[N, G*C*H*W]``; ``"sum"``: summed over positions, ``[N, G*C]``;
            ``"coordinates"``: the map's expected (x, y), ``[N, G, 2]``, as in :func:`spatial_softmax`.

    Returns:
        The attended features, and the map ``[N, G, H, W]``, both of the features' dtype and differentiable.
        A sample with nothing to attend to has map, output and gradients 0.

    Under autocast every other argument is cast to the features' dtype.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the text names the argument.
        TypeError: an argument is of another type.
        ValueError: there is no such output, or the temperature is not positive.
    """
    name = "spatial_attention"
    checks.check_images(name, "features", features, "[N, C, H, W]")
    choice(name, "output", output, reference.OUTPUTS)
    _check_scores(name, features, weight, hidden_term, v)
    learned, fixed = checks.temperature(name, temperature, features.device)
    n, _c, height, width = features.shape
    flat = checks.mask_of(name, mask, (n, 1, height, width), features.device)
    flat = None if flat is None else flat.squeeze(1)
    if autocast_enabled(features.device):
        weight = weight.to(features.dtype)
        hidden_term, v = (None if t is None else t.to(features.dtype) for t in (hidden_term, v))
    return ops.spatial_attention_forward(features, weight, hidden_term, v, flat, learned, fixed, output)


def _check_scores(name, features, weight, hidden_term, v) -> None:
    check_tensors(name, weight=weight)
    check_tensors(name, optional=True, hidden_term=hidden_term, v=v)
    n, c, height, width = features.shape
    size = f"features of size {list(features.shape)}"
    if weight.dim() != 2 or weight.shape[1] != c or weight.shape[0] == 0:
        raise RuntimeError(f"{name}: weight has shape {list(weight.shape)}, expected [rows, {c}] for {size}")
    rows = weight.shape[0]
    if v is None:
        check_shape(name, "hidden_term", hidden_term, (n, rows, height * width), size)
    else:
        check_shape(name, "hidden_term", hidden_term, (n, rows), f"{size} and {rows} rows of weight")
        if v.dim() != 2 or v.shape[1] != rows or v.shape[0] == 0:
            raise RuntimeError(
                f"{name}: v has shape {list(v.shape)}, expected [glimpses, {rows}] for weight of size "
                f"{list(weight.shape)}"
            )
    others = (("weight", weight), ("hidden_term", hidden_term), ("v", v))
    check_same_kind(name, "features", features, others, autocast_enabled(features.device))
