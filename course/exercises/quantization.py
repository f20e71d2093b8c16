"""Lesson 1: what the student writes, and the laws that grade it."""

from course.lesson import Law, Lesson

LESSON = Lesson(
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
