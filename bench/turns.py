"""Times peers in turns.

Peers take turns, call by call, so whatever else the machine does slows all of them alike. The
machine's own speed cancels in a ratio: it is the median of the ratios of one turn.
"""

import statistics
import time
from collections.abc import Callable

Work = Callable[[], object]


def take_turns(
    works: dict[str, Work], turns: int, seconds_of: Callable[[Work], float]
) -> dict[str, list[float]]:
    """Returns the seconds of each turn of each peer; the peer that goes first rotates."""
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_of(works[name]))
    return seconds


def ours_to_this(seconds: dict[str, list[float]], name: str) -> float:
    """The time of "ours" relative to that of a peer."""
    return statistics.median(ours / other for ours, other in zip(seconds["ours"], seconds[name]))


def host_seconds(work: Work) -> float:
    """Seconds of one call by the host's clock."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
