"""Lesson 6: what the student writes, and the laws that grade it."""

from course.lesson import Law, Lesson

LESSON = Lesson(
    number=6,
    slug="paged_optimizer",
    title="A paged optimizer: AdamW and its pager",
    file="paged_optim.py",
    cut=("Pager.fetch", "Pager._load", "Pager._evict", "adamw_"),
    given=(),
    suite="tests/test_paged_optim.py",
    laws=(
        Law(
            "A page says what was last written to it, also after it has left and come back.",
            3,
            ("tests/test_pager.py::test_every_page_says_what_was_last_written",),
        ),
        Law(
            "The pages that are held never exceed the budget, not even while one is loaded.",
            3,
            ("tests/test_pager.py::test_the_pages_that_are_held_never_exceed_the_budget",),
        ),
        Law(
            "The page that leaves is the one that has not been used for the longest time.",
            3,
            (
                "tests/test_pager.py::"
                "test_the_least_recently_used_page_is_evicted_not_the_first_in_nor_the_last_used",
                "tests/test_pager.py::test_the_pages_that_were_used_last_are_resident",
            ),
        ),
        Law(
            "A page that leaves is written only if the store has an older value.",
            1,
            ("tests/test_pager.py::test_a_clean_page_is_not_written_back_and_a_dirty_one_once",),
        ),
        Law(
            "Hits, faults, evictions and bytes are those of a plain recount.",
            2,
            ("tests/test_pager.py::test_every_counter_is_a_plain_recount",),
        ),
        Law(
            "If the pages exceed the budget, each step of AdamW moves all of them in and out.",
            1,
            ("test_above_the_budget_each_step_moves_all_of_the_state_in_and_out",),
        ),
        Law(
            "Two hundred updates end where AdamW's do, within the rounding of the dtype.",
            3,
            (
                "test_two_hundred_steps_end_within_rounding_of_torchs_one_kernel",
                "test_moments_start_at_zero_whatever_their_memory_held",
            ),
        ),
        Law(
            "An update has the bits of torch.optim.AdamW.",
            2,
            ("test_any_page_size_and_budget_gives_the_bits_of_torch",),
        ),
        Law(
            "Any page size and any budget give the bits of a single page.",
            2,
            ("test_any_page_size_and_budget_gives_the_bits_of_one_page",),
        ),
    ),
)
