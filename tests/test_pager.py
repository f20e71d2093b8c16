"""The pager decides where a page lies, never its values, and its counters are right."""

import errno
import mmap
import os
import resource
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import paged_optim
from helpers.strategies import DTYPES
from kernels.page_store import Page, map_unnamed_file
from paged_optim import Pager

ROOT = Path(paged_optim.__file__).parent
CPU = torch.device("cpu")


def three_pages(budget: int = 32) -> tuple[Pager, list[Page]]:
    """Pages of 16 bytes."""
    pager = Pager(budget)
    pages = [Page((2, 2), torch.float32, CPU) for _ in range(3)]
    pager.reserve_store(pages)
    return pager, pages


# Values and counters


def recount(
    pages: list[Page], fetches: list[tuple[int, bool]], budget: int
) -> tuple[list[int], dict[str, int]]:
    """The resident pages and the counters after these fetches, recomputed with a list and a set."""
    resident = []  # least recently used first
    saved = set()  # pages whose latest value is in the store
    counters = dict.fromkeys(
        ("hits", "faults", "evictions", "bytes_in", "bytes_out", "prefetches"), 0
    )
    for index, write in fetches:
        if index in resident:
            counters["hits"] += 1
            resident.remove(index)
        else:
            counters["faults"] += 1
            while sum(pages[other].nbytes for other in [*resident, index]) > budget:
                oldest = resident.pop(0)
                counters["evictions"] += 1
                counters["bytes_out"] += 0 if oldest in saved else pages[oldest].nbytes
                saved.add(oldest)
            counters["bytes_in"] += pages[index].nbytes if index in saved else 0
        resident.append(index)
        if write:
            saved.discard(index)
    return resident, counters


Looks = list[tuple[tuple[int, int], torch.dtype]]  # shape and dtype of each page
Accesses = list[tuple[int, bool]]  # which page, counted modulo their number, and whether to write

looks_of_pages = st.lists(
    st.tuples(st.tuples(st.integers(1, 3), st.integers(1, 9)), st.sampled_from(DTYPES)),
    min_size=1,
    max_size=6,
)
accesses_to_pages = st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40)
spares = st.one_of(st.integers(0, 40), st.integers(0, 300))
THREE = [((2, 2), torch.float32)] * 3  # pages of 16 bytes
TWICE = [(page, write) for write in (True, True, False, False) for page in (0, 1, 0, 2)]


def started(looks: Looks, accesses: Accesses, spare: int) -> tuple[Pager, list[Page], Accesses]:
    """A pager whose budget holds the largest page and `spare` bytes, its pages, and the fetches."""
    pages = [Page(shape, dtype, CPU) for shape, dtype in looks]
    pager = Pager(max(page.nbytes for page in pages) + spare)
    pager.reserve_store(pages)
    return pager, pages, [(index % len(pages), write) for index, write in accesses]


def story(pager: Pager, pages: list[Page], fetches: Accesses) -> str:
    """What was fetched, for the message of a failure."""
    order = [f"page {index} to write" if write else f"page {index}" for index, write in fetches]
    sizes = [page.nbytes for page in pages]
    return f"budget: {pager.budget}, bytes of pages: {sizes}; fetched: {', '.join(order)}"


def difference(got: dict[str, int], wanted: dict[str, int]) -> str:
    """The counters that are not as wanted."""
    texts = [
        f"{name}: wanted {wanted[name]}, got {got[name]}"
        for name in wanted
        if got[name] != wanted[name]
    ]
    return "; ".join(texts)


@given(looks_of_pages, accesses_to_pages, spares)
# Alignment.
@example(
    [((2, 1), torch.float16), ((2, 1), torch.float64)],
    [(0, True), (1, True), (0, False), (1, False)],
    0,
)
@example(THREE, TWICE, 16)
# A page is written to at a hit, after it was loaded to be read; and read after it was written to.
@example(THREE, [(0, True), (1, False), (0, False), (0, True), (1, False), (0, False)], 0)
@example(THREE, [(0, True), (0, False), (1, False), (0, False)], 0)
def test_every_page_says_what_was_last_written(
    looks: Looks, accesses: Accesses, spare: int
) -> None:
    pager, pages, fetches = started(looks, accesses, spare)
    written = {}
    for count, (index, write) in enumerate(fetches, start=1):
        tensor = pager.fetch(pages[index], write=write)
        assert tensor.shape == pages[index].shape and tensor.dtype == pages[index].dtype
        if index in written:
            wrong = tensor[tensor != written[index]]
            assert not len(wrong), (
                f"page {index}: wanted {written[index]}, got {wrong[0]}; "
                f"{story(pager, pages, fetches[:count])}"
            )
        if write:
            tensor.fill_(count)
            written[index] = count


@given(looks_of_pages, accesses_to_pages, spares)
def test_the_pages_that_are_held_never_exceed_the_budget(
    looks: Looks, accesses: Accesses, spare: int
) -> None:
    pager, pages, fetches = started(looks, accesses, spare)
    made: list[weakref.ref[Tensor]] = []
    peaks = [0]

    def held() -> int:
        """The bytes of all tensors of pages that still exist."""
        return sum(tensor.nbytes for tensor in (ref() for ref in made) if tensor is not None)

    def empty(page: Page) -> Tensor:
        most = held() + page.nbytes
        assert most <= pager.budget, (
            f"bytes held: wanted {pager.budget} or less, got {most}; {story(pager, pages, fetches)}"
        )
        tensor = torch.empty(page.shape, dtype=page.dtype)
        made.append(weakref.ref(tensor))
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Page, "empty", empty)
        for index, write in fetches:
            pager.fetch(pages[index], write)
            peaks.append(held())
            assert pager.resident == held(), f"resident: wanted {held()}, got {pager.resident}"
    assert pager.peak == max(peaks), f"peak: wanted {max(peaks)}, got {pager.peak}"


@given(looks_of_pages, accesses_to_pages, spares)
# The page that was used first is not the smallest.
@example(
    [((2, 2), torch.float32), ((2, 1), torch.float32), ((2, 2), torch.float32)],
    [(0, True), (1, True), (2, True)],
    16,
)
def test_the_pages_that_were_used_last_are_resident(
    looks: Looks, accesses: Accesses, spare: int
) -> None:
    pager, pages, fetches = started(looks, accesses, spare)
    for index, write in fetches:
        pager.fetch(pages[index], write)
    resident, _ = recount(pages, fetches, pager.budget)
    got = [index for index, page in enumerate(pages) if page in pager.cache]
    assert got == sorted(resident), (
        f"resident pages: wanted {sorted(resident)}, got {got}; {story(pager, pages, fetches)}"
    )


@given(looks_of_pages, accesses_to_pages, spares)
def test_every_counter_is_a_plain_recount(looks: Looks, accesses: Accesses, spare: int) -> None:
    pager, pages, fetches = started(looks, accesses, spare)
    for index, write in fetches:
        pager.fetch(pages[index], write)
    _, counters = recount(pages, fetches, pager.budget)
    assert pager.counters == counters, (
        f"{difference(pager.counters, counters)}; {story(pager, pages, fetches)}"
    )


def test_the_least_recently_used_page_is_evicted_not_the_first_in_nor_the_last_used() -> None:
    pager, pages = three_pages()
    fetches = [(0, True), (1, True), (0, True), (2, True)]
    for index, write in fetches:
        pager.fetch(pages[index], write)
    got = [index for index, page in enumerate(pages) if page in pager.cache]
    assert got == [0, 2], f"wanted [0, 2], got {got}; {story(pager, pages, fetches)}"


def test_a_clean_page_is_not_written_back_and_a_dirty_one_once() -> None:
    pager, pages = three_pages(budget=16)
    fetches = [(0, True), (1, True), (0, False), (1, False)]  # the last one evicts a clean page
    for value, (index, write) in enumerate(fetches, start=1):
        tensor = pager.fetch(pages[index], write)
        if write:
            tensor.fill_(value)
    wanted = {"hits": 0, "faults": 4, "evictions": 3, "bytes_in": 32, "bytes_out": 32}
    assert pager.counters == wanted | {"prefetches": 0}, (
        f"{difference(pager.counters, wanted)}; {story(pager, pages, fetches)}"
    )
    assert pager.fetch(pages[0]).tolist() == [[1, 1], [1, 1]]


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="the platform takes no hints")
def test_only_a_page_that_is_saved_and_not_resident_is_prefetched() -> None:
    pager, (a, b, c) = three_pages(budget=16)
    pager.prefetch([a, b, c])  # none has a value
    assert pager.counters["prefetches"] == 0
    pager.fetch(a, write=True)
    pager.fetch(b, write=True)
    pager.prefetch([a, b, c])  # b is resident, c has no value
    assert pager.counters["prefetches"] == 1


# The store


def test_pages_that_fit_need_no_store_and_the_others_share_no_byte_of_it() -> None:
    pager, fitting = three_pages(budget=48)
    assert all(page.store is None for page in fitting)
    mixed = [
        Page((1, 1), dtype, CPU)
        for dtype in (torch.float16, torch.float64, torch.bfloat16, torch.float32)
    ]
    pager.reserve_store([*fitting, *mixed])
    pages = sorted([*fitting, *mixed], key=lambda page: page.offset)
    assert len({page.store for page in pages}) == 1
    assert all(page.offset + page.nbytes == after.offset for page, after in zip(pages, pages[1:]))
    assert all(page.offset % page.dtype.itemsize == 0 for page in pages)
    assert pages[-1].offset + pages[-1].nbytes == pages[0].store.bytes.numel()


def test_a_page_that_has_a_place_keeps_it() -> None:
    pager, pages = three_pages()
    places = [(page.store, page.offset) for page in pages]
    pager.reserve_store([*pages, Page((2, 2), torch.float32, CPU)])
    assert [(page.store, page.offset) for page in pages] == places


def test_a_page_larger_than_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="the budget must hold each page, got 15; give 16 or more"):
        three_pages(budget=15)


def test_no_file_can_be_seen_while_it_is_in_use_or_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pager, pages = three_pages(budget=16)
    for page in pages:
        pager.fetch(page, write=True)
    assert pager.counters["bytes_out"] > 0
    assert list(tmp_path.iterdir()) == []


CHILDREN = """
import os, signal, sys, tempfile
import torch
from paged_optim import PagedAdamW
PagedAdamW([torch.ones(1)])  # torch imports more, and makes a folder, at the first optimizer
tempfile.tempdir = sys.argv[1]
for end in ("exit", "raise", "kill"):
    if os.fork() == 0:  # so that torch is imported once
        weight = torch.nn.Parameter(torch.ones(64))
        optimizer = PagedAdamW([weight], page_bytes=64, resident_bytes=64)
        for weight.grad in torch.ones(3, 64):
            optimizer.step()
        assert optimizer.counters["bytes_in"] > 0
        if end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if end == "raise":
            raise KeyError("on purpose")
        sys.exit()
    print(end, os.waitstatus_to_exitcode(os.wait()[1]), os.listdir(sys.argv[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform does not fork")
def test_no_file_and_no_complaint_is_left_however_the_process_ends(tmp_path: Path) -> None:
    # A forked process has no other thread.
    one_thread = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "error", "-c", CHILDREN, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["exit 0 []", "raise 1 []", f"kill {-signal.SIGKILL} []"]
    assert done.returncode == 0
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("KeyError: 'on purpose'\n")


@pytest.fixture(params=["posix_fallocate", "zeros"])
def reservation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to reserve a store."""
    if request.param == "zeros":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    elif not hasattr(os, "posix_fallocate"):
        pytest.skip("the platform does not reserve")
    return request.param


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_store_that_the_system_refuses_is_one_clear_error_and_no_page_gets_a_place(
    reservation: str,
) -> None:
    pager = Pager(2**20)
    pages = [Page((2, 2**17), torch.float32, CPU) for _ in range(3)]
    message = r"must hold 3145728 bytes, got 'File too large'; set TMPDIR or raise resident_bytes"
    with files_of_at_most(2**21), pytest.raises(OSError, match=message) as caught:
        pager.reserve_store(pages)
    assert caught.value.errno == errno.EFBIG
    assert all(page.store is None for page in pages)
    pager.reserve_store(pages)  # it may be tried again


def test_a_full_disk_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(
        OSError, match=r"must hold 48 bytes, got 'No space left.*set TMPDIR.*resident_bytes"
    ) as caught:
        three_pages(budget=16)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads st_blocks")
@pytest.mark.parametrize("nbytes", [1, 2**20 - 1, 2**20, 3 * 2**20 + 5])
def test_the_space_of_the_store_is_really_reserved(
    reservation: str, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Measured(mmap.mmap):
        def __new__(cls, fd: int, size: int) -> mmap.mmap:
            seen.append(
                (os.fstat(fd).st_size, os.fstat(fd).st_blocks * 512 >= size, os.fstat(fd).st_nlink)
            )
            return super().__new__(cls, fd, size)

    seen: list[tuple[int, bool, int]] = []
    monkeypatch.setattr(mmap, "mmap", Measured)
    assert map_unnamed_file(nbytes)[:] == bytes(nbytes)
    assert seen == [(nbytes, True, 0)]


# Mutants: what the recount must notice


def first_in_first_out(self: Pager, page: Page, write: bool = False) -> torch.Tensor:
    order = list(self.cache)
    tensor = fetch(self, page, write)
    for other in order:
        if other in self.cache:
            self.cache.move_to_end(other)
    if page not in order:
        self.cache.move_to_end(page)
    return tensor


def forgets_a_second_write(self: Pager, page: Page, write: bool = False) -> torch.Tensor:
    return fetch(self, page, write and not page.saved)


def writes_clean_pages_too(self: Pager, page: Page, write: bool = False) -> torch.Tensor:
    return fetch(self, page, True)


fetch = Pager.fetch


@pytest.mark.parametrize(
    ("mutant", "law"),
    [
        (first_in_first_out, test_the_pages_that_were_used_last_are_resident),
        (forgets_a_second_write, test_every_page_says_what_was_last_written),
        (writes_clean_pages_too, test_every_counter_is_a_plain_recount),
    ],
)
def test_a_mutant_of_the_pager_is_noticed(
    mutant: Callable[..., Tensor], law: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    law = law.hypothesis.inner_test
    law(THREE, TWICE, 16)
    monkeypatch.setattr(Pager, "fetch", mutant)
    with pytest.raises(AssertionError):
        law(THREE, TWICE, 16)


# Laws that only mutants had broken


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="the platform takes no hints")
def test_a_clean_page_that_is_resident_is_not_announced() -> None:
    pager = Pager(32)
    pages = [Page((2, 2), torch.float32, CPU) for _ in range(3)]
    pager.reserve_store(pages)
    for page in pages:
        pager.fetch(page, write=True)
    pager.fetch(pages[0])  # saved and resident; the second is saved only
    pager.prefetch(pages)
    assert pager.counters["prefetches"] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_page_starts_at_a_multiple_of_its_elements_size_after_any_other_page(
    dtype: torch.dtype,
) -> None:
    narrow = Page((3, 1), torch.float16, CPU)
    wide = Page((3, 1), dtype, CPU)
    for pages in ([narrow, wide], [wide, narrow]):
        narrow.store = wide.store = None
        Pager(wide.nbytes).reserve_store(pages)
        assert wide.offset % dtype.itemsize == 0
