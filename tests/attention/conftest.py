"""Where attention runs: its backward on all but CUDA."""

from tests import places


def trains(place: places.Place) -> bool:
    """Whether the place's backend has the backward too."""
    return place.backend != "cuda"


def _fast(place: places.Place) -> bool:
    return not place.slow


def _fast_kernels(place: places.Place) -> bool:
    return not place.slow and place.backend != "reference"


training_place = places.fixture(trains)
fast_place = places.fixture(_fast)
kernels = places.fixture(_fast_kernels)
training_kernels = places.fixture(lambda place: _fast_kernels(place) and trains(place))
