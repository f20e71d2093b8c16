"""Lesson 7: what the student writes, and the laws that grade it."""

from course.lesson import Law, Lesson

LESSON = Lesson(
    number=7,
    slug="cuda_kernels",
    title="CUDA kernels: decoding on a GPU, step by step",
    file="cuda_kernels/dequantize.py",
    cut=("v1.naive", "v2.by_byte", "eight", "v3.by_word", "four", "v4.swapped"),
    given=(),
    suite="tests/cuda_kernels/test_cuda_kernels.py",
    laws=(
        Law(
            "v1: a thread decodes an element, to the bits of the reference.",
            4,
            ("test_v1_gives_each_element_the_bits_of_the_reference",),
        ),
        Law(
            "v2: a thread decodes a byte, to the bits of the reference.",
            3,
            ("test_v2_gives_each_pair_the_bits_of_the_reference",),
        ),
        Law(
            "v3: a thread decodes a word of 8 codes, to the bits of the reference.",
            3,
            ("test_v3_gives_each_word_the_bits_of_the_reference",),
        ),
        Law(
            "v4: a warp decodes a run of 1024 elements, to the bits of the reference.",
            4,
            ("test_v4_gives_each_run_the_bits_of_the_reference",),
        ),
        Law(
            "Each element that was asked for is written once, and nothing else is written.",
            2,
            ("test_each_element_is_written_once_and_nothing_beyond_them",),
        ),
        Law(
            "Whichever warps and lanes run first, the results are the same.",
            2,
            ("test_every_order_of_threads_gives_the_same_bits",),
        ),
        Law(
            "Codes, levels, constants and results are accessed as seldom as the docstrings say.",
            1,
            ("test_each_rung_reads_and_writes_as_many_bytes_at_once_as_it_promises",),
        ),
        Law(
            "Each write of a warp fills whole sectors of 32 bytes.",
            1,
            ("test_each_write_of_a_warp_fills_whole_sectors",),
        ),
    ),
)
