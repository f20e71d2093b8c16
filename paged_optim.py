"""AdamW whose state lives in pages, so that it can make room on the device (paper, section 3, "Paged Optimizers").

The arithmetic is that of torch.optim.AdamW (Loshchilov and Hutter, 2019): for t = 1, 2, ... and a gradient g,

    p <- p - lr * weight_decay * p
    m <- m + (1 - beta1) * (g - m)                                      exp_avg, the first moment
    v <- beta2 * v + (1 - beta2) * g^2                                  exp_avg_sq, the second
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Each element is updated by itself. So a flattened parameter may be cut into runs and updated run by run, with only one
run's moments at hand. Those are a page, (2, k) for a run of k elements, at most page_bytes big:

    parameter    [ 0 1 2 3 | 4 5 6 7 | 8 9 ]
    pages        [ m m m m | m m m m | m m ]    where each is, on the device or in the store, is the business
                 [ v v v v | v v v v | v v ]    of the pager (pager.py); on a GPU, of CUDA's unified memory too (stores.py)

Parameters and gradients stay put; one that is not contiguous is copied for its update. Error: none. For any page size
and budget the bits are torch.optim.AdamW's (foreach=False, fused=False) with square roots that are rounded to nearest:
torch's float32 roots, where it was built with Intel's MKL, are on some processors a unit off. Excepted are a NaN's payload
and, where 1 - beta1 rounds to 1, a zero's sign. `adamw_` below says what a run's update is; where there is a kernel, with
the same bits, dispatch.py has it do the work.

Of a parameter that is sharded (a DTensor), each process has the pages of its own rows, and needs no other for an update.

Differs from the paper and bitsandbytes: they page large parameters only, here all are.

A pager: tensors take turns in a small fast memory, and those whose turn it is not wait in a store.

AdamW remembers two numbers for every trainable element but touches only a few of them at a time. When a long batch
makes the activations peak, the rest should make room, or the run dies out of memory (paper, section 3).

    page        a tensor of fixed shape: the unit that moves
    budget      how many bytes of pages may be resident at once
    hit         a page is wanted and resident: hand it out
    fault       a page is wanted and is not: make room for it, then bring it in, with its value if it has one
    evict       the least recently used page leaves, and is written to the store if that holds an older value

    resident    page 2, page 1                  at most `budget` bytes, least recently used first
    store       [ page 0 | page 1 | page 2 ]    a place for each page: a mapped file, or memory that a GPU reaches (stores.py)

"Least recently used first" is CUDA's rule too. For an optimizer's step, which sweeps over all pages
in a fixed order, it is the worst: the page that leaves is the one that would come next. If the pages exceed the budget,
by however little, every page faults in every step, and all bytes move out and in. The counters show it.

Differs from the paper and bitsandbytes: there the CUDA driver moves memory unseen, whenever the device is full. Here
the budget is explicit, every move is counted, and no GPU is needed; on a GPU the driver does what it does there besides.
Error: none; a page is moved bit by bit.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from kernels import dispatch
from kernels.dtensor import from_local_shard, local_shard, shard_like
from kernels.page_store import Page, require, store_for


class Pager:
    """Keeps at most `budget` bytes of pages resident and the others in a store.

    Two pages of 8 bytes and room for one. The first fetch of each starts it, the last brings the first one back:

    >>> import torch
    >>> pager, one, two = Pager(8), *(Page((2,), torch.float32, torch.device("cpu")) for _ in range(2))
    >>> pager.reserve_store([one, two])
    >>> for page in (one, two, one):
    ...     moments = pager.fetch(page, write=True)
    >>> pager.counters
    {'hits': 0, 'faults': 3, 'evictions': 2, 'bytes_in': 8, 'bytes_out': 16, 'prefetches': 0}
    """

    def __init__(self, budget: float) -> None:
        self.budget, self.resident, self.peak = budget, 0, 0  # bytes: allowed, now, at most so far
        self.cache: OrderedDict[Page, Tensor] = (
            OrderedDict()
        )  # the resident pages, least recently used first
        self.counters = dict.fromkeys(
            ("hits", "faults", "evictions", "bytes_in", "bytes_out", "prefetches"), 0
        )

    def reserve_store(self, pages: list[Page]) -> None:
        """Give each page that needs a place in a store and has none one. Raises: ValueError, OSError; then none gets any."""
        largest = max((page.nbytes for page in pages), default=0)
        require(
            "the budget must hold each page",
            largest <= self.budget,
            self.budget,
            f"give {largest} or more",
        )
        fits, bounded = (
            sum(page.nbytes for page in pages) <= self.budget,
            self.budget < float("inf"),
        )
        homeless = [page for page in pages if page.store is None]
        groups = [
            [page for page in homeless if page.device == device]
            for device in {page.device: None for page in homeless}
        ]
        stores = [
            store_for(group[0].device, sum(page.nbytes for page in group), fits, bounded)
            for group in groups
        ]
        for store, group in zip(stores, groups):
            offset = 0
            for page in sorted(
                group, key=lambda page: -page.dtype.itemsize
            ):  # wide elements first: all are aligned
                page.store, page.offset = store, offset
                offset += page.nbytes

    def fetch(self, page: Page, write: bool = False) -> Tensor:
        """The resident tensor of a page, good until the next fetch. Changes to it may be lost unless `write` is set."""
        if page in self.cache:
            self.counters["hits"] += 1
            self.cache.move_to_end(page)
        else:
            self.counters["faults"] += 1
            self._bring_in(page)
        if write:
            page.stored = False
        return self.cache[page]

    def _bring_in(self, page: Page) -> None:
        while self.resident + page.nbytes > self.budget:
            self._evict_the_oldest()
        self.cache[page] = page.store.bring_in(page) if page.store else page.empty()
        self.resident += page.nbytes
        self.peak = max(self.peak, self.resident)
        if page.stored:
            self.counters["bytes_in"] += page.nbytes

    def _evict_the_oldest(self) -> None:
        page, tensor = self.cache.popitem(last=False)
        page.store.take_out(page, tensor)
        if not page.stored:
            page.stored = True
            self.counters["bytes_out"] += page.nbytes
        self.resident -= page.nbytes
        self.counters["evictions"] += 1

    def prefetch(self, pages: list[Page]) -> None:
        """Tell the store which pages, all of one parameter, come soon."""
        if pages and pages[0].store:
            self.counters["prefetches"] += pages[0].store.announce(pages, self.cache)


def adamw_(param: Tensor, grad: Tensor, moments: Tensor, step: int, group: StateDict) -> None:
    """Update a run of a parameter, (k,), and its moments, (2, k), in place; the first step is 1."""
    exp_avg, exp_avg_sq = (moments if step > 1 else moments.zero_()).unbind()
    (beta1, beta2), lr, weight_decay = group["betas"], float(group["lr"]), group["weight_decay"]
    # Each operation must treat an element alike wherever it stands in its run; add_(alpha=) of halves does not.
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    if 1 - beta1 >= 1 - 2**-25:
        exp_avg.add_(
            0.0
        )  # a lerp_ whose weight rounds to 1 gives a zero its sign by place: make it +0
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denom = root(exp_avg_sq).div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    param.addcdiv_(exp_avg, denom, value=-lr / (1 - beta1**step))


def update_run(
    flat: Tensor, flat_grad: Tensor, step: int, group: StateDict, start: int, moments: Tensor
) -> None:
    """The same for the run of a flat parameter that begins at `start` and is as long as its moments."""
    run = slice(start, start + moments.shape[1])
    adamw_(flat[run], flat_grad[run], moments, step, group)


def root(x: Tensor) -> Tensor:
    """The square root, of float32 rounded to nearest: no root of one is so near a midpoint that float64 could mistake it."""
    return x.double().sqrt_().float() if x.dtype == torch.float32 else x.sqrt()


def by_page(pages: list[Page], moments: Tensor) -> Iterable[tuple[Page, Tensor]]:
    """Each page of a parameter with its part of the moments, (2, n); views."""
    return zip(pages, moments.split(pages[0].shape[1], dim=-1) if pages else [])


class PagedAdamW(Optimizer):
    """torch.optim.AdamW, of whose state at most resident_bytes stay on the device (None: all of it).

    On a GPU that shares pages with the host all state is unified memory, and None means: as much as the driver leaves there.

    >>> weight = torch.nn.Parameter(torch.ones(6))
    >>> optimizer = PagedAdamW([weight], page_bytes=16, resident_bytes=32)  # three pages, two of which may stay
    >>> for weight.grad in torch.ones(2, 6):
    ...     optimizer.step()  # the first starts three pages and evicts one, the second reads and evicts three
    >>> optimizer.counters
    {'hits': 0, 'faults': 6, 'evictions': 4, 'bytes_in': 48, 'bytes_out': 64, 'prefetches': 0}
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        page_bytes: int = 2**21,
        resident_bytes: int | None = None,
    ) -> None:
        require(
            "page_bytes must be an int",
            type(page_bytes) is int,
            page_bytes,
            "give a whole number of bytes",
        )
        budget = float("inf") if resident_bytes is None else resident_bytes
        require(
            "resident_bytes must hold a page",
            budget >= page_bytes,
            budget,
            f"give {page_bytes} or more, or None",
        )
        self.page_bytes, self.pages, self.pager = (
            page_bytes,
            dict[Tensor, list[Page]](),
            Pager(budget),
        )
        self.counters = self.pager.counters
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def add_param_group(self, param_group: StateDict) -> None:
        """Cut the group's state into pages. Raises: ValueError or OSError; the group is not added then."""
        super().add_param_group(param_group)
        group = (
            self.param_groups.pop()
        )  # it comes back once it is known to be good and has its pages
        for name in ("lr", "eps", "weight_decay"):
            require(f"{name} must be at least 0", group[name] >= 0, group[name], "give 0 or more")
        require(
            "betas must lie in [0, 1)",
            all(0 <= b < 1 for b in group["betas"]),
            group["betas"],
            "try (0.9, 0.999)",
        )
        pages = self.pages | {param: self._cut(param) for param in group["params"]}
        self.pager.reserve_store([page for cut in pages.values() for page in cut])
        self.param_groups.append(group)
        self.pages = pages

    def _cut(self, param: Tensor) -> list[Page]:
        require(
            "parameters must be real floating point",
            param.is_floating_point(),
            param.dtype,
            "convert it",
        )
        n, width, k = (
            local_shard(param).numel(),
            2 * param.element_size(),
            self.page_bytes // (2 * param.element_size()),
        )
        require(
            "page_bytes must hold an element's moments",
            k > 0,
            self.page_bytes,
            f"give {width} or more",
        )
        return [Page((2, min(k, n - start)), param.dtype, param.device) for start in range(0, n, k)]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update each parameter that has a gradient, one after the other; return the closure's loss."""
        with torch.enable_grad():
            loss = closure() if closure else None
        turns = [
            (param, group)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        for layout in (param.grad.layout for param, _ in turns):
            require("gradients must be dense", layout == torch.strided, layout, "call to_dense()")
        for (param, group), next_pages in zip(
            turns, [*(self.pages[param] for param, _ in turns[1:]), []]
        ):
            self.pager.prefetch(next_pages)
            self._update(param, group)
        return loss

    def _update(self, param: Tensor, group: StateDict) -> None:
        self.state[param]["step"] = step = self.state[param].get("step", 0) + 1
        here, grad = local_shard(param.detach()), local_shard(param.grad)
        flat, flat_grad = here.contiguous().view(-1), grad.contiguous().view(-1)
        update = dispatch.adamw(flat, flat_grad, step, group) or partial(
            update_run, flat, flat_grad, step, group
        )
        start = 0
        for page in self.pages[param]:
            update(start, self.pager.fetch(page, write=True))
            start += page.shape[1]
        if not here.is_contiguous():
            here.copy_(flat.view_as(here))

    def state_dict(self) -> StateDict:
        """In torch.optim.AdamW's layout, with copies of the moments on the host. Fetches count as in a step.

        Those of a sharded parameter are sharded like it, and on its device.
        """
        packed = super().state_dict()
        for index, (param, pages) in enumerate(self.pages.items()):
            if index in packed["state"]:
                here = local_shard(param)
                moments = torch.empty(2, here.numel(), dtype=param.dtype)
                for page, run in by_page(pages, moments):
                    run.copy_(self.pager.fetch(page))
                exp_avg, exp_avg_sq = (
                    from_local_shard(moment.clone().view(here.shape), param) for moment in moments
                )
                step = torch.tensor(float(self.state[param]["step"]))
                packed["state"][index] = {
                    "step": step,
                    "exp_avg": exp_avg,
                    "exp_avg_sq": exp_avg_sq,
                }
        return packed

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue from a state_dict of this class or torch.optim.AdamW. Raises: ValueError; then nothing changed."""
        slots = self._checked(state_dict)
        super().load_state_dict({**state_dict, "state": {}})
        for param, slot in slots.items():
            self.state[param]["step"] = int(slot["step"])
            moments = torch.stack(
                [
                    local_shard(shard_like(slot[key], param)).flatten()
                    for key in ("exp_avg", "exp_avg_sq")
                ]
            )  # (2, n)
            for page, run in by_page(self.pages[param], moments):
                self.pager.fetch(page, write=True).copy_(run)

    def _checked(self, state_dict: StateDict) -> dict[Tensor, StateDict]:
        """What a state_dict knows about each parameter, if it is an AdamW's and fits."""
        for group in state_dict["param_groups"]:
            missing = [name for name in self.defaults if name not in group]
            require(
                "no hyperparameter may be missing",
                not missing,
                missing,
                "load the state of an AdamW",
            )
            variants = [name for name in ("amsgrad", "maximize") if group.get(name)]
            require(
                "amsgrad and maximize must be off",
                not variants,
                variants,
                "continue with torch.optim.AdamW",
            )
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        slots = {
            param: state_dict["state"][i]
            for param, i in zip(self.pages, indices)
            if state_dict["state"].get(i)
        }
        for param, slot in slots.items():
            for name, shape in {
                "step": (),
                "exp_avg": param.shape,
                "exp_avg_sq": param.shape,
            }.items():
                got = (
                    "nothing"
                    if slot.get(name) is None
                    else tuple(torch.as_tensor(slot[name]).shape)
                )
                require(
                    f"{name} must have shape {tuple(shape)}",
                    got == shape,
                    got,
                    "load AdamW's state of this model",
                )
        return slots

    def __getstate__(self) -> StateDict:
        raise TypeError(
            "a PagedAdamW cannot be copied or pickled: its store has no name; save state_dict() instead"
        )
