"""The pager decides where the state lies, never its values: every comparison here is of bits."""

import copy
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_cpu import in_python
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import paged_optim
from helpers.bounds import Bounded, adamw, apart
from helpers.strategies import DTYPES, LAYOUTS, laid_out, seeds
from kernels import dispatch
from kernels.cpu import adamw as adamw_kernel
from kernels.page_store import Page
from paged_optim import PagedAdamW, Pager

INF = float("inf")
no_madvise = pytest.mark.skipif(
    not hasattr(mmap, "MADV_WILLNEED"), reason="the platform takes no hints"
)


def bits(tensor: Tensor) -> bytes:
    """Every bit of every element; all NaNs count as one: hardware picks their sign and payload."""
    flat = tensor.detach().flatten()
    one_nan = torch.where(flat.isnan(), torch.full_like(flat, torch.nan), flat)
    return one_nan.view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Run:
    """A training run in numbers, which different optimizers repeat."""

    shapes: list[tuple[int, int]] = field(default_factory=lambda: [(3, 5), (1, 7), (2, 2)])
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    steps: int = 4
    missing: int = 3  # of this many gradients one is missing; 0: none
    scale: float = 1.0
    lr_decay: float = 1.0  # lr is multiplied by it after each step, as schedulers do

    def params(self) -> list[nn.Parameter]:
        make = torch.Generator().manual_seed(1)
        values = [
            torch.randn(shape, generator=make, dtype=torch.float64).to(self.dtype)
            for shape in self.shapes
        ]
        return [nn.Parameter(laid_out(value, self.layout)) for value in values]

    def groups(self, params: list[nn.Parameter]) -> list[dict]:
        """Two groups if there are two parameters; the second has its own hyperparameters."""
        groups = [{"params": params[:1]}]
        if len(params) > 1:
            groups.append({"params": params[1:], "lr": self.lr / 3, "weight_decay": 0.0})
        return groups

    def hyper(self) -> dict:
        return {
            "lr": self.lr,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }

    def train(
        self,
        optimizer: torch.optim.Optimizer,
        params: list[nn.Parameter],
        first: int = 0,
        last: int = -1,
    ) -> None:
        for step in range(first, self.steps if last < 0 else last):
            for param, grad in zip(params, self.grads(params, step)):
                param.grad = grad
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= self.lr_decay

    def grads(self, params: list[nn.Parameter], step: int) -> list[Tensor | None]:
        make = torch.Generator().manual_seed(100 + step)
        grads = []
        for index, param in enumerate(params):
            unscaled = torch.randn(param.shape, generator=make, dtype=torch.float64)
            grad = (unscaled * self.scale).to(self.dtype)
            absent = self.missing and (step + index) % self.missing == self.missing - 1
            grads.append(None if absent else laid_out(grad, self.grad_layout))
        return grads

    def outcome(self, make: Callable[..., torch.optim.Optimizer], **options: object) -> tuple:
        """Bits of all parameters and of all state after the run, and the optimizer."""
        params = self.params()
        optimizer = make(self.groups(params), **self.hyper(), **options)
        self.train(optimizer, params)
        return snapshot(params, optimizer), optimizer


def snapshot(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list:
    state = optimizer.state_dict()["state"]
    moments = []
    for index in sorted(state):
        step, exp_avg, exp_avg_sq = (state[index][k] for k in ("step", "exp_avg", "exp_avg_sq"))
        moments.append([index, float(step), bits(exp_avg), bits(exp_avg_sq)])
    return [[bits(param) for param in params], moments]


def where_apart(run: Run, got: list, wanted: list) -> str:
    """The first number in which two snapshots of a run differ."""
    for part, mine, theirs in zip(named(wanted), named(got).values(), named(wanted).values()):
        if mine != theirs:
            pair = [torch.frombuffer(bytearray(each), dtype=run.dtype) for each in (mine, theirs)]
            differs = [bits(a) != bits(b) for a, b in zip(*pair)]
            place = differs.index(True)
            mine, theirs = (numbers[place].item() for numbers in pair)
            return f"{part}, element {place}: wanted {theirs}, got {mine}"
    return "wanted the same parameters with a gradient, and steps"


def named(snapshot: list) -> dict[str, bytes]:
    """The tensors of a snapshot by name."""
    params, states = snapshot
    parts = {f"parameter {index}": each for index, each in enumerate(params)}
    for index, _, exp_avg, exp_avg_sq in states:
        parts |= {f"exp_avg of {index}": exp_avg, f"exp_avg_sq of {index}": exp_avg_sq}
    return parts


def nearest(x: Tensor, sqrt: Callable[[Tensor], Tensor] = Tensor.sqrt) -> Tensor:
    """The square root, of float32 rounded to nearest, which MKL's is not on every processor."""
    return sqrt(x.double()).float() if x.dtype == torch.float32 else sqrt(x)


class TorchAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with square roots rounded to nearest."""

    def step(self, *arguments: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "sqrt", nearest)
            patch.setattr(
                torch, "_foreach_sqrt", lambda tensors: [nearest(tensor) for tensor in tensors]
            )
            return super().step(*arguments)


def plain(groups: list[dict], **hyper: object) -> torch.optim.AdamW:
    return TorchAdamW(groups, foreach=False, fused=False, **hyper)


def positive_zeros(tree: list | int | float | bytes, run: Run) -> list | int | float | bytes:
    """The snapshot, with -0 made 0 in its tensors where beta1 is 0: see the test of lerp_ below."""
    if isinstance(tree, list):
        return [positive_zeros(branch, run) for branch in tree]
    if isinstance(tree, bytes) and tree and run.betas[0] == 0:
        return bits(torch.frombuffer(bytearray(tree), dtype=run.dtype) + 0.0)
    return tree


shapes = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70)), min_size=1, max_size=4)
runs = st.builds(
    Run,
    shapes,
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
    lr=st.sampled_from([0.0, 1e-3, 0.5]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.0), (0.3, 0.95)]),
    eps=st.sampled_from([0.0, 1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.01, 1.5]),
    steps=st.integers(1, 4),
    missing=st.integers(0, 3),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4, INF]),
)


@given(runs, st.integers(1, 40), st.integers(1, 6))
@example(Run(dtype=torch.bfloat16, layout="transposed", grad_layout="every other"), 1, 1)
@example(Run(shapes=[(7, 33)], dtype=torch.float16), 31, 1)
@example(Run(eps=1e-3), 3, 2)
@example(Run(betas=(0.0, 0.0), scale=INF, layout="inner", grad_layout="transposed"), 3, 2)
# The signs of zeros.
@example(
    Run(shapes=[(2, 4)], dtype=torch.float64, betas=(0.0, 0.0), steps=1, missing=0, scale=0.0), 1, 1
)
def test_any_page_size_and_budget_gives_the_bits_of_one_page(
    run: Run, elements: int, budget: int
) -> None:
    page_bytes = elements * 2 * run.dtype.itemsize
    paged, optimizer = run.outcome(
        PagedAdamW, page_bytes=page_bytes, resident_bytes=budget * page_bytes
    )
    one_page, _ = run.outcome(PagedAdamW)
    assert paged == one_page, where_apart(run, paged, one_page)
    assert optimizer.pager.peak <= budget * page_bytes


@given(runs, st.integers(1, 40), st.integers(1, 6))
@example(Run(dtype=torch.bfloat16, layout="transposed", grad_layout="every other"), 1, 1)
@example(Run(shapes=[(7, 33)], dtype=torch.float16), 31, 1)
@example(Run(betas=(0.0, 0.0), scale=INF, layout="inner", grad_layout="transposed"), 3, 2)
def test_any_page_size_and_budget_gives_the_bits_of_torch(
    run: Run, elements: int, budget: int
) -> None:
    page_bytes = elements * 2 * run.dtype.itemsize
    paged, _ = run.outcome(PagedAdamW, page_bytes=page_bytes, resident_bytes=budget * page_bytes)
    torchs, _ = run.outcome(plain)
    paged = positive_zeros(paged, run)
    torchs = positive_zeros(torchs, run)
    assert paged == torchs, where_apart(run, paged, torchs)


def test_moments_start_at_zero_whatever_their_memory_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    run = Run(missing=0)
    params = run.params()
    optimizer = PagedAdamW(params, page_bytes=24, resident_bytes=48)
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    try:
        run.train(optimizer, params)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(param.isfinite().all() for param in params), "wanted finite numbers, got NaN"


# Two hundred steps, with hyperparameters all over their ranges, zeros among them

betas = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.999]), st.floats(1e-6, 0.9999))
long_runs = st.builds(
    Run,
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=2),
    st.sampled_from(DTYPES),
    lr=st.one_of(st.sampled_from([0.0, 1e-3]), st.floats(1e-6, 1.0)),
    betas=st.tuples(betas, betas),
    eps=st.one_of(st.sampled_from([0.0, 1e-8]), st.floats(1e-12, 1.0)),
    steps=st.just(200),
    missing=st.integers(0, 3),
    weight_decay=st.one_of(st.sampled_from([0.0, 0.01]), st.floats(1e-6, 1.0)),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4]),
    # lr * weight_decay stays below 2, beyond which parameters explode.
    lr_decay=st.sampled_from([1.0, 0.98, 1.003, 0.0]),
)
quarter = settings(max_examples=max(settings().max_examples // 4, 1))  # such a run takes a while


def many_at_once(groups: list[dict], **hyper: object) -> torch.optim.AdamW:
    return TorchAdamW(groups, foreach=True, **hyper)


def one_kernel(groups: list[dict], **hyper: object) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, fused=True, **hyper)


@given(long_runs)
@quarter
@example(Run(steps=200, missing=0))
@example(Run(steps=200, lr_decay=0.98, weight_decay=0.0))
@example(Run(steps=200, lr=0.0, betas=(0.0, 0.0), eps=0.0, scale=0.0))  # 0 / 0 in every element
@example(Run(steps=200, dtype=torch.bfloat16, betas=(0.5, 0.999), lr_decay=1.01))
def test_two_hundred_steps_give_the_bits_of_torch_one_by_one_and_many_at_once(run: Run) -> None:
    paged, _ = run.outcome(PagedAdamW, page_bytes=2 * 8 * 2, resident_bytes=2 * 8 * 4)
    paged = positive_zeros(paged, run)
    assert paged == positive_zeros(run.outcome(plain)[0], run)
    # In 16 bits, torch's foreach=True does not round as its foreach=False does.
    if run.dtype in (torch.float32, torch.float64):
        assert paged == positive_zeros(run.outcome(many_at_once)[0], run)


def bounds_of(run: Run) -> list[list[Bounded]]:
    """Each parameter and, if it ever had a gradient, its moments after the run, with error bounds.

    The bounds say how far off the numbers may be in run.dtype.
    """
    params = run.params()
    states = [
        [Bounded.exact(each) for each in (param, torch.zeros_like(param), torch.zeros_like(param))]
        for param in params
    ]
    rates = [run.lr / 3 if index else run.lr for index in range(len(params))]
    steps = [0] * len(params)
    for step in range(run.steps):
        for index, grad in enumerate(run.grads(params, step)):
            if grad is not None:
                steps[index] += 1
                hyper = run.hyper() | {"lr": rates[index]}
                if index:
                    hyper["weight_decay"] = 0.0  # as in run.groups
                after = adamw(*states[index], grad, steps[index], **hyper, dtype=run.dtype)
                states[index] = list(after)
        rates = [lr * run.lr_decay for lr in rates]
    return [state if count else state[:1] for state, count in zip(states, steps)]


def within_rounding(
    run: Run,
    make: Callable[..., torch.optim.Optimizer],
    other: Callable[..., torch.optim.Optimizer],
) -> bool:
    """Whether the ends of two optimizers differ by rounding in run.dtype at most."""
    ends = []
    for each in (make, other):
        params = run.params()
        optimizer = each(run.groups(params), **run.hyper())
        run.train(optimizer, params)
        state = optimizer.state_dict()["state"]
        moments = [
            [state[i]["exp_avg"], state[i]["exp_avg_sq"]] if i in state else []
            for i in range(len(params))
        ]
        ends.append([tensor for param, pair in zip(params, moments) for tensor in (param, *pair)])
    allowed = [apart(bound, bound) for state in bounds_of(run) for bound in state]
    assert all(bound.error.isfinite().all() for bound in allowed)
    return all(
        bound.allows(mine, theirs.double())
        for mine, theirs, bound in zip(*ends, allowed, strict=True)
    )


@given(long_runs, st.sampled_from([torch.float32, torch.float64]))
@quarter
@example(Run(steps=200, missing=0), torch.float32)
@example(Run(steps=200, lr=1.0, eps=0.0, weight_decay=2.0, lr_decay=0.98), torch.float32)
def test_two_hundred_steps_end_within_rounding_of_torchs_one_kernel(
    run: Run, dtype: torch.dtype
) -> None:
    # With eps = 0 a square that underflows is 0 / 0.
    run = replace(run, dtype=dtype, scale=run.scale if run.eps else 1.0)
    assert within_rounding(run, PagedAdamW, one_kernel)


def test_the_one_kernel_of_torch_rounds_differently_so_a_bound_is_needed() -> None:
    run = Run(steps=200, missing=0)
    assert run.outcome(one_kernel)[0] != run.outcome(plain)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "elements"), [(1, 1), (17, 1), (257, 2), (70001, 641), (70001, 65537), (100003, 32771)]
)
def test_pages_of_odd_sizes_and_tensors_split_between_threads_keep_the_bits(
    dtype: torch.dtype, n: int, elements: int
) -> None:
    """torch splits tensors of more than 32768 elements between threads.

    That is the whole parameter but not its pages, or both, in different places.
    """
    run = Run(shapes=[(1, n)], dtype=dtype, steps=3, missing=0)
    width = 2 * dtype.itemsize
    page_bytes = width * elements
    paged, _ = run.outcome(PagedAdamW, page_bytes=page_bytes, resident_bytes=page_bytes)
    assert paged == run.outcome(plain)[0]


def test_a_million_odd_elements_keep_the_bits() -> None:
    mine = Run(shapes=[(1, 1000003)], steps=2).params()[0]
    theirs = Run(shapes=[(1, 1000003)], steps=2).params()[0]
    paged = PagedAdamW([mine], page_bytes=2**17 - 8, resident_bytes=2**18)
    whole = plain([{"params": [theirs]}])
    for param, optimizer in [(mine, paged), (theirs, whole)]:
        for seed in range(2):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
    assert torch.equal(mine, theirs)


def test_a_half_precision_add_with_alpha_is_not_invariant_which_is_why_it_is_avoided() -> None:
    """If this fails, the operation is invariant in that build: update the comment in adamw_."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("seen with the AVX2 and AVX-512 kernels only")
    make = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1000, generator=make).bfloat16() for _ in range(2))
    apart = torch.cat([a.add(b, alpha=-0.37) for a, b in zip(x.split(7), y.split(7))])
    assert not torch.equal(apart, x.add(y, alpha=-0.37))


def test_lerp_with_weight_one_is_not_invariant_in_the_sign_of_zero_so_zero_is_added() -> None:
    """torch.optim.AdamW with beta1 = 0 inherits this: the moment of a gradient of -0 depends on
    the element's place.
    """
    starts = torch.zeros(65)
    ends = torch.zeros(65).neg()
    whole = starts.lerp(ends, 1.0)
    apart = torch.cat([start.lerp(end, 1.0) for start, end in zip(starts.split(1), ends.split(1))])
    assert torch.equal(whole, apart)
    assert bits(whole) != bits(apart)
    assert bits(whole + 0.0) == bits(apart + 0.0) == bits(torch.zeros(65))


@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize("beta1", [0.0, 1e-9, 2**-25, 2**-25 * (1 + 2**-52), 2**-24])
def test_a_beta1_that_rounds_to_zero_is_invariant_in_the_sign_of_zero_too(
    beta1: float, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_KERNELS", kernels)
    outcomes = []
    for options in ({}, {"page_bytes": 8}):
        param = nn.Parameter(torch.zeros(65))
        param.grad = torch.zeros(65).neg()
        optimizer = PagedAdamW([param], betas=(beta1, 0.9), **options)
        optimizer.step()
        outcomes.append(snapshot([param], optimizer))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.9])
def test_an_infinite_gradient_does_what_it_does_in_torch(beta1: float, dtype: torch.dtype) -> None:
    """Also with beta1 = 0: lerp_ is then g - (g - m) * 0, so torch's moment stays NaN forever."""
    outcomes = []
    paged = partial(PagedAdamW, page_bytes=64, resident_bytes=64)
    for make in (plain, paged):
        param = nn.Parameter(torch.ones(41, dtype=dtype))
        optimizer = make([param], betas=(beta1, 0.9))
        for step in range(3):
            param.grad = torch.linspace(1, 2, 41, dtype=dtype)
            if step == 1:
                extremes = [INF, -INF, torch.finfo(dtype).max]
                param.grad[[0, 7, 40]] = torch.tensor(extremes, dtype=dtype)
            optimizer.step()
        outcomes.append(snapshot([param], optimizer))
    assert outcomes[0] == outcomes[1]
    assert param.isnan().nonzero().flatten().tolist() == [0, 7]


class LargestOutput(TorchDispatchMode):
    """Records the bytes of the largest new storage of any operation: no views, nothing in place."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001
        result = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        for output in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(output, Tensor) and output.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, output.untyped_storage().nbytes())
        return result


def largest_output_of_a_step(layout: str, **options: int) -> int:
    """For 4000 float32 elements, in the second step, which loads pages from the store too."""
    param = nn.Parameter(laid_out(torch.ones(40, 100), layout))
    optimizer = PagedAdamW([param], **options)
    param.grad = torch.ones(40, 100)
    optimizer.step()
    with LargestOutput() as largest:
        optimizer.step()
    return largest.nbytes


def test_a_step_allocates_nothing_larger_than_a_page_unless_the_parameter_is_strided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    # A page that is loaded.
    assert largest_output_of_a_step("contiguous", page_bytes=800, resident_bytes=1600) == 800
    # All resident: the roots, in float64.
    assert largest_output_of_a_step("contiguous", page_bytes=800) == 800
    # The copy, as documented.
    assert largest_output_of_a_step("transposed", page_bytes=800) == 16000
    # The measure sees temporaries as large as the parameter.
    assert largest_output_of_a_step("contiguous") == 32000


def test_a_torch_that_does_not_fuse_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Update().group()
    assert dispatch.adamw(torch.ones(3), torch.ones(3), 1, group)
    monkeypatch.setattr("kernels.cpu.launch.FUSES", False)
    assert dispatch.adamw(torch.ones(3), torch.ones(3), 1, group) is None


def test_kernels_leave_the_number_of_torchs_threads_alone() -> None:
    """In a new process, because Numba's threads would change the number when they start."""
    code = "import torch; from kernels import dispatch; torch.set_num_threads(1); "
    code += "dispatch.quantize(torch.ones(64)); print(torch.get_num_threads())"
    command = [sys.executable, "-c", code]
    root = Path(paged_optim.__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "1\n"


# The kernel, which does the work of adamw_ for float32 on a CPU

PYTHON = in_python(adamw_kernel)
PYTHON.PIECE = 3  # so that a few elements are many pieces
warnings_of_python = pytest.mark.filterwarnings(
    r"ignore:(overflow|divide by zero|invalid value) encountered:RuntimeWarning"
)


def test_the_roots_of_torch_are_a_unit_from_the_nearest_at_most() -> None:
    """Where they are the nearest, TorchAdamW is torch.optim.AdamW itself."""
    numbers = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs()
    assert (numbers.sqrt().view(torch.int32) - nearest(numbers).view(torch.int32)).abs().max() <= 1
    assert torch.equal(paged_optim.sqrt(numbers), nearest(numbers))
    assert np.array_equal(np.sqrt(numbers.numpy()), nearest(numbers).numpy())


@dataclass(frozen=True)
class Update:
    """One update of a run: numbers within 2**(exponent ± spread), or random bit patterns."""

    n: int = 40
    exponent: int = 0
    spread: int = 4
    patterns: bool = False
    step: int = 2
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    seed: int = 0

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Parameter, gradient and moments; before the first step the moments are random bits."""
        make = torch.Generator().manual_seed(self.seed)
        words = torch.randint(-(2**31), 2**31, (4, self.n), generator=make)
        patterns = words.to(torch.int32).view(torch.float32)
        spread = (2 * torch.rand(4, self.n, generator=make, dtype=torch.float64) - 1) * self.spread
        unscaled = torch.randn(4, self.n, generator=make, dtype=torch.float64)
        scaled = unscaled * 2 ** (self.exponent + spread)
        numbers = patterns if self.patterns else scaled.float()
        moments = patterns[2:] if self.step == 1 else torch.stack([numbers[2], numbers[3].abs()])
        return numbers[0].clone(), numbers[1].clone(), moments.clone()

    def group(self) -> dict:
        return {
            "lr": self.lr,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }

    def by(self, update: Callable[..., object]) -> list[bytes]:
        """The bits of all operands after an update by paged_optim.adamw_ or what is like it."""
        operands = self.operands()
        update(*operands, self.step, self.group())
        return [bits(tensor) for tensor in operands]


updates = st.builds(
    Update,
    st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 4095, 4097, 12345])),
    st.integers(-149, 127),
    st.sampled_from([0, 4, 40, 150]),
    st.booleans(),
    st.one_of(st.integers(1, 3), st.integers(1, 10**6)),
    lr=st.one_of(st.sampled_from([0.0, 1e-3]), st.floats(1e-12, 1e30)),
    betas=st.tuples(betas, betas),
    eps=st.one_of(st.sampled_from([0.0, 1e-8]), st.floats(1e-45, 1e30)),
    weight_decay=st.one_of(st.sampled_from([0.0, 0.01]), st.floats(1e-6, 1e6)),
    seed=seeds,
)


def by_kernel(param: Tensor, grad: Tensor, moments: Tensor, step: int, group: dict) -> None:
    dispatch.adamw(param, grad, step, group)(0, moments)


@given(updates)
@example(Update(4097, 0, 4, betas=(0.0, 0.0)))
@example(Update(4097, 0, 4, betas=(1e-9, 0.999)))
@example(Update(4097, -140, 10, step=1))  # subnormal numbers
@example(Update(12345, patterns=True, step=1))
@example(Update(12345, patterns=True, step=1000, betas=(0.3, 0.95)))
def test_the_kernel_gives_the_bits_of_the_reference(update: Update) -> None:
    assert update.by(by_kernel) == update.by(paged_optim.adamw_)


@given(updates, st.integers(1, 40))
@warnings_of_python
def test_the_kernel_does_the_same_in_python(update: Update, n: int) -> None:
    update = replace(update, n=n)
    compiled = update.by(by_kernel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw_kernel, "update", PYTHON.update)
        assert update.by(by_kernel) == compiled


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="Numba has one thread here")
def test_two_threads_update_to_the_bits_of_one() -> None:
    before = torch.get_num_threads()
    outcomes = []
    update = Update(20_557)
    for threads in (1, 2, 2, 2):
        torch.set_num_threads(threads)
        outcomes.append(update.by(by_kernel))
    torch.set_num_threads(before)
    assert outcomes == outcomes[:1] * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asked", ["", "reference"])
def test_the_kernel_updates_float32_unless_the_environment_asks_for_the_reference(
    dtype: torch.dtype, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    updated = []
    monkeypatch.setattr(adamw_kernel, "update", lambda param, *_: updated.append(param.size))
    monkeypatch.setenv("QLORA_KERNELS", asked)
    Run(dtype=dtype, missing=0, steps=1, layout="transposed").outcome(
        PagedAdamW, page_bytes=10 * 2 * dtype.itemsize
    )
    assert updated == ([10, 5, 7, 4] if dtype == torch.float32 and not asked else [])


def test_a_step_of_the_kernel_allocates_only_the_page_that_is_loaded() -> None:
    assert largest_output_of_a_step("contiguous", page_bytes=800) == 0
    assert largest_output_of_a_step("contiguous", page_bytes=800, resident_bytes=1600) == 800


def test_a_step_size_that_float32_cannot_hold_is_refused_by_kernel_reference_and_torch() -> None:
    for make in (PagedAdamW, plain):
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match="without overflow"):
            make([param], lr=1e38).step()  # divided by 1 - 0.9


# The pager at work


def test_the_budget_holds_after_every_access(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Pager.fetch
    seen = []

    def watched(self: Pager, page: Page, write: bool = False) -> Tensor:
        moments = fetch(self, page, write)
        assert self.resident == sum(tensor.nbytes for tensor in self.cache.values()) <= self.budget
        seen.append(self.resident)
        return moments

    monkeypatch.setattr(Pager, "fetch", watched)
    _, optimizer = Run().outcome(PagedAdamW, page_bytes=24, resident_bytes=60)
    assert max(seen) == optimizer.pager.peak <= 60


def left_resident(pages: list[int], budget: int) -> tuple[int, int]:
    """Number and bytes of the last pages that fit the budget, from the bytes of all, in order."""
    total = 0
    for count, nbytes in enumerate(reversed(pages)):
        if total + nbytes > budget:
            return count, total
        total += nbytes
    return len(pages), total


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(2, 4),
)
def test_above_the_budget_each_step_moves_all_of_the_state_in_and_out(
    sizes: list[int], elements: int, pages: int, steps: int
) -> None:
    run = Run(shapes=[(1, n) for n in sizes], missing=0, steps=steps)
    page_bytes = 8 * elements
    state = 8 * sum(sizes)
    params = run.params()
    optimizer = PagedAdamW(params, page_bytes=page_bytes, resident_bytes=pages * page_bytes)
    run.train(optimizer, params)
    each = [8 * min(elements, n - start) for n in sizes for start in range(0, n, elements)]
    count = len(each)
    if state <= pages * page_bytes:
        wanted = {
            "hits": (steps - 1) * count,
            "faults": count,
            "evictions": 0,
            "bytes_in": 0,
            "bytes_out": 0,
        }
        assert not any(page.store for cut in optimizer.pages.values() for page in cut)
    else:
        resident, resident_bytes = left_resident(each, pages * page_bytes)
        wanted = {
            "hits": 0,
            "faults": steps * count,
            "evictions": steps * count - resident,
            "bytes_in": (steps - 1) * state,
            "bytes_out": steps * state - resident_bytes,
        }
    for name, number in wanted.items():
        got = optimizer.counters[name]
        assert got == number, f"{name}: wanted {number}, got {got}, for {state} bytes of state"


@no_madvise
def test_prefetch_advises_exactly_the_saved_pages_of_the_next_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    advised = []

    class Recording(mmap.mmap):
        def madvise(self, option: int, start: int, length: int) -> None:
            advised.append((option, start, length))
            super().madvise(option, start, length)

    monkeypatch.setattr(mmap, "mmap", Recording)
    page_bytes = 2 * mmap.PAGESIZE - 8  # so that most pages start inside a page of the system
    params = [nn.Parameter(torch.zeros(2 * page_bytes // 8)) for _ in range(3)]  # two pages each
    optimizer = PagedAdamW(params, page_bytes=page_bytes, resident_bytes=2 * page_bytes)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert advised == []  # nothing was saved when the second and the third were next
    optimizer.step()
    starts = [page.offset for param in params[1:] for page in optimizer.pages[param]]
    # The pages of the second and the third are saved by the time that each is next; the third's
    # were still resident when the step began.
    leads = [start % mmap.PAGESIZE for start in starts]
    assert advised == [
        (mmap.MADV_WILLNEED, start - lead, lead + page_bytes) for start, lead in zip(starts, leads)
    ]
    assert optimizer.counters["prefetches"] == len(advised) == 4


def test_a_full_disk_is_one_clear_error_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(
        OSError, match=r"must hold 48 bytes, got 'No space left.*set TMPDIR.*resident_bytes"
    ) as caught:
        PagedAdamW([nn.Parameter(torch.zeros(6))], page_bytes=16, resident_bytes=32)
    assert caught.value.errno == errno.ENOSPC


def test_a_group_added_later_makes_room_for_the_groups_before_it() -> None:
    first, second = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = PagedAdamW([first], page_bytes=16, resident_bytes=32)
    reference_params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    reference = plain(reference_params[:1])
    for param, each in ((first, optimizer), (reference_params[0], reference)):
        param.grad = torch.arange(4.0)
        each.step()
    assert optimizer.pages[first][0].store is None
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    reference.add_param_group({"params": reference_params[1:], "lr": 0.5})
    for params, each in (([first, second], optimizer), (reference_params, reference)):
        for _ in range(2):
            for param in params:
                param.grad = torch.arange(4.0) + 1
            each.step()
    assert snapshot([first, second], optimizer) == snapshot(reference_params, reference)
    assert optimizer.pager.peak == 32


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was() -> None:
    first, second = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = PagedAdamW([first])
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": [second], "lr": -1.0})
    assert len(optimizer.param_groups) == 1 and list(optimizer.pages) == [first]
    optimizer.add_param_group({"params": [second]})  # it may be offered again


# Saving and loading

MAKERS = [
    (plain, {}),
    (PagedAdamW, {}),
    (PagedAdamW, {"page_bytes": 24, "resident_bytes": 24}),
    (PagedAdamW, {"page_bytes": 40, "resident_bytes": 100}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("saver", "save_options"), MAKERS)
@pytest.mark.parametrize(("loader", "load_options"), MAKERS)
def test_a_state_saved_by_either_optimizer_continues_in_either(
    saver: Callable, save_options: dict, loader: Callable, load_options: dict, dtype: torch.dtype
) -> None:
    run = Run(dtype=dtype, layout="transposed", steps=5)
    params = run.params()
    optimizer = saver(run.groups(params), **run.hyper(), **save_options)
    run.train(optimizer, params, last=2)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed_params = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = loader(run.groups(resumed_params), **load_options)
    run.train(resumed, resumed_params, last=1)  # the load must replace this state
    for mine, theirs in zip(resumed_params, params):
        mine.data.copy_(theirs.data)
    resumed.load_state_dict(saved)
    assert snapshot(resumed_params, resumed) == snapshot(params, optimizer)
    run.train(optimizer, params, first=2)
    run.train(resumed, resumed_params, first=2)
    assert snapshot(resumed_params, resumed) == snapshot(params, optimizer)


def test_a_loaded_state_is_a_copy_and_a_saved_one_a_snapshot() -> None:
    run = Run()
    params = Run().params()
    optimizer = PagedAdamW(params, page_bytes=16, resident_bytes=16)
    run.train(optimizer, params)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    storages = [
        tensor.untyped_storage().data_ptr()
        for slot in saved["state"].values()
        for tensor in slot.values()
    ]
    assert len(set(storages)) == len(storages)  # safetensors refuses tensors that share one
    optimizer.load_state_dict(saved)
    run.train(optimizer, params)
    for index, slot in saved["state"].items():
        assert all(torch.equal(slot[name], before["state"][index][name]) for name in slot)


@pytest.mark.parametrize("maker", [plain, PagedAdamW])
def test_a_state_loads_any_number_of_times(maker: Callable) -> None:
    run = Run()
    params = Run().params()
    optimizer = PagedAdamW(params, page_bytes=16, resident_bytes=16)
    theirs = Run().params()
    other = maker([{"params": theirs}], lr=run.lr)
    run.train(other, theirs)
    for _ in range(3):
        optimizer.load_state_dict(other.state_dict())
    for mine, yours in zip(params, theirs):
        mine.data.copy_(yours.data)
    assert snapshot(params, optimizer) == snapshot(theirs, other)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_a_copy_is_refused_because_it_would_have_no_pages() -> None:
    with pytest.raises(TypeError, match=r"its store has no name; save state_dict\(\)"):
        copy.deepcopy(PagedAdamW(Run().params()))


def test_the_layout_of_the_state_is_that_of_torch() -> None:
    mine = Run().outcome(PagedAdamW)[1].state_dict()
    theirs = Run().outcome(plain)[1].state_dict()
    assert list(mine) == list(theirs) and list(mine["state"]) == list(theirs["state"])
    for index, slot in theirs["state"].items():
        expected = {name: (value.shape, value.dtype) for name, value in slot.items()}
        ours = mine["state"][index].items()
        assert {name: (value.shape, value.dtype) for name, value in ours} == expected
    numbers = [group["params"] for group in mine["param_groups"]]
    assert numbers == [group["params"] for group in theirs["param_groups"]]


def test_a_parameter_that_is_not_in_the_loaded_state_starts_again() -> None:
    run = Run(missing=0)
    params = Run().params()
    optimizer = PagedAdamW(params, page_bytes=16, resident_bytes=16)
    run.train(optimizer, params)
    optimizer.load_state_dict(PagedAdamW(Run().params()).state_dict())
    assert optimizer.state_dict()["state"] == {}
    fresh_params = [nn.Parameter(param.detach().clone()) for param in params]
    fresh = PagedAdamW(fresh_params)
    run.train(optimizer, params)
    run.train(fresh, fresh_params)
    assert snapshot(params, optimizer) == snapshot(fresh_params, fresh)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    params = Run().params()
    optimizer = PagedAdamW(params, page_bytes=16, resident_bytes=16)
    Run().train(optimizer, params)
    before = snapshot(params, optimizer)
    copies = [copy.deepcopy(optimizer.state_dict()) for _ in range(6)]
    wrong_shape, amsgrad, fewer, incomplete, negative, no_betas = copies
    wrong_shape["state"][0]["exp_avg"] = torch.zeros(5, 3)
    amsgrad["param_groups"][0]["amsgrad"] = True
    fewer["param_groups"][0]["params"].pop()
    del incomplete["state"][2]["exp_avg_sq"]
    negative["param_groups"][0]["lr"] = -1.0
    no_betas["param_groups"][0]["betas"] = (0.9, 1.0)
    for state, message in [
        (wrong_shape, r"exp_avg must have shape \(3, 5\), got \(5, 3\)"),
        (amsgrad, "amsgrad"),
        (fewer, "size of optimizer's group"),
        (incomplete, r"exp_avg_sq must have shape \(2, 2\), got nothing"),
        (negative, "lr must be at least 0, got -1.0"),
        (no_betas, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert snapshot(params, optimizer) == before


@pytest.mark.parametrize(
    ("foreign", "missing"),
    [
        (
            lambda params: torch.optim.SGD(params),
            r"no setting of a group may be missing, got none for \['betas', 'eps'\]; ",
        ),
        (
            lambda params: torch.optim.SGD(params, momentum=0.9),
            r"no setting of a group may be missing, got none for \['betas', 'eps'\]; ",
        ),
        (
            torch.optim.Adamax,
            r"exp_avg_sq must have shape \(3, 5\), got nothing; load AdamW's state",
        ),
        (lambda params: torch.optim.Adam(params, amsgrad=True), "amsgrad and maximize must be off"),
        (torch.optim.Adam, "weight decay must be decoupled, got .* continue with that class"),
    ],
)
def test_a_foreign_state_is_refused_by_what_it_lacks_and_changes_nothing(
    foreign: Callable, missing: str
) -> None:
    run = Run(missing=0)
    params = Run().params()
    optimizer = PagedAdamW(params, page_bytes=16, resident_bytes=16)
    run.train(optimizer, params)
    theirs = Run().params()
    other = foreign(theirs)
    run.train(other, theirs)
    before = snapshot(params, optimizer)
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    counts = dict(optimizer.counters)
    with pytest.raises(ValueError, match=missing):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.counters == counts
    assert snapshot(params, optimizer) == before
    assert optimizer.state_dict()["param_groups"] == groups


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "state must not be missing; load the state of an AdamW"),
        ({"state": {}}, "param_groups must not be missing; load the state of an AdamW"),
        ({"state": {}, "param_groups": [{"lr": 1.0}]}, r"got none for \['params', 'betas', 'eps'"),
    ],
)
def test_what_is_no_state_of_an_optimizer_is_refused_by_what_it_lacks(
    state: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PagedAdamW([nn.Parameter(torch.ones(2))]).load_state_dict(state)


# The optimizer as torch knows it


def test_schedulers_closures_and_zero_grad_work_as_in_torch() -> None:
    ends = []
    for make in (plain, partial(PagedAdamW, page_bytes=16, resident_bytes=16)):
        weight = nn.Parameter(torch.arange(5.0))
        optimizer = make([{"params": [weight]}])
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)

        def closure(
            optimizer: torch.optim.Optimizer = optimizer, weight: Tensor = weight
        ) -> Tensor:
            optimizer.zero_grad()
            loss = (weight**2).sum()
            loss.backward()
            return loss.detach()

        losses = []
        for _ in range(5):
            losses.append(float(optimizer.step(closure)))
            scheduler.step()
        optimizer.zero_grad()
        ends.append((bits(weight), losses, optimizer.param_groups[0]["lr"], weight.grad))
    assert ends[0] == ends[1] and ends[0][3] is None


def test_a_sparse_gradient_is_refused_before_anything_changes() -> None:
    dense, sparse = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = PagedAdamW([dense, sparse])
    dense.grad = torch.ones(4)
    sparse.grad = torch.ones(4).to_sparse()
    with pytest.raises(ValueError, match=r"dense, got torch.sparse_coo; call to_dense"):
        optimizer.step()
    assert dense.tolist() == [1, 1, 1, 1] and not optimizer.state


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.to(torch.bfloat16),
        lambda data: data.double(),
        lambda data: torch.cat([data, data]),
        lambda data: data[:1].clone(),
        lambda data: data.T.contiguous(),
    ],
)
def test_a_parameter_that_changed_after_construction_is_refused_before_anything_changes(
    change: Callable[[Tensor], Tensor],
) -> None:
    """As after model.half() or model.to(device): its moments would not fit."""
    other, changed = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    optimizer = PagedAdamW([other, changed])
    changed.data = change(changed.data)
    for param in (other, changed):
        param.grad = torch.ones_like(param)
    message = (
        r"a parameter must keep its shape, dtype and device, got .* after \(3, 2\) "
        r"in torch.float32 on cpu; cast or move the model before you make the PagedAdamW"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert other.tolist() == [[1, 1]] * 3 and not optimizer.state


def test_options_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(ValueError, match=r"amsgrad and maximize must be off, got \['maximize'\]"):
        PagedAdamW([{"params": [nn.Parameter(torch.ones(2))], "maximize": True}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr must be at least 0, got -0.001; "),
        ({"lr": float("nan")}, "lr must be at least 0, got nan; "),
        ({"eps": -1e-8}, "eps must be at least 0, got -1e-08; "),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1; "),
        ({"betas": (1.0, 0.9)}, r"betas must lie in \[0, 1\), got \(1.0, 0.9\); "),
        ({"betas": (0.9, -0.1)}, r"betas must lie in \[0, 1\), got \(0.9, -0.1\); "),
        ({"page_bytes": 7}, "page_bytes must hold an element's moments, got 7; give 8 or more"),
        ({"page_bytes": 64.0}, "page_bytes must be an int, got 64.0; "),
        ({"page_bytes": True}, "page_bytes must be an int, got True; "),
        (
            {"page_bytes": 64, "resident_bytes": 63},
            "resident_bytes must hold a page, got 63; give 64 or more, or None",
        ),
    ],
)
def test_a_number_out_of_range_is_refused_with_rule_value_and_remedy(
    options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PagedAdamW([nn.Parameter(torch.zeros(3))], **options)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_parameters_that_are_not_real_floating_point_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"real floating point, got {dtype}; "):
        PagedAdamW([torch.zeros(3, dtype=dtype)])


# Mutants: what the comparison above must notice

adamw_ = paged_optim.adamw_


def bias_correction_off_by_one(
    param: Tensor, grad: Tensor, moments: Tensor, step: int, group: dict
) -> None:
    adamw_(param, grad, moments.zero_() if step == 1 else moments, step + 1, group)


def decay_after_update(
    param: Tensor, grad: Tensor, moments: Tensor, step: int, group: dict
) -> None:
    adamw_(param, grad, moments, step, {**group, "weight_decay": 0.0})
    param.mul_(1 - group["lr"] * group["weight_decay"])


def moments_that_are_never_started(
    param: Tensor, grad: Tensor, moments: Tensor, step: int, group: dict
) -> None:
    adamw_(param, grad, moments.fill_(1) if step == 1 else moments, step + (step == 1), group)


@pytest.mark.parametrize(
    "mutant", [bias_correction_off_by_one, decay_after_update, moments_that_are_never_started]
)
def test_a_mutant_of_the_arithmetic_is_noticed(
    mutant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Run().outcome(plain)[0]
    assert Run().outcome(PagedAdamW, page_bytes=24, resident_bytes=48)[0] == wanted
    assert within_rounding(Run(missing=0), PagedAdamW, one_kernel)
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    monkeypatch.setattr(paged_optim, "adamw_", mutant)
    assert Run().outcome(PagedAdamW, page_bytes=24, resident_bytes=48)[0] != wanted
    assert not within_rounding(Run(missing=0), PagedAdamW, one_kernel)


def test_a_pager_that_forgets_a_page_was_written_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetch = Pager.fetch
    wanted = Run().outcome(plain)[0]

    def forgetful(self: Pager, page: Page, write: bool = False) -> Tensor:
        # The first value is kept, later ones are lost.
        return fetch(self, page, write and not page.saved)

    monkeypatch.setattr(Pager, "fetch", forgetful)
    assert Run().outcome(PagedAdamW, page_bytes=24, resident_bytes=24)[0] != wanted
