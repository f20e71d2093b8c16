"""Lesson 3: what the student writes, and the laws that grade it."""

from course.lesson import Law, Lesson

LESSON = Lesson(
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
            "Every constant takes its nearest 8-bit level, and is decoded by the stored codebook.",
            3,
            (
                "test_every_constant_takes_its_nearest_8_bit_level",
                "test_constants_are_decoded_with_the_codebook_that_is_stored",
            ),
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
