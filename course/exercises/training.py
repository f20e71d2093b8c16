"""Lesson 8: what the student writes, and the laws that grade it."""

from course.lesson import Law, Lesson

LESSON = Lesson(
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
