"""Where the recurrence runs: the places of spatial attention."""

from tests.spatial.conftest import *  # noqa: F403
