"""Where the recurrence runs: all but Triton, which has no kernel of it."""

from tests import places

recurrence_place = places.fixture(lambda place: place.backend != "triton")
