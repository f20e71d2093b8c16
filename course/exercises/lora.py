"""Lesson 4: what the student writes, and the laws that grade it."""

from course.lesson import Law, Lesson

LESSON = Lesson(
    number=4,
    slug="lora",
    title="LoRA and its gradient, by hand",
    file="lora.py",
    cut=(
        "LoRAMatmul.forward",
        "LoRAMatmul.backward",
        "QLoRALinear.scaling",
        "QLoRALinear.update",
    ),
    given=(),
    suite="tests/test_lora.py",
    laws=(
        Law(
            "The output is x W'^T + b + s (x A^T) B^T, up to rounding.",
            3,
            ("test_the_output_is_that_of_lora_on_a_dense_and_on_a_4_bit_base",),
        ),
        Law(
            "The gradients of x, A, B and b are the derivatives of the output.",
            5,
            ("test_the_backward_passes_gradcheck_in_float64",),
        ),
        Law(
            "Output and gradients are right for each dtype and shape, with dropout too.",
            3,
            ("test_output_and_gradients_are_those_of_a_plain_autograd_lora",),
        ),
        Law(
            "While B is zero, the output is that of the frozen layer, bit for bit.",
            2,
            ("test_lora_at_initialisation_leaves_the_output_bitwise_unchanged",),
        ),
        Law(
            "Forward saves x, h, A, B and the dropout mask, and nothing dense.",
            3,
            (
                "test_forward_saves_x_and_h_and_the_mask_and_nothing_dense",
                "test_after_forward_nothing_is_alive_but_the_output_and_what_is_saved",
            ),
        ),
        Law(
            "What needs no gradient gets none, and nothing is saved for it.",
            1,
            (
                "test_only_the_gradient_that_is_needed_is_computed_and_it_is_the_same",
                "test_a_frozen_adapter_saves_nothing_of_x",
                "test_x_is_saved_for_A_alone",
            ),
        ),
        Law(
            "A bias that is trained gets the sum of the output's gradients over the tokens.",
            1,
            ("test_a_trainable_bias_gets_the_sum_of_the_gradients_in_its_own_dtype",),
        ),
        Law(
            "The scaling is alpha / r, or alpha / sqrt(r) with use_rslora.",
            1,
            ("test_with_use_rslora_the_scaling_is_alpha_over_the_root_of_r",),
        ),
        Law(
            "The update is s B A: added to the weight, it gives the same output.",
            1,
            ("test_a_merged_model_computes_what_the_adapted_one_did",),
        ),
    ),
)
