"""Elo ratings: what every order of every set of matches keeps."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.bounds import gamma
from paper import elo

N = 4
MATCHES = st.lists(st.permutations(range(N)).map(lambda order: tuple(order[:2])), max_size=50)
ROUNDING = gamma(200, torch.float64) * 2 * N * elo.START  # of a few operations for each match


@given(MATCHES)
def test_a_match_moves_points_from_the_loser_to_the_winner(matches: list[elo.Match]) -> None:
    ratings = elo.ratings_after(matches, N)
    assert abs(sum(ratings) - N * elo.START) <= ROUNDING
    for winner, loser in matches[-1:]:
        before = elo.ratings_after(matches[:-1], N)
        moved = [after - was for after, was in zip(ratings, before)]
        assert 0 < moved[winner] <= elo.K and -elo.K <= moved[loser] < 0
        assert sum(change != 0 for change in moved) == 2


@given(MATCHES, st.permutations(range(N)))
def test_the_names_of_the_systems_do_not_matter(matches: list[elo.Match], names: list[int]) -> None:
    ratings = elo.ratings_after(matches, N)
    renamed = elo.ratings_after([(names[a], names[b]) for a, b in matches], N)
    assert ratings == [renamed[name] for name in names]


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_one_of_two_wins(rating: int, other: int) -> None:
    total = elo.win_probability(rating, other) + elo.win_probability(other, rating)
    assert abs(total - 1) <= ROUNDING
    assert (elo.win_probability(rating, other) >= 1 / 2) == (rating >= other)


def test_the_order_of_matches_matters_and_one_match_has_no_order() -> None:
    matches = [(0, 1)] * 3 + [(1, 0)] * 3
    forward, backward = elo.ratings_after(matches, 2), elo.ratings_after(matches[::-1], 2)
    assert forward[0] < backward[0]
    rng = random.Random(0)
    assert elo.over_orders(matches, 2, 50, rng)["differs"] > 0
    alone = elo.over_orders([(0, 1)], 2, 50, rng)
    assert alone == {"mean": [1016.0, 984.0], "spread": [0.0, 0.0], "differs": 0.0}


def test_in_a_tournament_each_pair_plays_and_the_better_wins_more_often() -> None:
    matches = elo.tournament([0.0, 400.0, 800.0], 200, random.Random(0))
    assert len(matches) == 3 * 200
    for worse, better in ((0, 1), (1, 2), (0, 2)):
        assert matches.count((better, worse)) > matches.count((worse, better))
