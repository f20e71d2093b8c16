"""Elo ratings: who wins against whom becomes one number for each system.

A system with the rating R beats one with the rating S with the probability

    p(R, S) = 1 / (1 + 10^((S - R) / 400))

After each match the winner gains K (1 - p) and the loser loses as much, so upsets move the ratings
most, and their sum stays the same. The result depends on the order of the matches: late ones count
more. So the paper (section 5) averages ratings over many random orders of the same matches.
"""

import random
import statistics
from collections.abc import Sequence
from itertools import combinations

K = 32
START = 1000.0
Match = tuple[int, int]  # the winner, the loser


def win_probability(rating: float, other: float) -> float:
    """p(R, S).

    >>> win_probability(1000, 1000), round(win_probability(1400, 1000), 3)
    (0.5, 0.909)
    """
    return 1 / (1 + 10 ** ((other - rating) / 400))


def ratings_after(matches: Sequence[Match], n_systems: int) -> list[float]:
    """The ratings after the matches in this order.

    >>> ratings_after([(0, 1)], 2)
    [1016.0, 984.0]
    """
    ratings = [START] * n_systems
    for winner, loser in matches:
        gain = K * (1 - win_probability(ratings[winner], ratings[loser]))
        ratings[winner] += gain
        ratings[loser] -= gain
    return ratings


def over_orders(
    matches: Sequence[Match], n_systems: int, n_orders: int, rng: random.Random
) -> dict:
    """Mean and standard deviation of each rating over random orders of the same matches.

    differs: the share of the orders that rank the systems otherwise than the mean does.
    """
    orders = [rng.sample(matches, len(matches)) for _ in range(n_orders)]
    runs = [ratings_after(order, n_systems) for order in orders]
    by_system = list(zip(*runs))
    mean = [statistics.fmean(ratings) for ratings in by_system]
    return {
        "mean": mean,
        "spread": [statistics.stdev(ratings) for ratings in by_system],
        "differs": statistics.fmean(ranking(run) != ranking(mean) for run in runs),
    }


def ranking(ratings: Sequence[float]) -> list[int]:
    """The systems, the lowest rating first."""
    return sorted(range(len(ratings)), key=ratings.__getitem__)


def tournament(ratings: Sequence[float], n_matches: int, rng: random.Random) -> list[Match]:
    """Each pair plays `n_matches`, and wins as often as the ratings say."""
    matches = []
    for a, b in combinations(range(len(ratings)), 2):
        for _ in range(n_matches):
            a_wins = rng.random() < win_probability(ratings[a], ratings[b])
            matches.append((a, b) if a_wins else (b, a))
    return matches
