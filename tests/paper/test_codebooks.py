"""The codes: from their definitions to the numbers that others published."""

import math

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from hypothesis import given
from hypothesis import strategies as st

import nf4
from helpers.bounds import OF_A_SAMPLED_ERROR, OF_A_SAMPLED_MEAN, OF_AN_INTEGRAL, OF_AN_ITERATION
from helpers.strategies import Recipe, recipes
from paper import codebooks, datatypes
from paper.codebooks import BlockDistribution

# Root mean squared error for normal weights, block 64, to four digits (sampled)
PUBLISHED = {
    "int4": (codebooks.integers(4), 0.1077),
    "e2m1": (codebooks.e2m1(), 0.1057),
    "fp4": (codebooks.fp4(), 0.1220),
    "nf4": (nf4.NF4, 0.0920),
    "af4": (codebooks.af4(), 0.0957),
    "bof4": (codebooks.bof4(), 0.0894),
}
# Mean absolute error of NF4, blocks of 32 to 4096, from the tests of bitsandbytes
ABSOLUTE = [0.067746, 0.072798, 0.076831, 0.080337, 0.083547, 0.086610, 0.089592, 0.092547]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_exact_squared_error_is_what_others_sampled(name: str) -> None:
    code, expected = PUBLISHED[name]
    error = math.sqrt(BlockDistribution(64, power=2).squared_error(code))
    assert abs(error - expected) < OF_A_SAMPLED_ERROR


@pytest.mark.parametrize("place", range(8))
def test_the_exact_absolute_error_of_nf4_is_what_bitsandbytes_sampled(place: int) -> None:
    error = BlockDistribution(2 ** (5 + place), power=1).absolute_error(nf4.NF4)
    assert abs(error - ABSOLUTE[place]) < OF_A_SAMPLED_MEAN


def test_af4_is_that_of_bitsandbytes() -> None:
    theirs = get_4bit_type("af4", device="cpu", blocksize=64).sort().values
    assert (codebooks.af4(64) - theirs).abs().max() < OF_AN_ITERATION


@pytest.mark.parametrize("norm", [1, 2])
def test_the_optimal_code_has_the_least_error(norm: int) -> None:
    distribution = BlockDistribution(64, power=norm)
    error = distribution.absolute_error if norm == 1 else distribution.squared_error
    best = codebooks.optimal(norm)
    others = [nf4.NF4, codebooks.af4(), codebooks.bof4(), codebooks.optimal(3 - norm)]
    others += [best * 1.01, best * 0.99, best + 0.003]
    assert all(error(best) < error(other) for other in others)


def test_bof4_has_the_least_error_of_codes_with_its_fixed_levels() -> None:
    distribution = BlockDistribution(64, power=2)
    code = codebooks.bof4()
    assert {-1.0, 0.0, 1.0} < {*code.tolist()}
    for place in set(range(16)) - {0, 7, 15}:
        for step in (-0.002, 0.002):
            moved = code.clone()
            moved[place] += step
            assert distribution.squared_error(code) < distribution.squared_error(moved)


def test_bof4_s_has_the_least_error_of_codes_for_the_signed_largest_number() -> None:
    """-1 is no level: the largest number of a block is always 1."""
    distribution = BlockDistribution(64, power=2, signed=True)
    code = codebooks.bof4_s()
    assert {0.0, 1.0} < {*code.tolist()}
    assert code.min() > -1
    for place in set(range(16)) - {7, 15}:
        for step in (-0.002, 0.002):
            moved = code.clone()
            moved[place] += step
            assert distribution.squared_error(code) < distribution.squared_error(moved)
    unsigned = BlockDistribution(64, power=2)
    assert distribution.squared_error(code) < unsigned.squared_error(codebooks.bof4())


def test_the_exact_error_of_bof4_s_is_the_error_of_random_weights() -> None:
    weight = torch.randn(2**21, generator=torch.Generator().manual_seed(0))
    decoded = datatypes.Quantizer("BOF4-S", 64)(weight)
    distribution = BlockDistribution(64, power=2, signed=True)
    exact = math.sqrt(distribution.squared_error(codebooks.bof4_s()))
    sampled = (decoded - weight).square().mean().sqrt().item()
    assert abs(sampled - exact) < OF_A_SAMPLED_ERROR


@given(recipes)
def test_with_its_sign_the_largest_number_of_a_block_is_its_absmax(recipe: Recipe) -> None:
    weight = recipe.tensor()
    signs = codebooks.signs(weight, recipe.block_size)
    assert signs.shape == weight.shape and (signs.abs() == 1).all()
    for start in range(0, weight.numel(), recipe.block_size):
        block = weight.flatten()[start : start + recipe.block_size]
        sign = signs.flatten()[start : start + recipe.block_size]
        assert (sign == sign[0]).all()
        assert (block * sign).max() == block.abs().max()


def test_the_shares_of_a_code_add_up_to_one() -> None:
    for block in (2, 64, 4096):
        mass = BlockDistribution(block, power=0).cells(nf4.NF4.double().numpy())[0]
        assert abs(mass.sum() - 1) <= OF_AN_INTEGRAL


def test_floats_and_integers_are_those_of_their_standards() -> None:
    assert (6 * codebooks.e2m1()).tolist()[8:] == [0.5, 1, 1.5, 2, 3, 4, 6]
    assert (codebooks.e3m0() * 32).tolist()[8:] == [0.5, 1, 2, 4, 8, 16, 32]
    assert len(codebooks.integers(4)) == 15


@given(st.integers(1, 8), st.data())
def test_packing_has_no_gaps_and_loses_nothing(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=50))
    packed = codebooks.pack(torch.tensor(codes, dtype=torch.int64), bits)
    assert packed.numel() == -(-len(codes) * bits // 8)
    assert codebooks.unpack(packed, bits, len(codes)).tolist() == codes
