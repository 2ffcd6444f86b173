"""Where spatial attention runs: everywhere; large work on devices and their emulator."""

from tests import places

device_place = places.fixture(
    lambda place: place.backend in ("cuda", "triton") and place.name != "triton-interpreted"
)
recurrence_place = places.fixture(lambda place: place.backend != "triton")
device_recurrence = places.fixture(lambda place: place.backend == "cuda")
