"""The barrier protocol of csrc/pipeline.h under all interleavings of producers, consumers, copies
and remote arrivals.

``explore.h`` says what counts as an error.
"""

from __future__ import annotations

import ctypes

import pytest

pytestmark = pytest.mark.csrc

SHAPES = {  # as in host.cpp: stages, programs of a cluster, ping-pong, stagger
    "2 stages": 0,
    "3 stages, stagger 2": 1,
    "2 stages, cluster, stagger 1": 2,
    "2 stages, cluster, ping-pong": 3,
    "3 stages, ping-pong": 4,
    "2 stages, stagger 1": 5,
    "4 stages, stagger 3": 6,
}
CLUSTERS, PINGPONG = (2, 3), (3, 4)
FAULTS = {"none": 0, "no remote release": 1, "half the arrivals": 2, "early release": 3, "no turns": 4}
WORK = {  # row tiles, column tiles, tiles of a unit, steps of a tile
    "a tile of one step": (1, 1, 1, 1),
    "one step a tile": (1, 3, 1, 1),
    "tiles shorter than the ring": (1, 3, 3, 2),
    "units of one tile": (2, 2, 1, 3),
    "units of unequal length": (1, 3, 2, 3),
    "a long tile": (1, 2, 2, 5),
}


def search(host: ctypes.CDLL, shape: int, work: tuple[int, int, int, int], fault: int = 0) -> tuple[str, int]:
    """(the first error found or "", how many states were seen)."""
    host.interleavings.restype = ctypes.c_char_p
    states = ctypes.c_longlong()
    return host.interleavings(shape, *work, fault, 5_000_000, ctypes.byref(states)).decode(), states.value


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_interleaving_goes_wrong(shape: int, work: tuple[int, int, int, int], host: ctypes.CDLL) -> None:
    error, states = search(host, shape, work)
    assert error == ""
    if shape in CLUSTERS and work != WORK["a tile of one step"]:
        assert states > 10_000, "six actors have many interleavings: the search did not end early"


BROKEN = [
    (name, fault)
    for name, shape in SHAPES.items()
    for fault in ("half the arrivals", "early release", "no remote release", "no turns")
    if (fault != "no remote release" or shape in CLUSTERS) and (fault != "no turns" or shape in PINGPONG)
]


@pytest.mark.parametrize(("shape", "fault"), BROKEN)
def test_the_search_finds_broken_protocols(shape: str, fault: str, host: ctypes.CDLL) -> None:
    error, _ = search(host, SHAPES[shape], WORK["units of one tile"], FAULTS[fault])
    assert error != ""


@pytest.mark.parametrize("shape", [name for name, shape in SHAPES.items() if shape not in PINGPONG])
def test_the_stagger_is_for_speed_alone(shape: str, host: ctypes.CDLL) -> None:
    assert search(host, SHAPES[shape], WORK["units of one tile"], FAULTS["no turns"])[0] == ""
