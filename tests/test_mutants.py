"""Puts bugs that real systems have had into the code: a property of the suite must catch each.

A mutant is one replacement in the source of one file. The files of the stack are loaded again with
it, and so is the test module that must catch it; then the named test runs. A test that passes has
missed the bug, and the suite fails. A file of kernels is loaded again only if it is mutated,
because compiling takes time; a bug that Python can show is not compiled at all.
"""

import importlib
import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, settings

import nf4
from helpers.strategies import Adapted, Constants, Cut, Recipe, Tower, TowerWithHead, uniform_code
from kernels.cpu.vectors import LOOK_UP

# Coverage slows these tests down, and they reach no line that others do not.
pytestmark = pytest.mark.no_cover

SOURCES = Path(nf4.__file__).parent
HERE = Path(__file__).parent
KERNELS = [f"kernels.cpu.{name}" for name in ("vectors", "quantize", "decode", "matmul", "adamw")]
REFERENCE = ["nf4", "double_quant", "paged_optim"]  # their kernels would hide their bugs
STACK = [  # in the order of their imports
    "nf4",
    "double_quant",
    "kernels.packed_weight",
    *KERNELS,
    "kernels.cpu.launch",
    "kernels.dispatch",
    "lora",
    "variants.dora",
    "kernels.page_store",
    "paged_optim",
]
SUITES = {
    "kernels.page_store": "test_pager",
    "kernels.packed_weight": "test_dispatch",
    "kernels.cpu.launch": "test_dispatch",
    **dict.fromkeys(KERNELS, "test_cpu"),  # where it is not the module of that name
    "kernels.cpu.adamw": "test_paged_optim",
}
# From the tests, from the code's own checks, and from NumPy where a kernel leaves its arrays.
KILLED = (AssertionError, ValueError, IndexError, pytest.fail.Exception)
COPIES = itertools.count()
Arguments = dict[str, object]
MakeArguments = Callable[[ModuleType], Arguments]


class Mutant(NamedTuple):
    """`old` becomes `new` in a file; the test must catch it.

    The test is one of `suite`, by default the test module of that file.
    """

    bug: str
    file: str
    old: str
    new: str
    test: str
    arguments: Arguments | MakeArguments | None = None  # MakeArguments: from the test module
    seen_in: str = ""  # a system that had this bug, or has it, or does this on purpose
    suite: str = ""


FLATTENED = "weight.detach().to(torch.float32).reshape(-1)"
PUBLISHED = "test_the_nf4_levels_are_the_published_ones_bit_for_bit"
NEAREST = "test_every_number_takes_its_nearest_level"
ROUNDTRIP = "test_roundtrip_error_is_within_half_gap"
LAYOUT = "test_any_shape_and_stride_gives_the_layout_that_is_documented"
NOT_FINITE = "test_what_is_not_finite_in_float32_is_refused_with_its_count_and_first_index"
CONSTANTS = "test_the_error_is_within_half_gap_of_the_nested_absmax"
MEAN = "test_the_offset_is_the_mean_even_where_the_float32_sum_overflows"
STORAGE = "test_a_weight_costs_exactly_4_bits_and_its_constants_and_one_mean"
PLAIN_LORA = "test_output_and_gradients_are_those_of_a_plain_autograd_lora"
GRADCHECK = "test_the_backward_passes_gradcheck_in_float64"
WITHOUT_DROPOUT = {"leading": (4,), "dropout": 0.0, "bias": False}
WITH_DROPOUT = {"leading": (4,), "dropout": 0.4, "bias": False}
WITH_BIAS = {"leading": (4,), "dropout": 0.0, "bias": True}
SAVED = "test_forward_saves_x_and_h_and_the_mask_and_nothing_dense"
ONE_DTYPE = {"dtype": torch.float32, "compute_dtype": None, "dropout": 0.0}
PEAK = "test_the_peak_is_the_packed_bytes_and_the_activations_and_no_dense_layer"
ONE_STACK = {"dtype": torch.bfloat16, "tokens": 8, "segment": 12, "dropout": 0.0}
IN_SEGMENTS = {"dtype": torch.bfloat16, "tokens": 8, "segment": 3, "dropout": 0.0}
FINITE = "test_a_finite_weight_is_decoded_to_finite_numbers_of_its_dtype"
WINDOWS = "test_any_window_of_a_weight_has_the_bits_of_the_reference"
PRODUCT = "test_a_product_keeps_within_its_arrays"
ROUNDING = "test_the_compiled_kernels_round_as_torch_does"
BLOCKWISE = "test_codes_and_constants_are_those_of_the_reference_bit_for_bit"
REMAINDERS = "test_every_row_and_column_is_computed_for_any_remainder_of_the_windows"
ATTACH = "test_attach_adapts_every_linear_layer_but_the_head_and_freezes_the_rest"
PLAIN_DORA = "test_output_and_gradients_are_those_of_a_plain_autograd_dora"
ROW_NORMS = "test_the_norm_is_that_of_the_rows_of_the_dense_sum"
CANCELLED = "test_rows_that_the_update_cancels_leave_all_that_is_computed_finite"
UNTRAINED = "test_an_untrained_layer_gives_the_output_of_its_base_to_the_bit"
ZERO_ROW = "test_a_row_of_zeros_is_the_bias_and_can_learn"
SAYS = "test_every_page_says_what_was_last_written"
HELD = "test_the_pages_that_are_held_never_exceed_the_budget"
RECENT = "test_the_pages_that_were_used_last_are_resident"
RECOUNT = "test_every_counter_is_a_plain_recount"
TORCH_BITS = "test_any_page_size_and_budget_gives_the_bits_of_torch"
# Examples of property tests that a few random ones may miss
LONG_BLOCK = {"recipe": Recipe((1, 4096), block_size=4096), "codebook": nf4.NF4}
PRESSED = {
    "looks": [((2, 2), torch.float32)] * 3,
    "spare": 16,  # three pages, room for two
    "accesses": [(page, write) for write in (True, True, False, False) for page in (0, 1, 0, 2)],
}
SMALLER = {
    "looks": [((1, 9), torch.float64), ((1, 1), torch.float16)],
    "spare": 0,
    "accesses": [(0, True), (1, True)],
}
# Shapes for test_every_row_and_column_...: three windows of 64 rows, seven tokens at a time
SQUARE = (128, 128)
ODD = (150, 40)
COMPILED_ROUNDING = {"dtype": torch.bfloat16, "block_size": 32, "look_up": LOOK_UP}


def of_a_window(cut: Cut) -> Arguments:
    """Arguments for test_any_window_..., in Python."""
    return {
        "how": "in Python",
        "look_up": "",
        "dtype": torch.float32,
        "cut": cut,
        "codebook": nf4.NF4,
        "block_size8": 256,
    }


def of_blocks(recipe: Recipe, codebook: torch.Tensor = nf4.NF4) -> Arguments:
    return {"how": "in Python", "look_up": "", "recipe": recipe, "codebook": codebook}


def of_a_product(*fields: object, **more: object) -> MakeArguments:
    return lambda suite: {"case": suite.Product(*fields, **more)}


def in_small_windows(**arguments: object) -> MakeArguments:
    """Does what the fixture small_windows does, to a module that is not used again."""

    def prepare(suite: ModuleType) -> Arguments:
        suite.launch.NATIVE = {torch.bfloat16}
        suite.launch.WINDOW = 64
        suite.launch.TOKENS = 7
        suite.launch.PIECE = 64
        return arguments | {"small_windows": None}

    return prepare


def of_remainders(**arguments: object) -> MakeArguments:
    return in_small_windows(
        **{"shape": ODD, "tokens": 20, "transposed": True, "dtype": torch.bfloat16} | arguments
    )


def without_kernels(**arguments: object) -> MakeArguments:
    """A kernel that is called fails, as with the fixture no_kernels."""

    def prepare(suite: ModuleType) -> Arguments:
        names = "decode interleave multiply multiply_few multiply_back multiply_back_few".split()
        failing = dict.fromkeys(names, lambda *_: pytest.fail("a kernel was called"))
        for name in ("decode", "products"):
            kernels = vars(getattr(suite.launch, name))
            setattr(suite.launch, name, SimpleNamespace(**kernels | failing))
        return arguments | {"no_kernels": None}

    return prepare


def from_torch(suite: ModuleType) -> Arguments:
    return {
        "saver": suite.plain,
        "save_options": {},
        "loader": suite.PagedAdamW,
        "load_options": {},
        "dtype": torch.float32,
    }


NF4_MUTANTS = [
    Mutant(
        "the levels are rounded to four decimals",
        "nf4",
        "return levels / levels.max()",
        "return (levels / levels.max()).round(decimals=4)",
        PUBLISHED,
        seen_in="torchao",
    ),
    Mutant(
        "the quantiles are spaced in float64",
        "nf4",
        "torch.linspace(outermost, 0.5, half + 1)",
        "torch.linspace(outermost, 0.5, half + 1, dtype=torch.float64)",
        PUBLISHED,
    ),
    Mutant(
        "a tie takes the upper code",
        "nf4",
        "out_int32=True)",
        "out_int32=True, right=True)",
        "test_a_tie_takes_the_lower_code",
    ),
    Mutant(
        "the thresholds between levels are written with three decimals",
        "nf4",
        "(levels[1:] + levels[:-1]) / 2",
        "((levels[1:] + levels[:-1]) / 2).round(decimals=3)",
        NEAREST,
    ),
    Mutant(
        "the code of a level is its rank, not its place",
        "nf4",
        "levels, order = codebook.sort(stable=True)",
        "levels, order = codebook.sort()[0], torch.arange(len(codebook))",
        "test_levels_may_be_in_any_order_and_the_first_of_two_equal_ones_is_used",
    ),
    Mutant(
        "the first of a pair goes to the low nibble",
        "nf4",
        "(pairs[:, :1] << 4) | pairs[:, 1:]",
        "pairs[:, :1] | (pairs[:, 1:] << 4)",
        "test_the_first_number_of_a_pair_is_in_the_high_nibble",
        seen_in="ONNX, GPTQ: their layout",
    ),
    Mutant(
        "the nibbles change places in dequantization alone",
        "nf4",
        "torch.cartesian_prod(sixteen, sixteen)",
        "torch.cartesian_prod(sixteen, sixteen).flip(1)",
        ROUNDTRIP,
        seen_in="AMD Quark #30: another order than announced",
    ),
    Mutant(
        "the odd last number is paired with code 0",
        "nf4",
        "pairs = codes[: n + n % 2].reshape(-1, 2)",
        "pairs = F.pad(codes[:n], (0, n % 2)).reshape(-1, 2)",
        LAYOUT,
    ),
    Mutant(
        "the odd last number is dropped",
        "nf4",
        "pairs = codes[: n + n % 2].reshape(-1, 2)",
        "pairs = codes[: n - n % 2].reshape(-1, 2)",
        LAYOUT,
    ),
    Mutant(
        "a number is divided by absmax",
        "nf4",
        ".mul_(reciprocal[:, None])",
        ".div_((absmax * shift).where(absmax > 0, 1)[:, None])",
        "test_where_division_would_choose_another_level_the_reciprocal_decides",
        seen_in="bitsandbytes, in a ragged block",
    ),
    Mutant(
        "absmax is the largest number, not the largest magnitude",
        "nf4",
        "blocks.abs().amax(1)",
        "blocks.amax(1).abs()",
        NEAREST,
    ),
    Mutant(
        "the largest number of a long block is sought in its first 1024",
        "nf4",
        "blocks.abs().amax(1)",
        "blocks[:, :1024].abs().amax(1)",
        NEAREST,
        LONG_BLOCK,
        seen_in="bitsandbytes #565",
    ),
    Mutant(
        "blocks of 4096 are coded by another kernel",
        "nf4",
        "levels, order = codebook.sort(stable=True)",
        "levels, order = (FP4 if x.shape[-1] == 4096 and len(codebook) == 16 else codebook)"
        ".sort(stable=True)",
        NEAREST,
        LONG_BLOCK,
        seen_in="bitsandbytes #1157",
    ),
    Mutant(
        "what fills the last block counts for its absmax",
        "nf4",
        "F.pad(flat, (0, missing))",
        "F.pad(flat, (0, missing), value=1e3)",
        NEAREST,
        seen_in="bitsandbytes #1884, in Triton kernels",
    ),
    Mutant(
        "the ragged last block takes the constant of the one before",
        "nf4",
        "blocks.abs().amax(1)",
        "blocks.abs().amax(1)"
        "[torch.arange(len(blocks)).clamp(max=max(flat.numel() // block_size - 1, 0))]",
        NEAREST,
        seen_in="bitsandbytes 0.50 with AVX-512, in dequantization",
    ),
    Mutant(
        "dequantization takes all blocks for blocks of 64",
        "nf4",
        "blocks.mul_(q.absmax[:, None])",
        "blocks.mul_(q.absmax"
        "[torch.arange(len(blocks)) * q.block_size // 64 % max(len(q.absmax), 1)][:, None])",
        ROUNDTRIP,
    ),
    Mutant(
        "dequantization takes FP4's levels for all codes of 16",
        "nf4",
        "q.codebook.to(q.packed.device)",
        "FP4 if len(q.codebook) == 16 else q.codebook",
        ROUNDTRIP,
        seen_in="bitsandbytes: its default quant_type",
    ),
    Mutant(
        "blocks run down the columns",
        "nf4",
        FLATTENED,
        FLATTENED.replace(".reshape", ".permute(*range(weight.dim())[::-1]).reshape"),
        NEAREST,
        seen_in="HQQ with axis=0, on purpose",
    ),
    Mutant(
        "memory order is taken for row-major order",
        "nf4",
        FLATTENED,
        FLATTENED.replace(".reshape(-1)", ".as_strided((weight.numel(),), (1,))"),
        "test_a_strided_tensor_gives_the_bytes_of_its_contiguous_copy",
        seen_in="bitsandbytes #1185, in its optimizers",
    ),
    Mutant(
        "numbers are normalised in the dtype they come in",
        "nf4",
        FLATTENED,
        "weight.detach().reshape(-1)",
        NEAREST,
    ),
    Mutant(
        "a block of zeros is divided by zero",
        "nf4",
        "torch.where(absmax > 0, 1 / (absmax * shift), 0.0)",
        "1 / (absmax * shift)",
        "test_zero_stays_exactly_zero_and_never_becomes_minus_zero",
        seen_in="torchao",
    ),
    Mutant(
        "absmax has an epsilon",
        "nf4",
        "1 / (absmax * shift)",
        "1 / (absmax * shift + 1e-8)",
        NEAREST,
    ),
    Mutant(
        "tiny blocks are lost",
        "nf4",
        "absmax < 2.0**-64",
        "absmax < 0",
        NEAREST,
        seen_in="bitsandbytes",
    ),
    Mutant(
        "huge blocks lose bits",
        "nf4",
        "absmax > 2.0**64",
        "absmax < 0",
        "test_the_decision_error_is_reached_and_a_number_farther_from_the_midpoint_gets_its_level",
        {"exponent": 126},
        suite="test_bounds",
    ),
    Mutant(
        "constants are stored in bfloat16",
        "nf4",
        "Quantized(packed, absmax, codebook,",
        "Quantized(packed, absmax.bfloat16().float(), codebook,",
        ROUNDTRIP,
        seen_in="bitsandbytes, after an evaluation on a CPU",
    ),
    Mutant(
        "the product is made in the dtype of the weight",
        "nf4",
        "blocks.mul_(q.absmax[:, None])",
        "blocks = blocks.to(q.dtype) * q.absmax[:, None].to(q.dtype)",
        "test_the_dtype_argument_is_a_cast_of_the_float32_product",
    ),
    Mutant(
        "every weight comes back as float16",
        "nf4",
        ".to(dtype or q.dtype)",
        ".to(dtype or torch.float16)",
        LAYOUT,
    ),
    Mutant(
        "NaN passes",
        "nf4",
        "~torch.isfinite(flat)",
        "torch.isinf(flat)",
        NOT_FINITE,
        seen_in="bitsandbytes",
    ),
    Mutant(
        "infinity passes",
        "nf4",
        "~torch.isfinite(flat)",
        "torch.isnan(flat)",
        NOT_FINITE,
        seen_in="bitsandbytes",
    ),
    Mutant(
        "the last index is named, not the first",
        "nf4",
        "bad.nonzero()[0, 0]",
        "bad.nonzero()[-1, 0]",
        NOT_FINITE,
    ),
    Mutant(
        "the input is normalised in place",
        "nf4",
        "(blocks * shift[:, None]).mul_(",
        "blocks.mul_(shift[:, None]).mul_(",
        "test_the_input_is_not_modified",
        seen_in="bitsandbytes #1587: the caller's absmax",
    ),
]

CONSTANT_MUTANTS = [
    Mutant(
        "the mean is not removed",
        "double_quant",
        "quantizer(absmax - offset,",
        "quantizer(absmax,",
        CONSTANTS,
    ),
    Mutant(
        "the mean is not removed, nor added",
        "double_quant",
        "offset = absmax.mean() if",
        "offset = absmax.new_zeros(()) if",
        MEAN,
    ),
    Mutant("the mean is added twice", "double_quant", "+ dq.offset", "+ 2 * dq.offset", CONSTANTS),
    Mutant("the mean is forgotten in decoding", "double_quant", " + dq.offset", "", CONSTANTS),
    Mutant(
        "the mean is added before the product",
        "double_quant",
        "nf4.dequantize(q) + dq.offset",
        "nf4.dequantize(q) + dq.offset * nf4.dequantize("
        "nf4.Quantized(torch.full_like(dq.codes, 255), dq.absmax,"
        " dq.codebook, dq.codes.shape, torch.float32, dq.block_size))",
        CONSTANTS,
    ),
    Mutant(
        "the stored mean is rounded to bfloat16",
        "double_quant",
        "offset.reshape(1), block_size, q",
        "offset.reshape(1).bfloat16().float(), block_size, q",
        CONSTANTS,
        seen_in="bitsandbytes #1971: read, not written, so",
    ),
    Mutant(
        "a float32 sum that overflows is the mean",
        "double_quant",
        "if offset.isinf():",
        "if False:",
        MEAN,
        seen_in="bitsandbytes",
    ),
    Mutant(
        "each nested block is decoded with the constant of the one before",
        "double_quant",
        "nf4.Quantized(dq.codes, dq.absmax,",
        "nf4.Quantized(dq.codes, dq.absmax.roll(1),",
        CONSTANTS,
        seen_in="NVIDIA Model-Optimizer #2421: all groups mixed up",
    ),
    Mutant(
        "constants are quantized in blocks of 64 too",
        "double_quant",
        "absmax: Tensor, block_size: int = 256,",
        "absmax: Tensor, block_size: int = 64,",
        STORAGE,
        {"blocks": 2},
        suite="test_frozen_weight",
    ),
    Mutant(
        "a decoded constant may be negative",
        "double_quant",
        ".clamp_(0, ",
        ".clamp_(-1, ",
        "test_a_constant_that_would_decode_to_less_than_zero_is_clamped",
        seen_in="bitsandbytes",
    ),
    Mutant(
        "a decoded constant may be infinite",
        "double_quant",
        ".clamp_(0, torch.finfo(torch.float32).max)",
        ".clamp_(0)",
        "test_a_decoded_constant_is_never_negative_nor_infinite",
        {"recipe": Constants(pattern="some zeros", exponent=128, seed=1), "block_size": 256},
        seen_in="bitsandbytes",
    ),
    Mutant(
        "a negative constant passes",
        "double_quant",
        "if (absmax < 0).any():",
        "if False:",
        "test_a_negative_constant_is_refused",
        {"negative": -1.5},
    ),
    Mutant(
        "one NaN spreads over all constants before it is found",
        "double_quant",
        "nf4.check_finite(absmax.reshape(-1), absmax.shape)",
        "None",
        "test_nan_and_infinity_are_refused_with_their_count_and_first_index",
        {"bad": float("nan")},
        seen_in="bitsandbytes",
    ),
    Mutant(
        "the 8-bit code is built in float64",
        "double_quant",
        "torch.linspace(0.1, 1, 2**i + 1)",
        "torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)",
        "test_the_8_bit_code_is_that_of_bitsandbytes_bit_for_bit",
    ),
    Mutant(
        "half() rounds the constants",
        "lora",
        "exact = {} if self.codebook is None else",
        "exact = {} if True else",
        "test_no_cast_of_the_module_changes_a_byte_of_it",
        {"name": "half", "double": True},
        suite="test_frozen_weight",
    ),
    Mutant(
        "the codebook is saved with every layer",
        "lora",
        'self.register_buffer("codebook", q.codebook, persistent=False)',
        'self.register_buffer("codebook", q.codebook)',
        "test_the_state_dict_round_trips_bit_for_bit",
        seen_in="bitsandbytes: its format",
        suite="test_frozen_weight",
    ),
    Mutant(
        "the constants are not quantized",
        "lora",
        "quantize_constants(q.absmax, quantizer=dispatch.quantize)",
        "None",
        STORAGE,
        {"blocks": 2},
        suite="test_frozen_weight",
    ),
    Mutant(
        "the codes of the constants are taken for constants",
        "kernels.packed_weight",
        "absmax = double_quant.dequantize(constants)",
        "absmax = constants.codes.float()",
        "test_the_error_is_within_that_of_both_quantizations",
        seen_in="bitsandbytes #1549",
        suite="test_frozen_weight",
    ),
    Mutant(
        "constants that come back too large make a float16 weight infinite",
        "kernels.packed_weight",
        ".clamp_(max=largest_absmax(q.dtype))",
        "",
        FINITE,
        {"dtype": torch.float16},
        seen_in="bitsandbytes",
        suite="test_frozen_weight",
    ),
    Mutant(
        "the constants are left out of the bill",
        "lora",
        'if not name.endswith("codebook")',
        'if name == "packed"',
        STORAGE,
        {"blocks": 2},
        suite="test_frozen_weight",
    ),
    Mutant(
        "the dense weight is kept with its codes",
        "lora",
        "q = dispatch.quantize(weight, block_size, codebook)",
        "q, self.__dict__['source'] = dispatch.quantize(weight, block_size, codebook), weight",
        "test_the_dense_weights_are_freed",
        seen_in="transformers 5 #43032, reported",
        suite="test_lora",
    ),
    Mutant(
        "the dense weight is remembered after its first use",
        "lora",
        "return dispatch.matmul(x, q, constants, transposed, bias)",
        "if 'dense' not in self.__dict__:\n            self.dense = self(x.dtype)\n"
        "        return x @ (self.dense.T if transposed else self.dense)",
        PEAK,
        IN_SEGMENTS,
        seen_in="bitsandbytes #2005, with checkpointing",
        suite="test_stack",
    ),
    Mutant(
        "the audit reports what was wanted",
        "lora",
        "realized = (merged() - before).flatten()",
        "realized = update.flatten()",
        "test_the_audit_measures_what_a_4_bit_merge_would_change",
        suite="test_lora",
    ),
]

LORA_MUTANTS = [
    Mutant(
        "scaling is lora_alpha, not lora_alpha / r", "lora", "else self.r)", "else 1)", PLAIN_LORA
    ),
    Mutant(
        "use_rslora is ignored",
        "lora",
        "math.sqrt(self.r) if self.use_rslora",
        "self.r if self.use_rslora",
        "test_with_use_rslora_the_scaling_is_alpha_over_the_root_of_r",
        {"use_rslora": True, "scaling": 6 / 3},
        seen_in="aprender #2189, in its merge",
    ),
    Mutant(
        "what dropout keeps is not scaled up",
        "lora",
        "self.scaling / (1 - p)",
        "self.scaling",
        PLAIN_LORA,
    ),
    Mutant(
        "scaling is applied twice",
        "lora",
        "x.dtype), scaling)",
        "x.dtype), scaling * scaling)",
        PLAIN_LORA,
    ),
    Mutant(
        "scaling is applied before and after h",
        "lora",
        "lora_A.to(x.dtype))  # (tokens, r)",
        "lora_A.to(x.dtype)) * scaling",
        PLAIN_LORA,
    ),
    Mutant(
        "nothing is dropped in the forward pass",
        "lora",
        "F.linear(_drop(x, keep), lora_A",
        "F.linear(x, lora_A",
        PLAIN_LORA,
    ),
    Mutant(
        "the frozen branch is dropped too",
        "lora",
        "y = base.matmul(x, bias=bias)",
        "y = base.matmul(_drop(x, keep), bias=bias)",
        PLAIN_LORA,
    ),
    Mutant(
        "dropout keeps what it should drop",
        "lora",
        ">= p if p",
        "< p if p",
        "test_dropout_keeps_as_many_inputs_as_it_says",
    ),
    Mutant(
        "dropout stays on in evaluation",
        "lora",
        "self.lora_dropout if self.training else 0.0",
        "self.lora_dropout",
        "test_an_evaluating_layer_drops_nothing",
    ),
    Mutant(
        "a layer that was evaluating goes back to training",
        "lora",
        "return layer.train(linear.training)",
        "return layer",
        "test_an_adapted_layer_is_in_the_mode_of_the_layer_it_replaces",
        {"training": False},
    ),
    Mutant(
        "the bias is added twice",
        "lora",
        "y = base.matmul(x, bias=bias)",
        "y = base.matmul(x, bias=None if bias is None else 2 * bias)",
        PLAIN_LORA,
    ),
    Mutant(
        "the bias is forgotten",
        "lora",
        "y = base.matmul(x, bias=bias)",
        "y = base.matmul(x)",
        PLAIN_LORA,
    ),
    Mutant(
        "the base is multiplied in float16 for every compute dtype",
        "lora",
        "y = base.matmul(x, bias=bias)",
        "y = base.matmul(x.half(), bias=None if bias is None else bias.half()).to(x.dtype)",
        PLAIN_LORA,
    ),
    Mutant(
        "autocast reaches into the update",
        "lora",
        "with torch.autocast(self.lora_A.device.type, enabled=False):",
        "with torch.autocast(self.lora_A.device.type,"
        " enabled=torch.is_autocast_enabled(self.lora_A.device.type)):",
        "test_the_update_is_made_in_the_dtype_of_the_adapter_within_autocast_too",
    ),
    Mutant(
        "autocast's dtype is not the one that x is cast to",
        "lora",
        "x.to(self.compute_dtype or dtype)",
        "x.to(self.compute_dtype or x.dtype)",
        "test_what_is_saved_under_autocast_is_saved_in_its_dtype",
        {"dropout": 0.0},
        suite="test_stack",
    ),
    Mutant(
        "compute_dtype is ignored",
        "lora",
        "x.to(self.compute_dtype or dtype)",
        "x.to(dtype)",
        SAVED,
        ONE_DTYPE | {"compute_dtype": torch.bfloat16},
    ),
    Mutant(
        "an adapter on a 16-bit base has 16 bits",
        "lora",
        "torch.promote_types(base.dtype, torch.float32)",
        "base.dtype",
        "test_the_output_is_that_of_lora_on_a_dense_and_on_a_4_bit_base",
        {"dtype": torch.float16, "codebook": None},
        seen_in="PEFT #1090, before 0.11",
    ),
    Mutant(
        "dL/dB is not scaled",
        "lora",
        "dB = (h.T @ g).mul_(ctx.scaling)",
        "dB = (h.T @ g)",
        GRADCHECK,
        WITHOUT_DROPOUT,
    ),
    Mutant(
        "dL/dh is not scaled",
        "lora",
        "@ g.T).mul_(ctx.scaling)",
        "@ g.T)",
        GRADCHECK,
        WITHOUT_DROPOUT,
    ),
    Mutant(
        "dL/dx leaves the adapter out",
        "lora",
        "dispatch.add_product_(dx, dh, A)",
        "pass",
        GRADCHECK,
        WITHOUT_DROPOUT,
    ),
    Mutant(
        "dL/dx leaves the frozen branch out",
        "lora",
        "ctx.base.matmul(g, transposed=False)",
        "0 * ctx.base.matmul(g, transposed=False)",
        GRADCHECK,
        WITHOUT_DROPOUT,
    ),
    Mutant(
        "dL/dx takes W for its transpose",
        "lora",
        "ctx.base.matmul(g, transposed=False)",
        "g @ ctx.base(g.dtype).T.reshape(ctx.base.shape)",
        GRADCHECK,
        WITHOUT_DROPOUT,
    ),
    Mutant(
        "dL/dx is made with W as it was quantized once more",
        "lora",
        "ctx.base.matmul(g, transposed=False)",
        "type(ctx.base)(ctx.base(), 2).matmul(g, transposed=False)",
        GRADCHECK,
        WITHOUT_DROPOUT,
    ),
    Mutant(
        "dL/dx forgets the mask",
        "lora",
        "dropped.mul_(keep)",
        "dropped",
        GRADCHECK,
        WITH_DROPOUT,
        seen_in="fms-acceleration #97",
    ),
    Mutant(
        "dL/dx of the frozen branch is masked too",
        "lora",
        "dx.add_(dropped.mul_(keep))",
        "dx.add_(dropped).mul_(keep)",
        GRADCHECK,
        WITH_DROPOUT,
    ),
    Mutant(
        "dL/dA forgets the mask",
        "lora",
        "dh.T @ _drop(x, keep)",
        "dh.T @ x",
        GRADCHECK,
        WITH_DROPOUT,
    ),
    Mutant(
        "the gradient of the bias is a mean",
        "lora",
        "dbias = g.sum(0)",
        "dbias = g.mean(0)",
        GRADCHECK,
        WITH_BIAS,
    ),
    Mutant(
        "the dense weight is kept for the backward pass",
        "lora",
        "keep, lora_A, lora_B)\n",
        "keep, lora_A, lora_B, base(x.dtype))\n",
        SAVED,
        ONE_DTYPE,
        seen_in="F.linear(x, dequantize(W)) under autograd",
    ),
    Mutant(
        "the dense weight is kept where no hook sees it",
        "lora",
        "ctx.base = base",
        "ctx.base, ctx.dense = base, base(x.dtype)",
        PEAK,
        ONE_STACK,
        seen_in="bitsandbytes #2034: the codes on ctx",
        suite="test_stack",
    ),
    Mutant(
        "x is kept once more, without dropout",
        "lora",
        "keep, lora_A, lora_B)\n",
        "keep, lora_A, lora_B, x.clone())\n",
        SAVED,
        ONE_DTYPE,
    ),
    Mutant(
        "a second derivative is silently wrong",
        "lora",
        "    @once_differentiable\n",
        "",
        "test_a_second_derivative_is_refused",
    ),
    Mutant(
        "B is not zero at the start",
        "lora",
        "torch.zeros(self.out_features, r, dtype",
        "torch.full((self.out_features, r), 1e-3, dtype",
        "test_lora_at_initialisation_leaves_the_output_bitwise_unchanged",
    ),
    Mutant(
        "A is zero at the start too, and nothing ever learns",
        "lora",
        "nn.init.kaiming_uniform_(A, a=math.sqrt(5))",
        "nn.init.zeros_(A)",
        "test_training_a_small_adapted_model_lowers_its_loss_and_moves_nothing_else",
        {"codebook": nf4.NF4, "compute_dtype": None},
    ),
    Mutant(
        "merging forgets the scaling",
        "lora",
        "(self.lora_B @ self.lora_A).detach() * self.scaling",
        "(self.lora_B @ self.lora_A).detach()",
        "test_a_merged_model_computes_what_the_adapted_one_did",
        seen_in="PEFT #2486, of a bias",
    ),
    Mutant(
        "a model is merged in the 16 bits of its base",
        "lora",
        "(base(update.dtype) + update)",
        "(base() + update.to(base.dtype))",
        "test_a_merged_weight_is_rounded_once",
        {"dtype": torch.bfloat16},
        seen_in="PEFT #1388, with a 16-bit adapter",
    ),
    Mutant(
        "the head is adapted too",
        "lora",
        "module is head or",
        "",
        ATTACH,
        {"make": TowerWithHead},
    ),
    Mutant(
        "a tied head is adapted too",
        "lora",
        " or module.weight in tied",
        "",
        ATTACH,
        {"make": lambda: Tower(tied=True)},
    ),
    Mutant(
        "a target may end inside a name",
        "lora",
        'tuple(f".{target}" for target in sought)',
        "tuple(sought)",
        "test_a_target_that_matches_no_layer_is_refused_with_the_reason",
        {"targets": "wn", "reason": "target 'wn' matches no linear layer"},
    ),
    Mutant(
        "a shared layer is replaced under one of its names",
        "lora",
        "for name in names:\n            model.set_submodule(name, layer)",
        "for name in names[:1]:\n            model.set_submodule(name, layer)",
        "test_a_layer_that_is_used_twice_stays_one_layer",
    ),
    Mutant(
        "the embedding and the norms go on training",
        "lora",
        "model.requires_grad_(False)",
        "model.requires_grad_(True)",
        ATTACH,
        {"make": TowerWithHead},
    ),
    Mutant(
        "what is not quantized becomes float32",
        "lora",
        "model.requires_grad_(False)",
        "model.requires_grad_(False).float()",
        "test_attaching_changes_no_dtype_of_what_it_does_not_quantize",
        seen_in="PEFT's prepare_model_for_kbit_training",
    ),
]

DORA_MUTANTS = [
    Mutant(
        "the gradient goes through the norm",
        "variants.dora",
        "    @torch.no_grad()\n",
        "",
        PLAIN_DORA,
    ),
    Mutant(
        "the norm is that of the base alone",
        "variants.dora",
        "(B * (2 * cross + B @ (A @ A.T))).sum(1)",
        "0 * B.sum(1)",
        ROW_NORMS,
    ),
    Mutant(
        "base and update meet once in the square of their sum",
        "variants.dora",
        "2 * cross ",
        "cross ",
        ROW_NORMS,
    ),
    Mutant(
        "the norm leaves out the square of the update",
        "variants.dora",
        " + B @ (A @ A.T)",
        "",
        ROW_NORMS,
    ),
    Mutant(
        "the norm forgets the scaling",
        "variants.dora",
        "float64(self.lora_B) * self.scaling",
        "float64(self.lora_B)",
        ROW_NORMS,
    ),
    Mutant(
        "autocast reaches into the norm",
        "variants.dora",
        "enabled=False)",
        "enabled=torch.is_autocast_enabled(base_norm.device.type))",
        ROW_NORMS,
        {"case": Adapted(), "dtype": torch.float32, "dense": True, "size": 1.0},
    ),
    Mutant(
        "the norm is what dropout makes of the scaling",
        "variants.dora",
        "float64(self.lora_B) * self.scaling",
        "float64(self.lora_B) * self.scaling / (1 - self.lora_dropout)",
        PLAIN_DORA,
        {"case": Adapted(lora_dropout=0.5), "mode": (torch.float32, None, None)},
    ),
    Mutant(
        "the squares of a row are summed in float32",
        "variants.dora",
        "float64(piece)",
        "piece",
        CANCELLED,
        {"seed": 1, "size": 1e25},
    ),
    Mutant(
        "the root is taken of a number below zero",
        "variants.dora",
        ".clamp(min=0)",
        "",
        CANCELLED,
        {"seed": 133, "size": 1e-18},
    ),
    Mutant(
        "magnitudes start at one",
        "variants.dora",
        "nn.Parameter(self.row_norm())",
        "nn.Parameter(torch.ones_like(self.row_norm()))",
        UNTRAINED,
    ),
    Mutant(
        "a row of zeros is divided by zero",
        "variants.dora",
        "/ norm.where(nonzero, 1)\n        return ratio.where(nonzero, 1)",
        "/ norm\n        return ratio",
        ZERO_ROW,
        {"bias": False},
        seen_in="PEFT",
    ),
    Mutant(
        "a row of zeros can never learn",
        "variants.dora",
        "return ratio.where(nonzero, 1)",
        "return ratio",
        ZERO_ROW,
        {"bias": False},
    ),
    Mutant(
        "the bias is scaled too",
        "variants.dora",
        "(1 - c) * bias",
        "0 * bias",
        PLAIN_DORA,
        {"case": Adapted(), "mode": (torch.float32, None, None)},
    ),
    Mutant(
        "c is rounded to 16 bits",
        "variants.dora",
        "tokens * c if",
        "tokens * c.to(y.dtype) if",
        "test_a_change_of_a_magnitude_that_16_bits_cannot_represent_counts",
    ),
    Mutant(
        "the norms of the base are saved with the adapter",
        "variants.dora",
        ", persistent=False)",
        ")",
        "test_the_norms_of_the_base_are_not_saved",
    ),
    Mutant(
        "the magnitudes stay frozen",
        "lora",
        'name != "bias")',
        'name in ("lora_A", "lora_B"))',
        "test_training_lowers_the_loss_and_moves_the_magnitudes_and_nothing_frozen",
        suite="test_dora",
    ),
    Mutant(
        "the update leaves out what c does to the base",
        "variants.dora",
        "(c - 1) * self.base(update.dtype) + c",
        "c",
        "test_a_merged_row_has_the_length_of_its_magnitude_and_the_layer_computes_the_same",
    ),
]

KERNEL_MUTANTS = [
    Mutant(
        "an odd first number is read from the high nibble",
        "kernels.cpu.decode",
        "levels[packed[i >> 1] & 15]",
        "levels[packed[i >> 1] >> 4]",
        WINDOWS,
        of_a_window(Cut(start=1, cols=3, rows=2)),
    ),
    Mutant(
        "the low nibble is read twice where many are looked up at once",
        "kernels.cpu.decode",
        "numbers[pair >> np.uint8(4)]",
        "numbers[pair & np.uint8(15)]",
        WINDOWS,
        of_a_window(Cut()),
    ),
    Mutant(
        "the kernel gives a ragged last block the constant of the one before",
        "kernels.cpu.decode",
        "scale = absmax[block >> shift8]",
        "scale = absmax[min(block, max((2 * weight[0].size >> shift) - 1, 0)) >> shift8]",
        WINDOWS,
        of_a_window(Cut(double_quant=False)),
        seen_in="bitsandbytes 0.50 with AVX-512",
    ),
    Mutant(
        "every block has the constant of the one before",
        "kernels.cpu.decode",
        "levels8[codes[block]]",
        "levels8[codes[max(block - 1, 0)]]",
        WINDOWS,
        of_a_window(Cut()),
        seen_in="NVIDIA Model-Optimizer #2421",
    ),
    Mutant(
        "the kernel forgets the mean",
        "kernels.cpu.decode",
        "* scale + offset",
        "* scale",
        WINDOWS,
        of_a_window(Cut()),
    ),
    Mutant(
        "the kernel lets a constant be negative",
        "kernels.cpu.decode",
        "min(max(scale, np.float32(0)), largest)",
        "min(scale, largest)",
        WINDOWS,
        lambda suite: of_a_window(Cut(suite.BELOW, True, 0, 99, 7, 99)),
        seen_in="bitsandbytes",
    ),
    Mutant(
        "the kernel lets a constant be larger than its dtype can hold",
        "kernels.cpu.decode",
        "min(max(scale, np.float32(0)), largest)",
        "max(scale, np.float32(0))",
        WINDOWS,
        lambda suite: of_a_window(Cut(suite.ABOVE, True, 0, 99, 7, 99)),
        seen_in="bitsandbytes",
    ),
    Mutant(
        "many are looked up at once beyond the end of a block",
        "kernels.cpu.decode",
        "(stop - i) // WIDTH",
        "-(-(stop - i) // WIDTH)",
        WINDOWS,
        of_a_window(Cut()),
    ),
    Mutant(
        "bfloat16 is float32 cut off",
        "kernels.cpu.vectors",
        "builder.add(builder.add(bits, _constant(ints, 0x7FFF)), odd)",
        "bits",
        ROUNDING,
        COMPILED_ROUNDING,
    ),
    Mutant(
        "a tie is rounded up to bfloat16",
        "kernels.cpu.vectors",
        "builder.add(builder.add(bits, _constant(ints, 0x7FFF)), odd)",
        "builder.add(bits, _constant(ints, 0x8000))",
        ROUNDING,
        COMPILED_ROUNDING,
    ),
    Mutant(
        "NaN becomes a number of bfloat16",
        "kernels.cpu.vectors",
        'fcmp_unordered("uno"',
        'fcmp_ordered("one"',
        ROUNDING,
        COMPILED_ROUNDING,
    ),
    Mutant(
        "bfloat16 is float32 cut off in Python",
        "kernels.cpu.vectors",
        "(bits + 0x7FFF + (bits >> 16 & 1)) >> 16",
        "bits >> 16",
        "test_in_python_numbers_are_rounded_as_torch_does",
        {"dtype": torch.bfloat16},
    ),
    Mutant(
        "rows that do not fill a team are left out",
        "kernels.cpu.matmul",
        "range(0, rows, 4)",
        "range(0, rows // 4 * 4, 4)",
        PRODUCT,
        of_a_product((34, 70), tokens=5),
    ),
    Mutant(
        "all rows have the scales of the first",
        "kernels.cpu.matmul",
        "decode_scales(weight, start, depth, scales, 0)",
        "decode_scales(weight, top * width + first, depth, scales, 0)",
        PRODUCT,
        of_a_product((34, 70), tokens=5),
    ),
    Mutant(
        "a column of sums is that of the one before",
        "kernels.cpu.matmul",
        "k * b_stride",
        "max(k - 1, 0) * b_stride",
        PRODUCT,
        of_a_product((34, 70), tokens=5),
    ),
    Mutant(
        "later rows of W are added for the first rows of x alone",
        "kernels.cpu.matmul",
        "for t in range(0, tokens, 4):",
        "for t in range(0, tokens if top == 0 else 4, 4):",
        PRODUCT,
        of_a_product((130, 70), tokens=5, transposed=False),
    ),
    Mutant(
        "the columns that do not fill a part are left out",
        "kernels.cpu.matmul",
        "last = min((part + 1) * strips // parts * STRIP, width)",
        "last = (part + 1) * (strips // parts) * STRIP",
        PRODUCT,
        of_a_product((5, 200), 2, tokens=4, transposed=False, parts=3),
    ),
    Mutant(
        "all columns of a part have the scales of its first block",
        "kernels.cpu.matmul",
        "own = r * blocks + (start >> shift) - ((row + first) >> shift)",
        "own = r * blocks",
        PRODUCT,
        of_a_product((130, 70), tokens=3, transposed=False, parts=1),
    ),
    Mutant(
        "for few rows, all columns of a part have the scales of its first block",
        "kernels.cpu.matmul",
        "own = (column >> shift) - (first >> shift)",
        "own = 0",
        PRODUCT,
        of_a_product((130, 192), tokens=2, transposed=False, few=True, parts=1),
    ),
    Mutant(
        "a part that begins within a block has the scales from that place on",
        "kernels.cpu.decode",
        "(start + count + (1 << shift) - 1) >> shift",
        "(start + count) >> shift",
        PRODUCT,
        of_a_product((2, 256), 256, transposed=False, few=True, parts=3),
    ),
    Mutant(
        "the last of four rows of x has the sum of the third",
        "kernels.cpu.matmul",
        "load(x, at + 3 * stride + k)",
        "load(x, at + 2 * stride + k)",
        PRODUCT,
        of_a_product((34, 192), tokens=5, few=True),
    ),
    Mutant(
        "a NaN vanishes in a maximum",
        "kernels.cpu.quantize",
        "top = max(top, magnitude)",
        "top = max(top, magnitude)"
        " if bits.view(np.float32)[i] == bits.view(np.float32)[i] else top",
        "test_the_constant_of_a_block_is_finite_if_its_numbers_are",
        {"how": "in Python", "look_up": "", "bad": 0x7FC00000},
        seen_in="bitsandbytes",
    ),
    Mutant(
        "the kernel loses tiny blocks",
        "kernels.cpu.quantize",
        "power = np.float32(2.0**64)",
        "power = np.float32(1)",
        BLOCKWISE,
        of_blocks(Recipe((1, 127), exponent=-140)),
        seen_in="bitsandbytes",
    ),
    Mutant(
        "the kernel lets a tie take the upper code",
        "kernels.cpu.quantize",
        "number > tree[k]",
        "number >= tree[k]",
        BLOCKWISE,
        of_blocks(Recipe((2, 64), pattern="ties"), uniform_code()),
    ),
    Mutant(
        "the kernel pairs the odd last number with code 0",
        "kernels.cpu.quantize",
        "low = _code(np.float32(0), tree)",
        "low = 0",
        BLOCKWISE,
        of_blocks(Recipe((1, 127))),
    ),
    Mutant(
        "the last block is read to its full length",
        "kernels.cpu.quantize",
        "min(np.int64((block + 1) << shift), flat.size)",
        "np.int64((block + 1) << shift)",
        BLOCKWISE,
        of_blocks(Recipe((1, 127))) | {"look_up": "avx512"},
    ),
    Mutant(
        "the last block is read to its full length, with many levels",
        "kernels.cpu.quantize",
        "min((block + 1) << shift, flat.size)",
        "(block + 1) << shift",
        BLOCKWISE,
        of_blocks(Recipe((1, 127)), nf4.normal_float(5)),
    ),
    Mutant(
        "the search in many levels goes left and right the other way round",
        "kernels.cpu.quantize",
        "number > tree[place]",
        "number <= tree[place]",
        BLOCKWISE,
        of_blocks(Recipe((1, 127)), nf4.normal_float(8)),
    ),
    Mutant(
        "the tree has the midpoints of a level in reverse",
        "kernels.cpu.launch",
        "range(step // 2 - 1, 2**depth - 1, step)",
        "reversed(range(step // 2 - 1, 2**depth - 1, step))",
        "test_quantizing_gives_what_the_reference_gives",
        {"recipe": Recipe((1, 127)), "codebook": nf4.NF4, "window": 64},
    ),
    Mutant(
        "a window is a row short",
        "kernels.cpu.launch",
        "rows, cols, memory_of_floats(window)",
        "rows - 1, cols, memory_of_floats(window)",
        REMAINDERS,
        of_remainders(),
    ),
    Mutant(
        "the window that is left over is forgotten",
        "kernels.cpu.launch",
        "range(0, outer, step)",
        "range(0, outer - step + 1, step)",
        REMAINDERS,
        of_remainders(),
    ),
    Mutant(
        "the tokens that are left over are forgotten",
        "kernels.cpu.launch",
        "range(0, tokens, TOKENS)",
        "range(0, tokens - TOKENS + 1, TOKENS)",
        REMAINDERS,
        of_remainders(transposed=False),
    ),
    Mutant(
        "a square weight is always transposed",
        "kernels.cpu.launch",
        "window.T if transposed",
        "window.T if transposed or rows == cols",
        "test_a_product_is_within_the_bound_of_its_dtype",
        of_a_product(SQUARE, 40, False, torch.bfloat16),
    ),
    Mutant(
        "the gradient is made by W as the product was",
        "kernels.dispatch",
        "*pieces, not transposed)",
        "*pieces, transposed)",
        "test_the_gradient_of_either_product_is_the_other",
        of_a_product(SQUARE, 40),
    ),
    Mutant(
        "all products of one size are made in the same memory",
        "kernels.cpu.launch",
        "y = torch.zeros(len(x), height if transposed else width)",
        "y = KINDS.setdefault(len(x), torch.zeros(len(x), height if transposed else width))",
        "test_the_caller_owns_what_it_gets",
        seen_in="bitsandbytes: its buffers for quantized activations",
    ),
    Mutant(
        "the dense weight is made before it is multiplied",
        "kernels.cpu.launch",
        "min(step, outer)",
        "outer",
        "test_a_product_holds_one_window_and_its_result_and_nothing_else",
        {
            "shape": (512, 384),
            "window": 2**14,
            "dtype": torch.bfloat16,
            "transposed": True,
            "double": True,
            "monkeypatch": SimpleNamespace(setattr=setattr),
        },
    ),
    Mutant(
        "the numbers after the last full run are not decoded",
        "kernels.cpu.launch",
        "decode.decode(weight, rows * run, 0, 1, rest, numbers[rows * run :])",
        "pass",
        "test_dequantizing_into_a_given_tensor_fills_it_and_nothing_else",
        {
            "recipe": Recipe((33, 70)),
            "double": True,
            "dtype": torch.float32,
            "layout": "contiguous",
        },
    ),
    Mutant(
        "what is not finite is looked for in the last piece alone",
        "kernels.dispatch",
        "absmax.isfinite().all()",
        "absmax[-16:].isfinite().all()",
        "test_what_is_not_finite_is_refused_as_the_reference_does",
        in_small_windows(dtype=torch.bfloat16, bad=torch.nan, place=0),
    ),
    Mutant(
        "the kernel takes the largest constant of float32 for that of float16",
        "kernels.cpu.launch",
        "largest_absmax(w.dtype)",
        "largest_absmax(torch.float32)",
        FINITE,
        {"dtype": torch.float16},
        suite="test_frozen_weight",
    ),
    Mutant(
        "of two codes for one level the second is used",
        "kernels.dispatch",
        "codebook[1:] > codebook[:-1]",
        "codebook[1:] >= codebook[:-1]",
        "test_quantizing_gives_what_the_reference_gives",
        {
            "recipe": Recipe((9, 130)),
            "codebook": torch.tensor([-1.0, 0.0, 0.0, 1.0]),
            "window": 2**20,
        },
    ),
    Mutant(
        "a weight with too few constants is read beyond its end",
        "kernels.packed_weight",
        "piece.shape == (count,)",
        "True",
        "test_sizes_that_do_not_fit_together_get_what_the_reference_gives_or_raises",
        without_kernels(what="too few constants"),
    ),
    Mutant(
        "a weight is read beyond its end by an x that is too wide",
        "kernels.dispatch",
        "x.shape[1:] == (width if transposed else height,)",
        "True",
        "test_an_x_of_another_width_is_refused",
        without_kernels(tokens=1, transposed=True, off_by=1),
    ),
]

OPTIMIZER_MUTANTS = [
    Mutant(
        "only clean pages count as written back",
        "paged_optim",
        "if not page.saved:",
        "if page.saved:",
        RECOUNT,
        PRESSED,
        suite="test_pager",
    ),
    Mutant(
        "a page that was written before is not written again",
        "paged_optim",
        "if write:",
        "if write and not page.saved:",
        SAYS,
        PRESSED,
        suite="test_pager",
    ),
    Mutant(
        "a page leaves without being written",
        "kernels.page_store",
        "page.in_store().copy_(tensor, non_blocking=self.non_blocking)",
        "None",
        SAYS,
        PRESSED,
    ),
    Mutant(
        "only clean pages are copied to the store",
        "kernels.page_store",
        "if not page.saved:",
        "if page.saved:",
        SAYS,
        PRESSED,
    ),
    Mutant(
        "one page more than the budget",
        "paged_optim",
        "self.resident + page.nbytes > self.budget",
        "self.resident > self.budget",
        HELD,
        PRESSED,
        suite="test_pager",
    ),
    Mutant(
        "one page less than the budget",
        "paged_optim",
        "self.resident + page.nbytes > self.budget",
        "self.cache and self.resident + page.nbytes >= self.budget",
        RECENT,
        PRESSED,
        suite="test_pager",
    ),
    Mutant(
        "first in, first out",
        "paged_optim",
        "            self.cache.move_to_end(page)\n",
        "",
        RECENT,
        PRESSED,
        suite="test_pager",
    ),
    Mutant(
        "the page that was used last leaves",
        "paged_optim",
        "popitem(last=False)",
        "popitem(last=True)",
        RECENT,
        PRESSED,
        suite="test_pager",
    ),
    Mutant(
        "a page that has no value counts as read from the store",
        "paged_optim",
        "if page.saved:\n            self.counters",
        "if page.store:\n            self.counters",
        RECOUNT,
        PRESSED,
        suite="test_pager",
    ),
    Mutant(
        "a page comes in without its value",
        "kernels.page_store",
        "if page.saved:\n            tensor",
        "if not page.saved:\n            tensor",
        SAYS,
        PRESSED,
    ),
    Mutant(
        "the peak is what is resident now",
        "paged_optim",
        "max(self.peak, self.resident)",
        "self.resident",
        HELD,
        SMALLER,
        suite="test_pager",
    ),
    Mutant(
        "pages overlap in the store",
        "kernels.page_store",
        "offset += page.nbytes",
        "offset += page.nbytes // 2",
        SAYS,
        PRESSED,
    ),
    Mutant(
        "narrow elements come first, and wide ones are not aligned",
        "kernels.page_store",
        "reverse=True",
        "reverse=False",
        "test_a_page_starts_at_a_multiple_of_its_elements_size_after_any_other_page",
        {"dtype": torch.float64},
    ),
    Mutant(
        "resident pages are announced too",
        "kernels.page_store",
        "if page.saved and page not in resident",
        "if page.saved",
        "test_a_clean_page_that_is_resident_is_not_announced",
    ),
    Mutant(
        "moments are fetched for reading only",
        "paged_optim",
        "moments = self.pager.fetch(page, write=True)",
        "moments = self.pager.fetch(page)",
        TORCH_BITS,
    ),
    Mutant(
        "moments start as what the memory holds",
        "paged_optim",
        "moments.zero_()",
        "moments.fill_(1)",
        TORCH_BITS,
    ),
    Mutant(
        "a page holds the moments of twice as many elements as it may",
        "paged_optim",
        "self.page_bytes // element_bytes",
        "2 * self.page_bytes // element_bytes",
        TORCH_BITS,
    ),
    Mutant(
        "there is one step for all parameters",
        "paged_optim",
        'self.state[param].get("step", 0) + 1',
        'max(self.state[param].get("step", 0) + 1,'
        ' *(slot.get("step", 0) for slot in self.state.values()))',
        TORCH_BITS,
        seen_in="apex and DeepSpeed #8471",
    ),
    Mutant(
        "the second moment is not corrected for its bias",
        "paged_optim",
        ".div_((1 - beta2**step) ** 0.5)",
        "",
        TORCH_BITS,
        seen_in="BERT's Adam",
    ),
    Mutant(
        "eps is inside the square root",
        "paged_optim",
        'sqrt(exp_avg_sq).div_((1 - beta2**step) ** 0.5).add_(group["eps"])',
        'exp_avg_sq.div(1 - beta2**step).add_(group["eps"]).sqrt_()',
        TORCH_BITS,
        seen_in="optax: eps_root",
    ),
    Mutant(
        "eps is added before the correction",
        "paged_optim",
        '.div_((1 - beta2**step) ** 0.5).add_(group["eps"])',
        '.add_(group["eps"]).div_((1 - beta2**step) ** 0.5)',
        TORCH_BITS,
        lambda suite: {"run": suite.Run(eps=0.1), "elements": 4, "budget": 1},
        seen_in="TensorFlow 1: epsilon hat",
    ),
    Mutant(
        "decay goes into the gradient",
        "paged_optim",
        "param.mul_(1 - lr * weight_decay)",
        "grad = grad.add(param, alpha=weight_decay)",
        TORCH_BITS,
        seen_in="every Adam; bitsandbytes' Lion before 0.50",
    ),
    Mutant(
        "decay is not multiplied by lr",
        "paged_optim",
        "param.mul_(1 - lr * weight_decay)",
        "param.mul_(1 - weight_decay)",
        TORCH_BITS,
    ),
    Mutant(
        "a parameter without a gradient decays",
        "paged_optim",
        "        updates = [\n",
        "        for group in self.param_groups:\n"
        "            for param in (p for p in group['params'] if p.grad is None):\n"
        "                param.mul_(1 - group['lr'] * group['weight_decay'])\n"
        "        updates = [\n",
        TORCH_BITS,
    ),
    Mutant(
        "all groups have the hyperparameters of the first",
        "paged_optim",
        "flat_grad[start:end], moments, step, group)",
        "flat_grad[start:end], moments, step, self.param_groups[0])",
        TORCH_BITS,
    ),
    Mutant(
        "an empty parameter ends the step",
        "paged_optim",
        "            self._update(param, group)\n",
        "            if not param.numel():\n"
        "                break\n"
        "            self._update(param, group)\n",
        TORCH_BITS,
        seen_in="TransformerEngine #3207",
    ),
    Mutant(
        "a strided parameter is updated in a copy",
        "paged_optim",
        "if not shard.is_contiguous():",
        "if False:",
        TORCH_BITS,
        seen_in="torch on MPS; bitsandbytes #1185",
    ),
    Mutant(
        "a strided gradient is read in memory order",
        "paged_optim",
        "local_shard(param.grad).contiguous().view(-1)",
        "param.grad.as_strided((param.grad.numel(),), (1,))",
        TORCH_BITS,
        seen_in="bitsandbytes #1185",
    ),
    Mutant(
        "what is saved goes on changing",
        "paged_optim",
        "from_local_shard(moment.clone().view(",
        "from_local_shard(moment.view(",
        "test_a_loaded_state_is_a_copy_and_a_saved_one_a_snapshot",
    ),
    Mutant(
        "a resumed run starts its bias correction again",
        "paged_optim",
        'self.state[param]["step"] = int(state["step"])',
        'self.state[param]["step"] = 1',
        "test_a_state_saved_by_either_optimizer_continues_in_either",
        from_torch,
    ),
    Mutant(
        "a resumed run starts with moments of zero",
        "paged_optim",
        "self.pager.fetch(page, write=True).copy_(run)",
        "self.pager.fetch(page, write=True).zero_()",
        "test_a_state_saved_by_either_optimizer_continues_in_either",
        from_torch,
        seen_in="the code of the paper: its resume leaves the optimizer out",
    ),
]
MUTANTS = [
    *NF4_MUTANTS,
    *CONSTANT_MUTANTS,
    *LORA_MUTANTS,
    *DORA_MUTANTS,
    *KERNEL_MUTANTS,
    *OPTIMIZER_MUTANTS,
]
warnings_of_python = pytest.mark.filterwarnings(
    r"ignore:(overflow|divide by zero|invalid value) encountered:RuntimeWarning"
)


@pytest.fixture
def few_examples() -> Iterator[None]:
    """Enough examples to find the bug, the same each time; none is shrunk or saved."""
    usual = settings.get_current_profile_name()
    phases = [Phase.explicit, Phase.generate]
    settings.register_profile(
        "mutants",
        max_examples=60,
        derandomize=True,
        database=None,
        deadline=None,
        phases=phases,
        report_multiple_bugs=False,
    )
    settings.load_profile("mutants")
    yield
    settings.load_profile(usual)


def load(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a file again, as the module that others import by this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    package, _, last = name.rpartition(".")
    if package:
        monkeypatch.setattr(importlib.import_module(package), last, module, raising=False)
    spec.loader.exec_module(module)
    return module


def mutated(source: str, mutant: Mutant) -> str:
    """The source with `old` replaced. Line breaks, indentation and trailing commas do not count."""
    tokens = re.findall(r"\w+|[^\w\s]", mutant.old)
    optional_comma = r",?\s*(?=[)\]}])"
    pattern = re.escape(tokens[0])
    for token in tokens[1:]:
        gap = optional_comma if token in ")]}" else r"\s*"
        pattern += gap + re.escape(token)
    found = list(re.finditer(pattern, source))
    assert len(found) == 1, (
        f"the source has changed: {mutant.file}.py has {mutant.old!r} {len(found)} times"
    )
    return source[: found[0].start()] + mutant.new.strip() + source[found[0].end() :]


def suite_on(
    mutant: Mutant | None, suite: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """A fresh copy of a test module, on fresh copies of the files, one of them mutated."""
    for name in STACK:
        source = SOURCES.joinpath(*name.split(".")).with_suffix(".py").read_text()
        if mutant and name == mutant.file:
            source = mutated(source, mutant)
        elif name in KERNELS:
            continue
        if name == "kernels.dispatch":  # torch allows one library of operators for each name
            source = source.replace("qlora", f"qlora{next(COPIES)}")
        (folder / f"{name}.py").write_text(source)
        module = load(name, folder / f"{name}.py", monkeypatch)
        if name == "kernels.dispatch":
            module._launch_cpu()  # it is imported late, and must be this copy
    return load(suite, next(HERE.rglob(f"{suite}.py")), monkeypatch)


def suite_of(mutant: Mutant) -> str:
    return mutant.suite or SUITES.get(mutant.file, f"test_{mutant.file.rpartition('.')[2]}")


def run(mutant: Mutant, suite: ModuleType) -> None:
    """Run the named test: with the arguments of the mutant, or on its own examples."""
    arguments = mutant.arguments(suite) if callable(mutant.arguments) else mutant.arguments or {}
    test = getattr(suite, mutant.test)
    if arguments and hasattr(test, "hypothesis"):
        test = test.hypothesis.inner_test
    test(**arguments)


@warnings_of_python
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_a_mutant_is_killed(
    mutant: Mutant, few_examples: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = suite_on(mutant, suite_of(mutant), tmp_path, monkeypatch)
    if mutant.file in REFERENCE:
        monkeypatch.setenv("QLORA_KERNELS", "reference")
    with pytest.raises(KILLED):
        run(mutant, suite)


@warnings_of_python
@pytest.mark.parametrize("name", sorted({suite_of(mutant) for mutant in MUTANTS}))
def test_the_code_itself_survives_what_kills_its_mutants(
    name: str, few_examples: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = suite_on(None, name, tmp_path, monkeypatch)
    mutants = [mutant for mutant in MUTANTS if suite_of(mutant) == name]
    distinct = {f"{mutant.test} {mutant.arguments}": mutant for mutant in mutants}
    for mutant in distinct.values():
        if callable(mutant.arguments):  # the function may change the modules
            run(mutant, suite_on(None, name, tmp_path, monkeypatch))
        else:
            run(mutant, suite)
