"""AdamW whose state lives in pages that move between device and host (paper, section 3, "Paged Optimizers").

AdamW keeps two moments for every trainable element. When a long batch makes the activations peak, they must make room, or
the run dies out of memory. The arithmetic is torch.optim.AdamW's (Loshchilov and Hutter, 2019), for t = 1, 2, ...
    p <- p - lr * weight_decay * p
    m <- m + (1 - beta1) * (g - m)            v <- beta2 * v + (1 - beta2) * g^2            m: exp_avg, v: exp_avg_sq
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
A page is a run of one parameter's flattened elements with both moments, (2, m), at most page_bytes big:
    parameter  [ 0 1 2 3 | 4 5 6 7 | 8 9 ]        on the device  {page 1, page 2}               at most resident_bytes
    pages      [ page 0  | page 1  | page 2 ]     in the store   [ page 0 | page 1 | page 2 ]   a nameless file, mapped
The least recently used page leaves first, as in CUDA's unified memory: the worst rule for a step, whose sweep has a fixed
order. Once the state exceeds the budget, by however little, every page faults in every step: 2 * state bytes move, in and out.
Prefetching tells the operating system which stored pages the next parameter needs (MADV_WILLNEED for cudaMemPrefetchAsync),
so the disk reads while we compute. Copying them into the budget early would evict others and, without a thread, hide nothing.
Error: none; paged, resident and torch.optim.AdamW(foreach=False, fused=False) agree bitwise, but for NaN payloads and, where
beta1 is 0, the sign that torch gives a moment of zero. Differs from the paper and bitsandbytes: there the driver moves memory
unseen, for parameters of 1e5 elements or more. Here all are paged, the budget is explicit, every move is counted.
"""

import mmap
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict


def require(rule: str, holds: bool, value: object, remedy: str) -> None:
    """Raise a ValueError that names the rule, the value that broke it and the remedy."""
    if not holds:
        raise ValueError(f"{rule}, got {value!r}; {remedy}")


@dataclass(eq=False, slots=True)
class Page:
    """Both moments of param.flatten()[run], nbytes together, and their place in a store if there is one."""
    param: Tensor
    run: slice
    nbytes: int
    store: mmap.mmap | None = None
    offset: int = 0
    stored: bool = False  # the store is up to date; a page neither stored nor resident has no value yet

    def home(self) -> Tensor:
        """The page's place in the store, (2, m)."""
        return torch.frombuffer(self.store, dtype=torch.uint8, count=self.nbytes, offset=self.offset).view(self.param.dtype).view(2, -1)


class Pager:
    """A least-recently-used cache of pages in front of a store: at most `budget` bytes of pages are resident."""
    def __init__(self, budget: float) -> None:
        self.budget, self.resident, self.peak = budget, 0, 0  # bytes: allowed, now, ever
        self.counters = dict.fromkeys(("hits", "faults", "evictions", "bytes_in", "bytes_out", "prefetches"), 0)
        self.cache: OrderedDict[Page, Tensor] = OrderedDict()  # least recently used first

    def house(self, pages: list[Page]) -> None:
        """Unless all pages may stay resident, give each a place in a store: a file without a name, which no exit leaves behind."""
        homeless = [page for page in pages if page.store is None]
        nbytes, offset = sum(page.nbytes for page in homeless), 0
        if homeless and sum(page.nbytes for page in pages) > self.budget:
            try:  # a tmpfs is memory too: point TMPDIR at a disk; unreserved, a full disk would kill us in mid-training
                with tempfile.TemporaryFile() as file:
                    getattr(os, "posix_fallocate", lambda fd, _, size: os.truncate(fd, size))(file.fileno(), 0, nbytes)
                    store = mmap.mmap(file.fileno(), nbytes)
            except OSError as error:
                fault = f"the store must hold {nbytes} bytes, got {error.strerror!r}; set TMPDIR or raise resident_bytes"
                raise OSError(error.errno, fault) from error
            for page in sorted(homeless, key=lambda page: -page.param.element_size()):  # wide first: all are aligned
                page.store, page.offset, offset = store, offset, offset + page.nbytes

    def fetch(self, page: Page, write: bool = False) -> Tensor:
        """The resident copy of a page, (2, m), good until the next fetch; `write` if the caller will change it."""
        self.counters["hits" if page in self.cache else "faults"] += 1
        if page not in self.cache:
            while self.resident + page.nbytes > self.budget:
                oldest, moments = self.cache.popitem(last=False)
                if not oldest.stored:
                    oldest.home().copy_(moments)
                    oldest.stored = True
                    self.counters["bytes_out"] += oldest.nbytes
                self.counters["evictions"] += 1
                self.resident -= oldest.nbytes
            self.cache[page] = page.param.new_empty(2, page.run.stop - page.run.start)
            self.resident, self.peak = self.resident + page.nbytes, max(self.peak, self.resident + page.nbytes)
            if page.stored:
                self.cache[page].copy_(page.home())
                self.counters["bytes_in"] += page.nbytes
        self.cache.move_to_end(page)
        page.stored &= not write
        return self.cache[page]

    def prefetch(self, pages: list[Page]) -> None:
        """Announce the stored ones of these pages to the operating system, if it listens."""
        for page in pages:
            if page.stored and page not in self.cache and hasattr(mmap, "MADV_WILLNEED"):
                lead = page.offset % mmap.PAGESIZE  # the range must start where a page of the system starts
                page.store.madvise(mmap.MADV_WILLNEED, page.offset - lead, lead + page.nbytes)
                self.counters["prefetches"] += 1


def adamw_(param: Tensor, grad: Tensor, moments: Tensor, step: int, group: StateDict) -> None:
    """Update a run of a parameter, (m,), and its moments, (2, m), in place; one temporary, (m,)."""
    exp_avg, exp_avg_sq = (moments if step > 1 else moments.zero_()).unbind()
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    # Each treats an element alike wherever it stands in a run. lerp_ of weight 1 (zero's sign) and half add_(alpha=) do not.
    param.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1) if beta1 else exp_avg.copy_(grad)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denom = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    param.addcdiv_(exp_avg, denom, value=-lr / (1 - beta1**step))


class PagedAdamW(Optimizer):
    """torch.optim.AdamW, of whose state at most resident_bytes bytes stay on the device (None: all of it).
    Three pages of two elements, two of which may stay: step 1 starts three and evicts one, step 2 reads and evicts three.
    >>> weight = torch.nn.Parameter(torch.ones(6))
    >>> optimizer = PagedAdamW([weight], page_bytes=16, resident_bytes=32)
    >>> for weight.grad in torch.ones(2, 6):
    ...     optimizer.step()
    >>> optimizer.counters
    {'hits': 0, 'faults': 6, 'evictions': 4, 'bytes_in': 48, 'bytes_out': 64, 'prefetches': 0}
    """
    def __init__(self, params: ParamsT, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01, page_bytes: int = 2**21, resident_bytes: int | None = None) -> None:
        require("page_bytes must be an int", type(page_bytes) is int, page_bytes, "give a whole number of bytes")
        budget = float("inf") if resident_bytes is None else resident_bytes
        require("resident_bytes must hold a page", budget >= page_bytes, resident_bytes, f"give {page_bytes} or more, or None")
        self.page_bytes, self.pager, self.pages = page_bytes, Pager(budget), dict[Tensor, list[Page]]()
        self.counters = self.pager.counters
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: StateDict) -> None:
        """Cut the group's state into pages. Raises: ValueError, OSError; the group is not added then."""
        super().add_param_group(param_group)
        group, pages = self.param_groups.pop(), {}
        for name in ("lr", "eps", "weight_decay"):
            require(f"{name} must be at least 0", group[name] >= 0, group[name], "give 0 or more")
        require("betas must lie in [0, 1)", all(0 <= beta < 1 for beta in group["betas"]), group["betas"], "try (0.9, 0.999)")
        for param in group["params"]:
            require("parameters must be real floating point", param.is_floating_point(), param.dtype, "convert or leave out")
            n, width, size = param.numel(), 2 * param.element_size(), self.page_bytes // (2 * param.element_size())
            require("a page must hold an element's moments", size > 0, self.page_bytes, f"set page_bytes to {width} or more")
            pages[param] = [Page(param, slice(i, min(i + size, n)), width * min(size, n - i)) for i in range(0, n, size)]
        self.pager.house([page for cut in (self.pages | pages).values() for page in cut])
        self.param_groups.append(group)
        self.pages |= pages

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update each parameter that has a gradient; return the closure's loss. Strided tensors are flattened into a copy."""
        with torch.enable_grad():
            loss = closure() if closure else None
        turns = [(param, group) for group in self.param_groups for param in group["params"] if param.grad is not None]
        for param, _ in turns:
            require("gradients must be dense", param.grad.layout == torch.strided, param.grad.layout, "call to_dense()")
        for (param, group), (following, _) in zip(turns, [*turns[1:], (None, None)]):
            self.pager.prefetch(self.pages.get(following, []))
            self.state[param]["step"] = step = self.state[param].get("step", 0) + 1
            flat, grad = param.contiguous().view(-1), param.grad.contiguous().view(-1)
            for page in self.pages[param]:
                adamw_(flat[page.run], grad[page.run], self.pager.fetch(page, write=True), step, group)
            if not param.is_contiguous():
                param.copy_(flat.view_as(param))
        return loss

    def state_dict(self) -> StateDict:
        """In torch.optim.AdamW's layout, with copies of the moments on the host. Counted like any other access."""
        packed = super().state_dict()
        for index, param in enumerate(self.pages):
            if index in packed["state"]:
                whole = torch.empty(2, *param.shape, dtype=param.dtype)
                for page in self.pages[param]:
                    whole.view(2, -1)[:, page.run] = self.pager.fetch(page)
                step, exp_avg, exp_avg_sq = float(self.state[param]["step"]), *whole.unbind()
                packed["state"][index] = {"step": torch.tensor(step), "exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()}
        return packed

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue from a state_dict of this class or torch.optim.AdamW's. Raises: ValueError, and nothing has changed."""
        state, indices = state_dict["state"], [index for group in state_dict["param_groups"] for index in group["params"]]
        slots = {param: state[index] for param, index in zip(self.pages, indices) if state.get(index)}
        unlike = [name for group in state_dict["param_groups"] for name in ("amsgrad", "maximize") if group.get(name)]
        require("amsgrad and maximize must be off", not unlike, unlike, "continue with torch.optim.AdamW")
        for param, slot in slots.items():
            shapes = [tuple(slot[name].shape) for name in ("exp_avg", "exp_avg_sq")]
            require(f"moments must be {tuple(param.shape)}", shapes == [param.shape] * 2, shapes, "load the state of this model")
        super().load_state_dict({**state_dict, "state": {}})
        for param, slot in slots.items():
            self.state[param]["step"] = int(slot["step"])
            whole = torch.stack([slot["exp_avg"].flatten(), slot["exp_avg_sq"].flatten()])  # (2, n)
            for page in self.pages[param]:
                self.pager.fetch(page, write=True).copy_(whole[:, page.run])

    def __getstate__(self) -> StateDict:
        raise TypeError("a PagedAdamW cannot be copied or pickled: its store has no name; save state_dict() instead")
