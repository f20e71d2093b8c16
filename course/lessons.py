"""The lessons: what a student writes in each, and the laws that grade it.

A law is a sentence, its points, and the tests of the project that check it. It holds if all of them
pass. Each test must fail while the functions of the exercise are not written, and must take no
expected value and no tolerance from the student's code.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "work"  # the students' files


@dataclass(frozen=True)
class Law:
    """A property that an answer must have.

    tests: names of test functions in the lesson's suite, or ids such as "tests/test_x.py::test_y".
    """

    name: str
    points: int
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Lesson:
    """One lesson, in the folder course/{number}_{slug}.

    file: the file that the student writes a part of.
    cut: the functions that the student writes, as "name" or "Class.name"; private ones may be
        replaced by others.
    given: private helpers that stay, although only the functions of `cut` use them.
    suite: the file of tests where the tests of the laws are.
    """

    number: int
    slug: str
    title: str
    file: str
    cut: tuple[str, ...]
    given: tuple[str, ...]
    suite: str
    laws: tuple[Law, ...]

    @property
    def folder(self) -> Path:
        return ROOT / "course" / f"{self.number}_{self.slug}"

    @property
    def source(self) -> Path:
        return ROOT / self.file

    @property
    def module(self) -> str:
        """The name that others import the file by."""
        return self.file.removesuffix(".py").replace("/", ".")

    @property
    def answer(self) -> Path:
        """Where the student writes."""
        return WORK / str(self.number) / self.source.name

    def test_ids(self, law: Law) -> list[str]:
        return [name if "::" in name else f"{self.suite}::{name}" for name in law.tests]


QUANTIZATION = Lesson(
    number=1,
    slug="quantization",
    title="Quantization, block by block",
    file="nf4.py",
    cut=("dequantize", "_normalize", "_pack", "_unpack", "_into_blocks"),
    given=(),
    suite="tests/test_nf4.py",
    laws=(
        Law(
            "The first number of a pair is in the high half of its byte.",
            2,
            ("test_the_first_number_of_a_pair_is_in_the_high_nibble",),
        ),
        Law(
            "Up to 16 levels share a byte, more take one each, and all codes come back.",
            2,
            ("test_up_to_sixteen_levels_share_a_byte_and_more_take_one_each",),
        ),
        Law(
            "A tensor of any shape, strides and block size is stored in the documented layout.",
            3,
            (
                "test_any_shape_and_stride_gives_the_layout_that_is_documented",
                "test_a_strided_tensor_gives_the_bytes_of_its_contiguous_copy",
                "test_an_expanded_tensor_gives_the_bytes_of_its_copy",
            ),
        ),
        Law(
            "Every number takes the level that is nearest to number / absmax of its block.",
            4,
            ("test_every_number_takes_its_nearest_level",),
        ),
        Law(
            "A round trip changes a number by at most half the widest gap of levels times absmax.",
            3,
            (
                "test_roundtrip_error_is_within_half_gap",
                "test_roundtrip_into_another_dtype_is_within_half_gap_and_the_cast",
            ),
        ),
        Law(
            "Scaling a weight by a power of two scales absmax and changes no code.",
            2,
            (
                "test_scaling_by_a_power_of_two_leaves_codes_unchanged",
                "test_scaling_by_a_power_of_two_leaves_the_closest_decisions_unchanged",
            ),
        ),
        Law(
            "Zero stays exactly zero, in a block of zeros too.",
            2,
            (
                "test_zero_stays_exactly_zero_and_never_becomes_minus_zero",
                "test_a_block_of_zeros_stays_zero_in_a_code_without_a_zero",
            ),
        ),
        Law(
            "Level times absmax is computed in float32 and then cast to the wanted dtype.",
            1,
            ("test_the_dtype_argument_is_a_cast_of_the_float32_product",),
        ),
        Law(
            "Neither the weight nor its stored form is changed, and no gradient is recorded.",
            1,
            (
                "test_the_input_is_not_modified",
                "test_a_weight_that_requires_grad_is_quantized_without_a_gradient",
            ),
        ),
    ),
)

NORMAL_FLOAT = Lesson(
    number=2,
    slug="nf4",
    title="NF4: levels from the quantiles of a normal distribution",
    file="nf4.py",
    cut=("normal_float", "quantize"),
    given=("_normalize", "_pack"),
    suite="tests/test_nf4.py",
    laws=(
        Law(
            "A code of k bits has 2**k ascending levels from -1 to 1, one of them exactly 0.",
            2,
            (
                "test_a_normal_float_ascends_from_minus_one_to_one_through_an_exact_zero",
                "test_a_normal_float_of_other_than_2_to_8_bits_is_refused",
            ),
        ),
        Law(
            "The 16 levels of NF4 are the published ones, bit for bit.",
            3,
            ("test_the_nf4_levels_are_the_published_ones_bit_for_bit",),
        ),
        Law(
            "Every number takes the level that is nearest to number / absmax of its block.",
            4,
            ("test_every_number_takes_its_nearest_level",),
        ),
        Law(
            "A number exactly between two levels takes the lower one.",
            2,
            ("test_a_tie_takes_the_lower_code",),
        ),
        Law(
            "The levels may be in any order, and the first of two equal ones is used.",
            1,
            ("test_levels_may_be_in_any_order_and_the_first_of_two_equal_ones_is_used",),
        ),
        Law(
            "A round trip changes a number by at most half the widest gap of levels times absmax.",
            2,
            ("test_roundtrip_error_is_within_half_gap",),
        ),
        Law(
            "Quantizing a dequantized tensor again gives the same codes.",
            1,
            ("test_requantizing_a_dequantized_tensor_gives_the_same_codes",),
        ),
        Law(
            "Zero stays exactly zero, in a block of zeros too.",
            1,
            ("test_zero_stays_exactly_zero_and_never_becomes_minus_zero",),
        ),
        Law(
            "A tensor of any shape, strides and block size is stored in the documented layout.",
            2,
            (
                "test_any_shape_and_stride_gives_the_layout_that_is_documented",
                "test_a_strided_tensor_gives_the_bytes_of_its_contiguous_copy",
                "test_up_to_sixteen_levels_share_a_byte_and_more_take_one_each",
            ),
        ),
        Law(
            "What cannot be quantized is refused, with what is wrong and where.",
            1,
            (
                "test_what_is_not_finite_in_float32_is_refused_with_its_count_and_first_index",
                "test_a_block_size_that_is_no_power_of_two_is_refused",
                "test_a_dtype_that_is_not_floating_point_is_refused",
                "test_a_codebook_that_is_not_2_to_256_float32_levels_is_refused",
            ),
        ),
        Law(
            "The weight is not changed, and no gradient is recorded.",
            1,
            (
                "test_the_input_is_not_modified",
                "test_a_weight_that_requires_grad_is_quantized_without_a_gradient",
            ),
        ),
    ),
)

DOUBLE_QUANTIZATION = Lesson(
    number=3,
    slug="double_quantization",
    title="Double quantization: the constants in 8 bits",
    file="double_quant.py",
    cut=("quantize", "dequantize"),
    given=(),
    suite="tests/test_double_quant.py",
    laws=(
        Law(
            "Codes, nested constants and offset have the documented shapes and dtypes.",
            2,
            (
                "test_codes_nested_constants_and_offset_have_the_documented_layout",
                "test_block_size_and_code_that_are_not_given_are_those_of_quantize",
            ),
        ),
        Law(
            "The offset is the mean of the constants, even where their float32 sum overflows.",
            4,
            ("test_the_offset_is_the_mean_even_where_the_float32_sum_overflows",),
        ),
        Law(
            "Equal constants come back exactly, because their mean was subtracted.",
            2,
            ("test_the_mean_is_subtracted_so_that_equal_constants_come_back_exactly",),
        ),
        Law(
            "Every constant takes its nearest 8-bit level.",
            3,
            ("test_every_constant_takes_its_nearest_8_bit_level",),
        ),
        Law(
            "The error is at most half the widest gap of the 8-bit levels times nested absmax.",
            4,
            ("test_the_error_is_within_half_gap_of_the_nested_absmax",),
        ),
        Law(
            "A decoded constant is never negative nor infinite.",
            2,
            (
                "test_a_decoded_constant_is_never_negative_nor_infinite",
                "test_a_constant_that_would_decode_to_less_than_zero_is_clamped",
            ),
        ),
        Law(
            "What cannot be quantized is refused, with what is wrong and where.",
            2,
            (
                "test_a_negative_constant_is_refused",
                "test_nan_and_infinity_are_refused_with_their_count_and_first_index",
                "test_a_block_size_that_is_no_power_of_two_is_refused",
            ),
        ),
        Law(
            "The constants and their stored form are not changed.",
            1,
            ("test_the_input_is_not_modified",),
        ),
    ),
)

TRAINING = Lesson(
    number=8,
    slug="training",
    title="Training, and judging the result",
    file="training/loss_and_eval.py",
    cut=(
        "CrossEntropy.forward",
        "CrossEntropy.backward",
        "label_loss",
        "perplexity",
        "exact_match",
    ),
    given=("_some_rows",),
    suite="tests/training/test_loss_and_eval.py",
    laws=(
        Law(
            "The loss of logits is the sum of their cross entropies, however large they are.",
            2,
            ("test_the_cross_entropy_is_that_of_float64",),
        ),
        Law(
            "Its gradient is softmax minus one-hot, times the gradient that comes in.",
            3,
            ("test_the_gradient_of_the_cross_entropy_is_that_of_float64",),
        ),
        Law(
            "The gradient is computed in float32 and rounded once to the dtype of the logits.",
            1,
            (
                "test_a_factor_that_bfloat16_cannot_hold_scales_the_gradient_without_a_bias",
                "test_the_gradient_has_the_dtype_of_the_logits",
            ),
        ),
        Law(
            "Only logits and labels are saved, and only `overwrite` lets backward change logits.",
            2,
            (
                "test_the_cross_entropy_saves_the_logits_and_keeps_them",
                "test_a_gradient_that_overwrites_the_logits_is_right_and_computed_once",
            ),
        ),
        Law(
            "Position t predicts token t + 1, and the head computes only logits with a label.",
            2,
            ("test_the_head_sees_only_the_positions_with_a_label_and_the_loss_is_theirs",),
        ),
        Law(
            "A token with a label counts once, an end token too; padding does not count.",
            2,
            (
                "test_each_token_in_the_loss_counts_once",
                "test_the_loss_does_not_depend_on_the_padding_token",
            ),
        ),
        Law(
            "Losses and gradients of small batches add up to those of one large batch.",
            2,
            ("test_losses_and_gradients_of_small_batches_add_up_to_those_of_the_large_one",),
        ),
        Law(
            "What the model does to its logits after the head is part of the gradient.",
            1,
            ("test_logits_that_the_model_needs_for_its_gradient_are_not_overwritten",),
        ),
        Law(
            "Perplexity is exp of the total loss over the total number of labels, without dropout.",
            2,
            (
                "test_the_perplexity_of_uniform_predictions_is_the_size_of_the_vocabulary",
                "test_perplexity_is_exp_of_the_mean_loss_whatever_the_batches_are",
                "test_perplexity_is_measured_in_evaluation_mode",
            ),
        ),
        Law(
            "Exact match is the share of answers with the expected characters, and no others.",
            2,
            (
                "test_exact_match_counts_answers_that_equal_the_expected_text",
                "test_the_model_is_asked_the_prompts_alone_and_has_room_for_the_longest_answer",
                "test_only_an_answer_of_the_same_characters_is_a_match",
            ),
        ),
        Law(
            "Several processes add up what they found, and count each example once.",
            1,
            (
                "test_the_losses_of_all_processes_are_added_each_example_once",
                "test_the_right_answers_of_all_processes_are_added_each_example_once",
            ),
        ),
    ),
)

ALL = (QUANTIZATION, NORMAL_FLOAT, DOUBLE_QUANTIZATION, TRAINING)
LESSONS = {lesson.number: lesson for lesson in ALL}
