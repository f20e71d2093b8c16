"""The laws of double_quant.py: the 8-bit code, the error, and decoded constants in range."""

import copy
import dataclasses
import math

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import assume, example, given, target
from hypothesis import strategies as st
from torch import Tensor

import double_quant
from helpers.bounds import cast, decision_slack, double_quantized, gamma, is_tight
from helpers.strategies import BLOCK_SIZES, Constants, constants, same_bits

LARGEST = torch.finfo(torch.float32).max
blocks_of = st.sampled_from(BLOCK_SIZES)


def mean_of(absmax: Tensor) -> tuple[float, float]:
    """The mean of the constants, and how far rounding may take the offset from it."""
    mean = absmax.double().mean().item() if absmax.numel() else 0.0
    n_operations = absmax.numel()  # n - 1 additions and one division
    return mean, gamma(n_operations) * mean + cast(mean, torch.float32)


def nested_absmax_of(absmax: Tensor, offset: Tensor | float, block_size: int) -> Tensor:
    """The nested absmax of each constant, in the shape of the constants.

    It is found without the code under test, whose errors it bounds.
    """
    centred = (absmax - offset).abs().reshape(-1)
    blocks = torch.nn.functional.pad(centred, (0, -len(centred) % block_size))
    nested = blocks.reshape(-1, block_size).amax(1)
    return nested.repeat_interleave(block_size)[: absmax.numel()].reshape(absmax.shape)


def bound_of(absmax: Tensor, block_size: int) -> Tensor:
    """How far each constant may be from its decoded one."""
    mean, rounding = mean_of(absmax)
    nested = nested_absmax_of(absmax.double(), mean, block_size) + rounding
    return double_quantized(absmax, nested, double_quant.DYNAMIC)


def test_the_8_bit_code_is_that_of_bitsandbytes_bit_for_bit() -> None:
    assert same_bits(double_quant.dynamic_code(), bnb.create_dynamic_map())
    assert same_bits(double_quant.DYNAMIC, bnb.create_dynamic_map())


def test_the_8_bit_code_ascends_with_zero_at_127_and_no_minus_one() -> None:
    code = double_quant.DYNAMIC
    assert code.shape == (256,) and (code[1:] > code[:-1]).all()
    assert same_bits(code[127], torch.tensor(0.0))
    assert code[255] == 1 and torch.equal(code[:127], -code[128:255].flip(0))


@given(constants, blocks_of)
@example(Constants(exponent=-149), 256)
@example(Constants(pattern="largest"), 256)
@example(Constants(shape=()), 256)
@example(Constants(pattern="all sizes", exponent=128), 2)
def test_the_error_is_within_half_gap_of_the_nested_absmax(
    recipe: Constants, block_size: int
) -> None:
    absmax = recipe.tensor()
    dq = double_quant.quantize(absmax, block_size)
    error = (absmax.double() - double_quant.dequantize(dq).double()).abs()
    ratio = error / bound_of(absmax, block_size)
    target(ratio.max().item() if ratio.numel() else 0.0)
    assert (ratio <= 1).all()


def test_half_gap_is_reached_where_the_code_has_no_minus_one() -> None:
    absmax = torch.tensor([0.0, 2.0])  # minus their mean: -1, 1
    dq = double_quant.quantize(absmax)
    error = (absmax.double() - double_quant.dequantize(dq).double()).abs()
    assert is_tight(error, bound_of(absmax, 256))


@given(constants, blocks_of)
def test_codes_nested_constants_and_offset_have_the_documented_layout(
    recipe: Constants, block_size: int
) -> None:
    absmax = recipe.tensor()
    dq = double_quant.quantize(absmax, block_size)
    assert (dq.codes.dtype, dq.codes.shape) == (torch.uint8, absmax.shape)
    n_blocks = -(-absmax.numel() // block_size)
    assert (dq.absmax.dtype, dq.absmax.shape) == (torch.float32, (n_blocks,))
    assert (dq.offset.dtype, dq.offset.shape, dq.block_size) == (torch.float32, (1,), block_size)
    decoded = double_quant.dequantize(dq)
    assert (decoded.dtype, decoded.shape) == (torch.float32, absmax.shape)


@given(constants)
@example(Constants(pattern="largest"))
def test_the_offset_is_the_mean_even_where_the_float32_sum_overflows(recipe: Constants) -> None:
    absmax = recipe.tensor()
    assume(absmax.numel() > 0)
    mean, rounding = mean_of(absmax)
    assert abs(double_quant.quantize(absmax).offset.item() - mean) <= rounding


def test_the_mean_is_subtracted_so_that_equal_constants_come_back_exactly() -> None:
    absmax = torch.full((512,), 0.75)
    dq = double_quant.quantize(absmax)
    assert dq.absmax.eq(0).all() and same_bits(double_quant.dequantize(dq), absmax)


@given(constants, blocks_of)
def test_every_constant_takes_its_nearest_8_bit_level(recipe: Constants, block_size: int) -> None:
    absmax = recipe.tensor()
    dq = double_quant.quantize(absmax, block_size)
    mean, rounding = mean_of(absmax)
    assert abs(dq.offset.item() - mean) <= rounding
    centred = (absmax - dq.offset).double().reshape(-1)  # the subtraction is float32's
    nested = nested_absmax_of(absmax, dq.offset, block_size).double().reshape(-1)
    normalised = torch.where(nested > 0, centred / nested, 0.0)
    distance = (normalised[:, None] - double_quant.DYNAMIC.double()).abs()  # (n, 256)
    chosen = distance.gather(1, dq.codes.reshape(-1, 1).long())[:, 0]
    assert (chosen <= distance.amin(1) + decision_slack()).all()


@given(constants, blocks_of)
@example(Constants(pattern="some zeros"), 256)
@example(Constants(pattern="all sizes", exponent=128), 256)
@example(Constants(pattern="some zeros", exponent=128, seed=1), 256)
def test_a_decoded_constant_is_never_negative_nor_infinite(
    recipe: Constants, block_size: int
) -> None:
    decoded = double_quant.dequantize(double_quant.quantize(recipe.tensor(), block_size))
    assert ((decoded >= 0) & (decoded <= LARGEST)).all()


def test_a_constant_that_would_decode_to_less_than_zero_is_clamped() -> None:
    """Zero minus the mean is between two levels, and for some means the lower one is nearer."""
    negative = []
    for zero_at in torch.linspace(0.01, 1, 100).tolist():
        dq = double_quant.quantize(torch.tensor([0.0, 0.0, 3.0, zero_at]))
        is_negative = double_quant.DYNAMIC[dq.codes.long()] * dq.absmax + dq.offset < 0
        negative.append(bool(is_negative.any()))
        decoded = double_quant.dequantize(dq)
        assert torch.where(is_negative, decoded == 0, decoded >= 0).all()
    assert any(negative)  # so the clamp is needed


def test_constants_are_decoded_with_the_codebook_that_is_stored() -> None:
    """A checkpoint of another program has its own."""
    dq = double_quant.quantize(torch.tensor([1.0, 2.0, 3.0]))
    own = double_quant.DYNAMIC.flip(0).contiguous()
    wanted = own[dq.codes.long()] * dq.absmax + dq.offset
    decoded = double_quant.dequantize(dataclasses.replace(dq, codebook=own))
    assert torch.equal(decoded, wanted), f"wanted {wanted.tolist()}, got {decoded.tolist()}"


@given(constants)
def test_the_input_is_not_modified(recipe: Constants) -> None:
    absmax = recipe.tensor()
    before = absmax.clone()
    dq = double_quant.quantize(absmax)
    parts = [part.clone() for part in (dq.codes, dq.absmax, dq.offset)]
    double_quant.dequantize(dq)
    assert same_bits(absmax, before)
    assert all(
        same_bits(part, copy)
        for part, copy in zip((dq.codes, dq.absmax, dq.offset), parts, strict=True)
    )


@pytest.mark.parametrize("negative", [-1.5, -(2.0**-149)])
def test_a_negative_constant_is_refused(negative: float) -> None:
    with pytest.raises(ValueError, match=str(negative)):
        double_quant.quantize(torch.tensor([1.0, negative, 2.0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_refused_with_their_count_and_first_index(bad: float) -> None:
    with pytest.raises(ValueError, match=r"2 of 5 .*first at index \(2,\)"):
        double_quant.quantize(torch.tensor([1.0, 2.0, bad, 3.0, bad]))


@pytest.mark.parametrize("block_size", [0, 1, 3, 100, 256.0])
def test_a_block_size_that_is_no_power_of_two_is_refused(block_size: object) -> None:
    with pytest.raises(ValueError, match="power of two"):
        double_quant.quantize(torch.ones(4), block_size)


@given(st.integers(0, 2**31), st.sampled_from([256, 1000, 2560]))
def test_decoding_equals_that_of_bitsandbytes(seed: int, n: int) -> None:
    """For our codes, because its CPU code sometimes takes the second-nearest level."""
    absmax = Constants((n,), seed=seed).tensor()
    dq = double_quant.quantize(absmax)
    theirs = bnb.dequantize_blockwise(
        dq.codes, absmax=dq.absmax, code=double_quant.DYNAMIC, blocksize=256
    )
    assert torch.equal(double_quant.dequantize(dq), theirs + dq.offset)
    _, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert same_bits(dq.absmax, state.absmax)


def test_block_size_and_code_that_are_not_given_are_those_of_quantize() -> None:
    dq = double_quant.quantize(Constants((1000,)).tensor())
    unsaid = double_quant.DoubleQuantized(dq.codes, dq.absmax, dq.offset)
    assert same_bits(double_quant.dequantize(unsaid), double_quant.dequantize(dq))


def test_double_quantized_constants_cannot_be_changed_and_equal_only_themselves() -> None:
    dq = double_quant.quantize(torch.ones(4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        dq.block_size = 128
    assert dq != copy.copy(dq)
