"""Lesson 2: what the student writes, and the laws that grade it."""

from course.lesson import Law, Lesson

LESSON = Lesson(
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
            "The 16 levels of NF4 are the published ones, bit for bit; 2 to 8 bits likewise.",
            3,
            (
                "test_the_nf4_levels_are_the_published_ones_bit_for_bit",
                "tests/test_naive.py::test_the_levels_of_a_normal_float_are_those_of_the_oracle",
            ),
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
