"""Bugs as real systems have them, put into the code on purpose: each must be caught by a property of the suite.

A mutant is one replacement in the source of one file. The four files are loaded anew with it, and so is the test module that
is to catch it; then the named test is run. A test that passes has let a bug through, and the suite fails.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, settings
from strategies import Tower, TowerWithHead

import nf4

SOURCES, HERE = Path(nf4.__file__).parent, Path(__file__).parent
STACK = ["nf4", "double_quant", "frozen", "lora"]  # in the order of their imports
KILLED = (AssertionError, ValueError, pytest.fail.Exception)  # what the tests raise, and the code where it refuses


class Mutant(NamedTuple):
    """`old` becomes `new` in a file; the test of that file's test module must catch it."""

    bug: str
    file: str
    old: str
    new: str
    test: str
    arguments: dict[str, object] | None = None


FLATTENED = "weight.detach().to(torch.float32).reshape(-1)"
PUBLISHED = "test_the_nf4_levels_are_the_published_ones_bit_for_bit"
NEAREST = "test_every_number_takes_its_nearest_level"
NOT_FINITE = "test_what_is_not_finite_in_float32_is_refused_with_its_count_and_first_index"
PLAIN_LORA = "test_output_and_gradients_are_those_of_a_plain_autograd_lora"
GRADCHECK = "test_the_backward_passes_gradcheck_in_float64"
WITHOUT_DROPOUT = {"leading": (4,), "dropout": 0.0, "bias": False}
WITH_DROPOUT = {"leading": (4,), "dropout": 0.4, "bias": False}
SAVED = "test_forward_saves_x_and_h_and_the_mask_and_nothing_dense"
ONE_DTYPE = {"dtype": torch.float32, "compute_dtype": None, "dropout": 0.0}

MUTANTS = [
    Mutant("the levels are rounded to four decimals", "nf4", "return levels / levels.max()",
           "return (levels / levels.max()).round(decimals=4)", PUBLISHED),
    Mutant("the quantiles are spaced in float64", "nf4", "torch.linspace(outermost, 0.5, half + 1)",
           "torch.linspace(outermost, 0.5, half + 1, dtype=torch.float64)", PUBLISHED),
    Mutant("a tie takes the upper code", "nf4", "out_int32=True)", "out_int32=True, right=True)",
           "test_a_tie_takes_the_lower_code"),
    Mutant("the first of a pair goes to the low nibble", "nf4", "(pairs[:, :1] << 4) | pairs[:, 1:]",
           "pairs[:, :1] | (pairs[:, 1:] << 4)", "test_the_first_number_of_a_pair_is_in_the_high_nibble"),
    Mutant("the odd last number is paired with code 0", "nf4", "pairs = codes[: n + n % 2].reshape(-1, 2)",
           "pairs = F.pad(codes[:n], (0, n % 2)).reshape(-1, 2)",
           "test_any_shape_and_stride_gives_the_layout_that_is_documented"),
    Mutant("a number is divided by absmax", "nf4", ".mul_(reciprocal[:, None])",
           ".div_((absmax * shift).where(absmax > 0, 1)[:, None])",
           "test_where_division_would_choose_another_level_the_reciprocal_decides"),
    Mutant("absmax is the largest number, not the largest magnitude", "nf4", "blocks.abs().amax(1)", "blocks.amax(1).abs()",
           NEAREST),
    Mutant("blocks run down the columns", "nf4", FLATTENED,
           FLATTENED.replace(".reshape", ".permute(*range(weight.dim())[::-1]).reshape"), NEAREST),
    Mutant("memory order is taken for row-major order", "nf4", FLATTENED,
           FLATTENED.replace(".reshape(-1)", ".as_strided((weight.numel(),), (1,))"),
           "test_a_strided_tensor_gives_the_bytes_of_its_contiguous_copy"),
    Mutant("a block of zeros is divided by zero", "nf4", "torch.where(absmax > 0, 1 / (absmax * shift), 0.0)",
           "1 / (absmax * shift)", "test_zero_stays_exactly_zero_and_never_becomes_minus_zero"),
    Mutant("absmax has an epsilon", "nf4", "1 / (absmax * shift)", "1 / (absmax * shift + 1e-8)", NEAREST),
    Mutant("tiny blocks are lost", "nf4", "absmax < 2.0**-64", "absmax < 0", NEAREST),
    Mutant("constants are stored in bfloat16", "nf4", "codebook), absmax, codebook,",
           "codebook), absmax.bfloat16().float(), codebook,",
           "test_roundtrip_error_is_within_half_gap"),
    Mutant("the product is made in the dtype of the weight", "nf4", "blocks.mul_(q.absmax[:, None])",
           "(blocks.to(q.dtype) * q.absmax[:, None].to(q.dtype))", "test_the_dtype_argument_is_a_cast_of_the_float32_product"),
    Mutant("NaN passes", "nf4", "~torch.isfinite(flat)", "torch.isinf(flat)", NOT_FINITE),
    Mutant("the last index is named, not the first", "nf4", "bad.nonzero()[0, 0]", "bad.nonzero()[-1, 0]", NOT_FINITE),
    Mutant("the input is normalised in place", "nf4", "(blocks * shift[:, None]).mul_(", "blocks.mul_(shift[:, None]).mul_(",
           "test_the_input_is_not_modified"),
    Mutant("the mean is not removed", "double_quant", "nf4.quantize(absmax - offset,", "nf4.quantize(absmax,",
           "test_the_error_is_within_half_gap_of_the_nested_absmax"),
    Mutant("the mean is not removed, nor added", "double_quant", "offset = absmax.mean() if",
           "offset = absmax.new_zeros(()) if",
           "test_the_offset_is_the_mean_even_where_the_float32_sum_overflows"),
    Mutant("a float32 sum that overflows is the mean", "double_quant", "if offset.isinf():", "if False:",
           "test_the_offset_is_the_mean_even_where_the_float32_sum_overflows"),
    Mutant("a decoded constant may be negative", "double_quant", ".clamp_(0, ", ".clamp_(-1, ",
           "test_a_constant_that_would_decode_to_less_than_zero_is_clamped"),
    Mutant("the 8-bit code is built in float64", "double_quant", "torch.linspace(0.1, 1, 2**i + 1)",
           "torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)", "test_the_8_bit_code_is_that_of_bitsandbytes_bit_for_bit"),
    Mutant("half() rounds the constants", "frozen", "exact = {} if self.codebook is None else", "exact = {} if True else",
           "test_no_cast_of_the_module_changes_a_byte_of_it", {"name": "half", "double": True}),
    Mutant("the codebook is saved with every layer", "frozen", "persistent=False", "persistent=True",
           "test_the_state_dict_round_trips_bit_for_bit"),
    Mutant("the constants are not quantized", "frozen", "if codebook is not None and double_quant:", "if False:",
           "test_a_weight_costs_exactly_4_bits_and_its_constants_and_one_mean", {"blocks": 2}),
    Mutant("scaling is lora_alpha, not lora_alpha / r", "lora", "r, lora_alpha, lora_alpha / r", "r, lora_alpha, lora_alpha",
           PLAIN_LORA),
    Mutant("what dropout keeps is not scaled up", "lora", "self.scaling / (1 - p)", "self.scaling", PLAIN_LORA),
    Mutant("nothing is dropped in the forward pass", "lora", "x if keep is None else x * keep, lora_A", "x, lora_A",
           PLAIN_LORA),
    Mutant("dropout keeps what it should drop", "lora", ">= p if p", "< p if p",
           "test_dropout_keeps_as_many_inputs_as_it_says"),
    Mutant("dropout stays on in evaluation", "lora", "self.lora_dropout if self.training else 0.0", "self.lora_dropout",
           "test_an_evaluating_layer_drops_nothing"),
    Mutant("dL/dB is not scaled", "lora", "dB = (g.T @ h).mul_(ctx.scaling)", "dB = (g.T @ h)", GRADCHECK, WITHOUT_DROPOUT),
    Mutant("dL/dh is not scaled", "lora", "(g @ lora_B.to(g.dtype)).mul_(ctx.scaling)", "(g @ lora_B.to(g.dtype))",
           GRADCHECK, WITHOUT_DROPOUT),
    Mutant("dL/dx leaves the adapter out", "lora", "dx = dh @ lora_A.to(g.dtype)", "dx = 0 * dh @ lora_A.to(g.dtype)",
           GRADCHECK, WITHOUT_DROPOUT),
    Mutant("dL/dx forgets the mask", "lora", "dx if keep is None else dx.mul_(keep)", "dx", GRADCHECK, WITH_DROPOUT),
    Mutant("dL/dA forgets the mask", "lora", "dh.T @ (x if keep is None else x * keep)", "dh.T @ x", GRADCHECK, WITH_DROPOUT),
    Mutant("the dense weight is kept for the backward pass", "lora", "keep, lora_A, lora_B)\n",
           "keep, lora_A, lora_B, base(x.dtype))\n",
           SAVED, ONE_DTYPE),
    Mutant("x is kept once more, without dropout", "lora", "keep, lora_A, lora_B)\n", "keep, lora_A, lora_B, x.clone())\n",
           SAVED, ONE_DTYPE),
    Mutant("a second derivative is silently wrong", "lora", "    @once_differentiable\n", "",
           "test_a_second_derivative_is_refused"),
    Mutant("B is not zero at the start", "lora", "torch.zeros(self.out_features, r, **kind)",
           "torch.full((self.out_features, r), 1e-3, **kind)",
           "test_lora_at_initialisation_leaves_the_output_bitwise_unchanged"),
    Mutant("merging adds to what was merged before", "lora", "(self.base(self.lora_A.dtype) + self.update())",
           "((self.base(self.lora_A.dtype) if self.merged is None else self.merged) + self.update())",
           "test_merge_and_unmerge_restore_every_bit"),
    Mutant("unmerging subtracts, and rounds", "lora", "        self.merged = None\n",
           "        self.merged -= self.update()\n", "test_merge_and_unmerge_restore_every_bit"),
    Mutant("the head is adapted too", "lora", "module is not head", "True",
           "test_attach_adapts_every_linear_layer_but_the_head_and_freezes_the_rest", {"make": TowerWithHead}),
    Mutant("a tied head is adapted too", "lora", "module.weight not in tied", "True",
           "test_attach_adapts_every_linear_layer_but_the_head_and_freezes_the_rest", {"make": lambda: Tower(tied=True)}),
    Mutant("a shared layer is replaced under one of its names", "lora",
           "for name in names:\n            model.set_submodule(name, layer)",
           "for name in names[:1]:\n            model.set_submodule(name, layer)",
           "test_a_layer_that_is_used_twice_stays_one_layer"),
    Mutant("the embedding and the norms go on training", "lora", "model.requires_grad_(False)", "model.requires_grad_(True)",
           "test_attach_adapts_every_linear_layer_but_the_head_and_freezes_the_rest", {"make": TowerWithHead}),
]  # fmt: skip


@pytest.fixture
def few_examples() -> Iterator[None]:
    """Enough to find the bug, the same each time, without shrinking it and without remembering it."""
    usual = settings.get_current_profile_name()
    phases = [Phase.explicit, Phase.generate]
    settings.register_profile("mutants", max_examples=60, derandomize=True, database=None, deadline=None, phases=phases,
                              report_multiple_bugs=False)  # fmt: skip
    settings.load_profile("mutants")
    yield
    settings.load_profile(usual)


def load(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a file anew, as the module that others import by this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def suite_on(mutant: Mutant | None, suite: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A fresh copy of a test module that stands on fresh copies of the four files, one of them mutated."""
    for name in STACK:
        source = (SOURCES / f"{name}.py").read_text()
        if mutant and name == mutant.file:
            assert source.count(mutant.old) == 1, f"the source has changed: {mutant.old!r} must be in {name}.py once"
            source = source.replace(mutant.old, mutant.new)
        (folder / f"{name}.py").write_text(source)
        load(name, folder / f"{name}.py", monkeypatch)
    return load(suite, HERE / f"{suite}.py", monkeypatch)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_a_mutant_is_killed(mutant: Mutant, few_examples: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suite_on(mutant, f"test_{mutant.file}", tmp_path, monkeypatch)
    with pytest.raises(KILLED):
        getattr(suite, mutant.test)(**(mutant.arguments or {}))


@pytest.mark.parametrize("file", STACK)
def test_the_code_itself_survives_what_kills_its_mutants(
    file: str, few_examples: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = suite_on(None, f"test_{file}", tmp_path, monkeypatch)
    killers = {mutant.test: mutant.arguments for mutant in MUTANTS if mutant.file == file}
    for test, arguments in killers.items():
        getattr(suite, test)(**(arguments or {}))
