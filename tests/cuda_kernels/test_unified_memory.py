"""Unified memory, on a fake driver that records its calls, and on a GPU (make gpu) on the real one.

The laws: the same bits, moves that match the counters, never more on the device than the budget,
and memory that is freed with its owner.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_paged_optim import Run, plain
from torch import Tensor, nn

from cuda_kernels import unified_memory
from kernels import page_store
from kernels.page_store import Managed, Page, Pinned, new_store
from paged_optim import PagedAdamW, Pager

CPU = torch.device("cpu")
CURRENT = 7  # the handle of the current stream
ASIDE = 9  # the handle of the stream for prefetches
CUDA = torch.device("cuda", 0)


class Recorder:
    """A fake libcuda: takes the arguments of ctypes, allocates on the host, records every move."""

    def __init__(self, concurrent: bool = True, code: int = 0) -> None:
        self.concurrent, self.code = concurrent, code
        self.blocks: dict[int, ctypes.Array] = {}
        self.log: list[str] = []
        # Block and offset, size, place, stream
        self.moves: list[tuple[tuple[int, int], int, int, int]] = []
        self.advice: list[tuple[tuple[int, int], int, int]] = []

    def cuDeviceGetAttribute(self, answer: object, attribute: int, device: ctypes.c_int) -> int:
        assert (attribute, device.value) == (89, 0)
        answer._obj.value = self.concurrent
        return self.code

    def cuMemAllocManaged(
        self, address: object, size: ctypes.c_size_t, flags: ctypes.c_uint
    ) -> int:
        assert flags.value == 1
        block = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(block)
        self.blocks[ctypes.addressof(block)] = block
        return self.code

    def cuMemFree_v2(self, address: ctypes.c_uint64) -> int:
        del self.blocks[address.value]  # a second time would raise
        self.log.append("free")
        return self.code

    def place_of(self, start: ctypes.c_uint64, size: ctypes.c_size_t) -> tuple[int, int]:
        """The index of the block that has the whole range, and the offset in it."""
        ((number, base),) = (
            (number, base)
            for number, (base, block) in enumerate(self.blocks.items())
            if base <= start.value and start.value + size.value <= base + len(block)
        )
        return number, start.value - base

    def cuMemAdvise_v2(
        self,
        start: ctypes.c_uint64,
        size: ctypes.c_size_t,
        advice: int,
        place: unified_memory.Location,
    ) -> int:
        assert (advice, place.id) == (3, 0)
        self.advice.append((self.place_of(start, size), size.value, place.kind))
        return self.code

    def cuMemPrefetchAsync_v2(
        self,
        start: ctypes.c_uint64,
        size: ctypes.c_size_t,
        place: unified_memory.Location,
        flags: ctypes.c_uint,
        stream: ctypes.c_void_p,
    ) -> int:
        assert (flags.value, place.id) == (0, 0)
        self.moves.append((self.place_of(start, size), size.value, place.kind, stream.value))
        return self.code


def tensor_of(memory: unified_memory.Memory) -> Tensor:
    """On the host, what torch makes of __cuda_array_interface__: a view that owns `memory`."""
    described = memory.__cuda_array_interface__
    array = (ctypes.c_uint8 * described["shape"][0]).from_address(described["data"][0])
    array.owner = memory
    return torch.frombuffer(array, dtype=torch.uint8)


@contextlib.contextmanager
def recording(free: int = 2**40, **settings: object) -> Iterator[Recorder]:
    """A machine whose CPU acts as a GPU that shares pages."""
    recorder = Recorder(**settings)
    gc.freeze()  # what was there before need not be searched for garbage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            unified_memory, "driver_of", lambda device: unified_memory.Driver(recorder, device)
        )
        patch.setattr(unified_memory.Memory, "tensor", tensor_of)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "device", contextlib.nullcontext)
        patch.setattr(torch.cuda, "synchronize", lambda device: recorder.log.append("synchronize"))
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**41))
        patch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=ASIDE))
        patch.setattr(
            torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=CURRENT)
        )
        yield recorder
        gc.collect()  # an optimizer refers to itself
    gc.unfreeze()


def outcome(run: Run, **settings: object) -> tuple[list, dict[str, int], Recorder]:
    """Bits and counters of a run on the recorder, and the recorder; the optimizer is freed."""
    with recording() as recorder:
        bits, optimizer = run.outcome(PagedAdamW, **settings)
        counters = dict(optimizer.counters)
        del optimizer
    return bits, counters, recorder


# The same optimizer

sizes = st.lists(st.integers(1, 50), min_size=1, max_size=5)
budgets = st.one_of(st.none(), st.integers(1, 9))


@given(sizes, st.integers(1, 9), budgets, st.sampled_from([torch.float32, torch.bfloat16]))
def test_on_unified_memory_bits_and_counters_are_those_of_the_file_and_nothing_is_left(
    sizes: list[int], elements: int, pages: int | None, dtype: torch.dtype
) -> None:
    run = Run(shapes=[(1, n) for n in sizes], dtype=dtype)
    page_bytes = 2 * dtype.itemsize * elements
    settings = {
        "page_bytes": page_bytes,
        "resident_bytes": None if pages is None else pages * page_bytes,
    }
    bits, counters, recorder = outcome(run, **settings)
    expected, copied = run.outcome(PagedAdamW, **settings)
    assert bits == expected == run.outcome(plain)[0]
    assert {**counters, "prefetches": 0} == {**copied.counters, "prefetches": 0}
    assert not recorder.blocks


@given(sizes, st.integers(1, 9), st.integers(1, 9))
def test_on_pinned_memory_too(sizes: list[int], elements: int, pages: int) -> None:
    run = Run(shapes=[(1, n) for n in sizes])
    settings = {"page_bytes": 8 * elements, "resident_bytes": 8 * elements * pages}
    expected, in_file = run.outcome(PagedAdamW, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_store, "File", lambda nbytes: Pinned(nbytes, CPU))
        bits, pinned = run.outcome(PagedAdamW, **settings)
    assert bits == expected
    assert {**pinned.counters, "prefetches": 0} == {**in_file.counters, "prefetches": 0}
    assert pinned.counters["prefetches"] == 0


# The calls of the driver


def three_pages(budget: float) -> tuple[Pager, list[Page]]:
    """Pages of 16 bytes; to be made while recording."""
    pager = Pager(budget)
    pages = [Page((2, 2), torch.float32, CPU) for _ in range(3)]
    pager.reserve_store(pages)
    return pager, pages


def test_faults_send_pages_to_the_device_and_evictions_to_the_host_in_stream_order() -> None:
    with recording() as recorder:
        pager, (a, b, c) = three_pages(budget=32)
        for page in (a, b, a, c, b):
            pager.fetch(page, write=True)
        device = (unified_memory.ON_DEVICE, CURRENT)
        host = (unified_memory.ON_HOST, CURRENT)
        one = (0, 0)
        two = (0, 16)
        three = (0, 32)
        assert recorder.moves == [
            (one, 16, *device),
            (two, 16, *device),
            (two, 16, *host),
            (three, 16, *device),
            (one, 16, *host),
            (two, 16, *device),
        ]
        # Each place is made the preferred one.
        assert recorder.advice == [move[:3] for move in recorder.moves]
        del pager, page, a, b, c
    assert not recorder.blocks


@given(sizes, st.integers(1, 9), st.integers(1, 9))
def test_what_was_sent_to_the_device_and_not_back_never_exceeds_the_budget(
    sizes: list[int], elements: int, pages: int
) -> None:
    run = Run(shapes=[(1, n) for n in sizes], missing=0)
    _, counters, recorder = outcome(
        run, page_bytes=8 * elements, resident_bytes=8 * elements * pages
    )
    there: dict[tuple[int, int], int] = {}
    for where, size, place, stream in recorder.moves:
        if stream == ASIDE:  # only what is there already
            assert size == sum(
                there[each]
                for each in there
                if each[0] == where[0] and 0 <= each[1] - where[1] < size
            )
        elif place == unified_memory.ON_HOST:
            assert there.pop(where) == size
        else:
            there[where] = size
        assert sum(there.values()) <= 8 * elements * pages
    moves = [place for _, _, place, stream in recorder.moves if stream == CURRENT]
    assert (moves.count(unified_memory.ON_DEVICE), moves.count(unified_memory.ON_HOST)) == (
        counters["faults"],
        counters["evictions"],
    )


def test_the_next_parameter_is_prefetched_in_one_call_if_all_of_it_is_resident() -> None:
    with recording() as recorder:
        # Pages of 4, 4 and 2 elements, 80 bytes.
        params = [nn.Parameter(torch.zeros(10)) for _ in range(3)]
        optimizer = PagedAdamW(params, page_bytes=32)
        for param in params:
            param.grad = torch.ones(10)
        optimizer.step()
        assert all(stream == CURRENT for *_, stream in recorder.moves)  # none had been there
        recorder.moves.clear()
        optimizer.step()
        assert recorder.moves == [
            ((0, offset), 80, unified_memory.ON_DEVICE, ASIDE) for offset in (80, 160)
        ]
        assert optimizer.counters["prefetches"] == 6
        del optimizer


def test_more_than_the_card_has_free_is_refused_unless_the_user_bounds_what_stays() -> None:
    weight = nn.Parameter(torch.zeros(8))
    with recording(free=64) as recorder:
        del recorder
        assert PagedAdamW([weight], page_bytes=32).pager.budget == float("inf")
    with recording(free=63) as recorder:
        with pytest.raises(
            ValueError, match="must fit what cpu has free, 63 bytes, got 64; give resident_bytes"
        ):
            PagedAdamW([weight], page_bytes=32)
        assert not recorder.blocks
        assert PagedAdamW([weight], page_bytes=32, resident_bytes=32).pager.budget == 32


def test_memory_is_freed_with_its_last_tensor_when_the_kernels_are_done() -> None:
    with recording() as recorder:
        pager, (page, *rest) = three_pages(budget=48)
        tensor = pager.fetch(page, write=True).fill_(3)
        del pager, page, rest
        gc.collect()
        assert recorder.blocks and tensor.sum() == 12
        assert recorder.log == []
        del tensor
        assert not recorder.blocks
        assert recorder.log == ["synchronize", "free"]


def test_torch_gets_address_and_size_and_copies_nothing() -> None:
    asked = []
    memory_tensor = unified_memory.Memory.tensor
    with recording() as recorder, pytest.MonkeyPatch.context() as patch:
        memory = unified_memory.Memory(unified_memory.Driver(recorder, CUDA), 24)
        patch.setattr(torch, "as_tensor", lambda owner, device: asked.append((owner, device)))
        memory_tensor(memory)
        assert asked == [(memory, CUDA)]
        (address,) = recorder.blocks
        assert memory.__cuda_array_interface__ == {
            "shape": (24,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }
        asked.clear()
        del memory


def test_a_call_that_fails_is_named() -> None:
    with (
        recording(code=2) as recorder,
        pytest.raises(RuntimeError, match="cuMemAllocManaged failed with CUDA error 2"),
    ):
        unified_memory.Memory(unified_memory.Driver(recorder, CUDA), 8)


# Which store


@pytest.mark.parametrize(
    ("library", "shares"),
    [
        (lambda name: Recorder(), True),
        (lambda name: Recorder(concurrent=False), False),
        (lambda name: SimpleNamespace(), False),
    ],
)
def test_a_gpu_shares_pages_if_its_driver_says_so(
    library: Callable, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", library)
    assert (unified_memory.driver_of(CUDA) is not None) == shares
    assert unified_memory.driver_of(CPU) is None


def test_without_a_driver_a_gpu_shares_nothing_and_its_pages_wait_in_pinned_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: no such file")

    asked = []
    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(torch, "empty", lambda size, **how: asked.append((size, how)))
    assert new_store(CUDA, 64, fits=True, bounded=True) is None
    assert isinstance(new_store(CUDA, 64, fits=False, bounded=True), Pinned)
    assert asked == [(64, {"dtype": torch.uint8, "pin_memory": True})]


def test_each_device_has_a_store_of_its_own() -> None:
    with recording() as recorder:
        pages = [Page((2, 2), torch.float32, torch.device(kind)) for kind in ("cpu", "meta", "cpu")]
        Pager(float("inf")).reserve_store(pages)
        assert pages[0].store is pages[2].store is not pages[1].store
        assert [page.offset for page in pages] == [0, 0, 16]
        assert sorted(map(len, recorder.blocks.values())) == [16, 32]
        del pages


# Bugs that these tests must notice


def stays(self: Managed, page: Page, tensor: Tensor) -> None:
    """Counts an eviction without telling the driver."""


def sends_without_looking(self: Managed, pages: list[Page], resident: object) -> int:
    self.memory.to_device(pages[0].offset, sum(page.nbytes for page in pages))
    return len(pages)


@pytest.mark.parametrize(
    ("method", "mutant"), [("evict", stays), ("prefetch", sends_without_looking)]
)
def test_a_store_that_overruns_its_budget_is_noticed(
    method: str, mutant: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = (
        test_what_was_sent_to_the_device_and_not_back_never_exceeds_the_budget.hypothesis.inner_test
    )
    law([8, 8], 4, 2)
    monkeypatch.setattr(Managed, method, mutant)
    with pytest.raises(AssertionError):
        law([8, 8], 4, 2)


# With a GPU

gpu = pytest.mark.gpu


def stores_of(optimizer: PagedAdamW) -> set[type]:
    return {type(page.store) for cut in optimizer.pages.values() for page in cut}


def trained(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 4
) -> list[Tensor]:
    """Train on the same random gradients. Returns parameters and moments."""
    make = torch.Generator("cuda").manual_seed(1)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=make, device="cuda", dtype=param.dtype)
        optimizer.step()
    state = optimizer.state_dict()["state"]
    moments = [state[index][name].cpu() for index in state for name in ("exp_avg", "exp_avg_sq")]
    return [*(param.detach().cpu() for param in params), *moments]


def on_the_gpu(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    make = torch.Generator("cuda").manual_seed(0)
    return [
        nn.Parameter(torch.randn(n, generator=make, device="cuda", dtype=dtype))
        for n in (1, 1000, 2**20 + 3)
    ]


@gpu
@pytest.mark.parametrize("budget", [None, 2**21, 3 * 2**20])
@pytest.mark.parametrize("page_bytes", [2**20, 2**21])
@pytest.mark.parametrize("pinned", [False, True])
def test_on_a_gpu_every_store_and_budget_gives_the_bits_of_one_page(
    budget: int | None, page_bytes: int, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = on_the_gpu()
    expected = trained(whole, PagedAdamW(whole, page_bytes=2**24))
    if pinned:
        monkeypatch.setattr(unified_memory, "driver_of", lambda device: None)
    params = on_the_gpu()
    optimizer = PagedAdamW(params, page_bytes=page_bytes, resident_bytes=budget)
    found = trained(params, optimizer)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert optimizer.counters["evictions"] > 0 if budget else optimizer.counters["evictions"] == 0
    if pinned:
        assert stores_of(optimizer) == ({Pinned} if budget else {type(None)})


@gpu
def test_on_a_gpu_managed_pages_are_tensors_of_it_and_leave_with_the_optimizer() -> None:
    if unified_memory.driver_of(torch.device("cuda")) is None:
        pytest.skip("this GPU shares no pages with the host")
    params = on_the_gpu()
    optimizer = PagedAdamW(params)
    trained(params, optimizer)
    assert stores_of(optimizer) == {Managed}
    assert all(tensor.is_cuda for tensor in optimizer.pager.cache.values())
    freed = []
    free = unified_memory.Driver.free
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unified_memory.Driver, "free", lambda self, address: freed.append(address))
        memory = unified_memory.Memory(unified_memory.driver_of(torch.device("cuda")), 2**21)
        address = memory.address
        tensor = memory.tensor()
        del memory
        gc.collect()
        assert freed == [] and tensor.data_ptr() == address  # the tensor keeps what it looks at
        del tensor
        gc.collect()
        assert freed == [address]
    free(unified_memory.driver_of(torch.device("cuda")), address)


@gpu
def test_on_a_gpu_state_makes_room_for_unforeseen_activations() -> None:
    """The paper's claim: ordinary tensors evict managed pages, which return with their bits."""
    if unified_memory.driver_of(torch.device("cuda")) is None:
        pytest.skip("this GPU shares no pages with the host")
    # Elements whose moments take a quarter of what is free.
    size = torch.cuda.mem_get_info()[0] // 4 // 8
    param = nn.Parameter(torch.zeros(size, device="cuda"))
    param.grad = torch.full_like(param, 0.5)
    optimizer = PagedAdamW([param], page_bytes=2**27)
    optimizer.step()
    before = param.detach()[:: size // 1000].clone()
    # Half of it must be taken from the pages.
    room = torch.cuda.mem_get_info()[0] + optimizer.pager.resident // 2
    activations = torch.ones(room, dtype=torch.uint8, device="cuda")
    assert activations[-1] == 1
    del activations
    torch.cuda.empty_cache()
    optimizer.step()
    moments = next(iter(optimizer.pager.cache.values()))
    first = (1 - 0.9) * 0.5
    second = (1 - 0.999) * 0.25
    assert (param.detach()[:: size // 1000] < before).all()
    # Both are of two steps: the first step was not lost.
    assert (moments[0] > first).all()
    assert (moments[1] > second).all()
