"""Lesson 5: what the student writes, and the laws that grade it."""

from course.lesson import Law, Lesson

LESSON = Lesson(
    number=5,
    slug="qlora_layer",
    title="The QLoRA layer and its memory",
    file="lora.py",
    cut=(
        "FrozenWeight.__init__",
        "FrozenWeight.forward",
        "FrozenWeight.nbytes",
        "QLoRALinear.from_linear",
        "adapt",
        "merge",
        "audit_merge",
    ),
    given=(),
    suite="tests/test_lora.py",
    laws=(
        Law(
            "A weight costs 4 bits and its constants: 4.127 bits in all with double quantization.",
            3,
            (
                "tests/test_frozen_weight.py::"
                "test_a_weight_costs_exactly_4_bits_and_its_constants_and_one_mean",
                "tests/test_frozen_weight.py::test_bytes_of_any_shape_are_those_of_the_formula",
            ),
        ),
        Law(
            "The decoded weight is that of equation 6, in the dtype that is asked for.",
            3,
            (
                "tests/test_frozen_weight.py::"
                "test_equation_6_is_one_dequantization_inside_the_other",
                "tests/test_frozen_weight.py::"
                "test_without_double_quantization_it_is_nf4_and_nothing_else",
                "tests/test_frozen_weight.py::test_any_code_can_be_frozen",
            ),
        ),
        Law(
            "With codebook=None the dense tensor itself is kept, not a copy.",
            1,
            (
                "tests/test_frozen_weight.py::"
                "test_without_a_codebook_the_dense_tensor_itself_is_kept",
            ),
        ),
        Law(
            "A layer with its adapter gives the output and the gradients of LoRA on W'.",
            2,
            ("test_output_and_gradients_are_those_of_a_plain_autograd_lora",),
        ),
        Law(
            "Settings that are given are used, and the others are the documented ones.",
            1,
            (
                "test_the_defaults_are_the_documented_ones",
                "test_with_use_rslora_the_scaling_is_alpha_over_the_root_of_r",
                "test_an_adapted_layer_is_in_the_mode_of_the_layer_it_replaces",
                "test_an_adapter_takes_the_compute_dtype_of_the_layer_without_one_by_default",
            ),
        ),
        Law(
            "A dense weight is freed once it is quantized, and no pass keeps one alive.",
            2,
            (
                "tests/test_stack.py::"
                "test_the_peak_is_the_packed_bytes_and_the_activations_and_no_dense_layer",
                "test_the_dense_weights_are_freed",
                "tests/test_frozen_weight.py::test_a_decoded_weight_is_not_kept",
            ),
        ),
        Law(
            "attach replaces each linear layer but the head, and only adapters are trainable.",
            3,
            (
                "test_attach_adapts_every_linear_layer_but_the_head_and_freezes_the_rest",
                "test_a_layer_that_is_used_twice_stays_one_layer",
                "test_layers_without_an_adapter_stay_frozen_when_others_get_one",
            ),
        ),
        Law(
            "If one layer cannot be adapted, the error names it and no layer is changed.",
            1,
            (
                "test_a_weight_that_is_refused_leaves_every_layer_dense",
                "test_a_layer_that_cannot_be_replaced_is_refused_by_name",
                "test_a_rank_that_is_no_integer_from_1_is_refused_with_the_layer",
            ),
        ),
        Law(
            "merge leaves an ordinary nn.Linear of W' + s B A, rounded once.",
            2,
            (
                "test_a_merged_weight_is_rounded_once",
                "test_a_merged_model_computes_what_the_adapted_one_did",
                "test_a_layer_that_is_used_twice_stays_one_layer_when_merged",
            ),
        ),
        Law(
            "The audit of merge tells what a merge into 4 bits would keep of the update.",
            2,
            (
                "test_the_audit_measures_what_a_4_bit_merge_would_change",
                "test_an_update_of_zero_is_kept",
                "test_an_update_that_rounding_removes_is_reported_as_lost",
            ),
        ),
    ),
)
