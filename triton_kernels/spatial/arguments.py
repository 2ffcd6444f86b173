"""The named tuples that the kernels of spatial attention take."""

from __future__ import annotations

from typing import Any, NamedTuple


class Features(NamedTuple):
    """Images [N, C, P] and their strides, so that one kernel serves both memory formats."""

    data: Any
    sample: Any
    channel: Any
    position: Any


class Attended(NamedTuple):
    """Attended features: those that maps have scaled, [N, G, C, P], have these strides; sums are dense."""

    data: Any
    sample: Any
    map: Any
    channel: Any
    position: Any


class Mask(NamedTuple):
    """Bytes [N, P] and their strides."""

    data: Any
    sample: Any
    position: Any


class Inputs(NamedTuple):
    """Tensors of a call; any of them may be None."""

    features: Any  # Features
    weight: Any  # [G, C]; additive: [A, C]
    term: Any  # [N, G, P]; additive: [N, A]
    v: Any  # [G, A]
    mask: Any  # Mask
    learned: Any  # [1]: the temperature


class Parts(NamedTuple):
    """What the programs of a sample that takes several leave, in the type of the arithmetic."""

    weights: Any  # [N, G, P]
    stats: Any  # [programs, G, 2]: largest score, sum of weights
    sums: Any  # [programs, G, C or 2]


class Incoming(NamedTuple):
    """What the backward is given: gradients, of which one may be None, and the map."""

    attended: Any  # Attended
    grad_map: Any  # [N, G, P]
    map: Any  # [N, G, P]


class Numbers(NamedTuple):
    """Run-time numbers."""

    bits: Any  # of a temperature that is not learned, as a double
    channels: Any
    rows: Any  # of an additive weight
    positions: Any
    height: Any
    width: Any
    splits: Any  # programs of a sample


class Constants(NamedTuple):
    """What kernels are compiled for."""

    OUTPUT: Any
    MAPS: Any
    PRECISION: Any  # of products
    BLOCK_G: Any  # maps
    BLOCK_A: Any  # rows of an additive weight
    BLOCK_C: Any  # channels
    BLOCK_P: Any  # positions


class Place(NamedTuple):
    """A program's tile: made in the kernel."""

    n: Any  # sample, 64 bits
    p: Any  # positions [1, BLOCK_P], 64 bits
    present: Any  # which of them exist
    shown: Any  # which of them take part
