"""Where the convolutions run: a block's training not in Triton, which takes minutes (a few in test_device_block)."""

from tests import places

training_place = places.fixture(lambda place: place.backend != "triton")
