"""Where the convolutions run: a block's training not in Triton, where it takes minutes.

test_device_block.py trains a few there.
"""

from tests import places

training_place = places.fixture(lambda place: place.backend != "triton")
