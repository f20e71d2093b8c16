"""AdamW over pages, and the pager that keeps a byte budget of them on the device.

AdamW keeps two moments for every trainable element but needs only a few of them at a time. When a
long batch makes the activations peak, the moments should leave the device, or the device runs out
of memory (paper, section 3, "Paged Optimizers"). For t = 1, 2, ... and a gradient g, the update is
that of torch.optim.AdamW (Loshchilov and Hutter, 2019):

    p <- p - lr * weight_decay * p
    m <- m + (1 - beta1) * (g - m)                  exp_avg, the first moment
    v <- beta2 * v + (1 - beta2) * g^2              exp_avg_sq, the second moment
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Each element is updated independently of the others. So a flattened parameter can be cut into runs
and updated run by run. The moments of a run of k elements are a page, (2, k):

    parameter    [ 0 1 2 3 | 4 5 6 7 | 8 9 ]        not paged; copied for the update if strided
    pages        [ m m m m | m m m m | m m ]        exp_avg: page 0, page 1, page 2
                 [ v v v v | v v v v | v v ]        exp_avg_sq
    resident     page 2, page 1                     within the budget, least recently used first
    store        [ page 0 | page 1 | page 2 ]       a place for each page (kernels/page_store.py)

    hit          the page is resident
    fault        the page is not resident: make room and load it, with its value if it has one
    evict        the least recently used page leaves; it is written if the store has an older value

A step visits all pages in a fixed order. This is the worst case for "least recently used": the page
that leaves is the one needed next. If the pages exceed the budget by any amount, every page faults
in every step, and all bytes move out and in. The counters show it. CUDA's driver has the same rule.

For a sharded parameter (a DTensor) each process pages the moments of its own rows only.

Error: none. A page is copied without change. For any page size and budget the bits are those of
torch.optim.AdamW (foreach=False, fused=False) with square roots rounded to nearest: float32 roots
of torch with Intel's MKL are one unit off on some processors. Exceptions are the payload of a NaN
and, where 1 - beta1 rounds to 1, the sign of a zero.

Differs from the paper and bitsandbytes: they page only large parameters, and the CUDA driver moves
memory when the device is full, without counting. Here all parameters are paged, the budget is
explicit, moves are counted, and no GPU is needed. On a GPU the driver moves pages as well.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from kernels import dispatch
from kernels.dtensor import from_local_shard, local_shard, shard_like
from kernels.page_store import Page, assign_places, new_store


class Pager:
    """Keeps at most `budget` bytes of pages resident and the others in a store.

    Two pages of 8 bytes and a budget for one. The last fetch loads the first page again:

    >>> first, second = (Page((2,), torch.float32, torch.device("cpu")) for _ in range(2))
    >>> pager = Pager(budget=8)
    >>> pager.reserve_store([first, second])
    >>> for page in (first, second, first):
    ...     moments = pager.fetch(page, write=True)
    >>> pager.counters
    {'hits': 0, 'faults': 3, 'evictions': 2, 'bytes_in': 8, 'bytes_out': 16, 'prefetches': 0}
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget  # bytes
        self.resident = 0  # bytes
        self.peak = 0  # the largest value of `resident` so far
        self.cache: OrderedDict[Page, Tensor] = OrderedDict()  # least recently used first
        names = ("hits", "faults", "evictions", "bytes_in", "bytes_out", "prefetches")
        self.counters = dict.fromkeys(names, 0)

    def reserve_store(self, pages: list[Page]) -> None:
        """Assign a place in a store to each page that needs one and has none.

        Raises: ValueError or OSError; then no page gets a new place.
        """
        largest = max((page.nbytes for page in pages), default=0)
        if largest > self.budget:
            raise ValueError(
                f"the budget must hold each page, got {self.budget}; give {largest} or more"
            )
        fits = sum(page.nbytes for page in pages) <= self.budget
        bounded = self.budget < float("inf")
        new_pages: dict[torch.device, list[Page]] = {}
        for page in pages:
            if page.store is None:
                new_pages.setdefault(page.device, []).append(page)
        stores = [  # all are made before the first page gets its place
            new_store(device, sum(page.nbytes for page in on_device), fits, bounded)
            for device, on_device in new_pages.items()
        ]
        for store, on_device in zip(stores, new_pages.values()):
            assign_places(on_device, store)

    def fetch(self, page: Page, write: bool = False) -> Tensor:
        """Return the resident tensor of a page, valid until the next fetch.

        Changes to it may be lost unless `write` is set.
        """
        if page in self.cache:
            self.counters["hits"] += 1
            self.cache.move_to_end(page)
        else:
            self.counters["faults"] += 1
            self._load(page)
        if write:
            page.saved = False
        return self.cache[page]

    def _load(self, page: Page) -> None:
        """Make room for a page and load it, with its value if it has one."""
        while self.resident + page.nbytes > self.budget:
            self._evict()
        self.cache[page] = page.store.load(page) if page.store else page.empty()
        self.resident += page.nbytes
        self.peak = max(self.peak, self.resident)
        if page.saved:
            self.counters["bytes_in"] += page.nbytes

    def _evict(self) -> None:
        """Remove the least recently used page; if the store has an older value, it is written."""
        page, tensor = self.cache.popitem(last=False)
        page.store.evict(page, tensor)
        if not page.saved:
            page.saved = True
            self.counters["bytes_out"] += page.nbytes
        self.resident -= page.nbytes
        self.counters["evictions"] += 1

    def prefetch(self, pages: list[Page]) -> None:
        """Tell the store that the pages of one parameter are needed soon."""
        if pages and pages[0].store:
            self.counters["prefetches"] += pages[0].store.prefetch(pages, self.cache)


def adamw_(param: Tensor, grad: Tensor, moments: Tensor, step: int, group: StateDict) -> None:
    """Update a run of a parameter (k,) and its moments (2, k) in place; steps count from 1.

    In step 1 the moments may hold anything, and count as 0.

    The kernels that dispatch.adamw chooses give the same bits.
    """
    if step == 1:
        moments.zero_()
    exp_avg, exp_avg_sq = moments.unbind()
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    weight_decay = group["weight_decay"]
    # The result for an element must not depend on its place in the run. add_(alpha=) is not used,
    # because in half precision its result does.
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    if 1 - beta1 >= 1 - 2**-25:
        # If the weight rounds to 1, lerp_ gives a zero a sign that depends on its place in the run.
        exp_avg.add_(0.0)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denom = sqrt(exp_avg_sq).div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    param.addcdiv_(exp_avg, denom, value=-lr / (1 - beta1**step))


def sqrt(x: Tensor) -> Tensor:
    """The square root, in float32 rounded to nearest.

    It is computed in float64. The root of a float32 number is never so close to the midpoint of two
    float32 numbers that the second rounding, to float32, chooses the wrong one.
    """
    if x.dtype != torch.float32:
        return x.sqrt()
    return dispatch.on_float64_device(x).double().sqrt_().to(x)


def check_group(group: StateDict) -> None:
    """Raise a ValueError unless the settings of a parameter group are those of an AdamW."""
    names = ("params", "lr", "betas", "eps", "weight_decay")
    missing = [name for name in names if name not in group]
    if missing:
        raise ValueError(
            f"no setting of a group may be missing, got none for {missing}; "
            "load the state of an AdamW"
        )
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} must be at least 0, got {group[name]}; give 0 or more")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must lie in [0, 1), got {group['betas']}; try (0.9, 0.999)")
    variants = [name for name in ("amsgrad", "maximize") if group.get(name)]
    if variants:
        raise ValueError(
            f"amsgrad and maximize must be off, got {variants}; continue with torch.optim.AdamW"
        )
    if not group.get("decoupled_weight_decay", True):
        raise ValueError(
            "weight decay must be decoupled, got the group of a torch.optim.Adam; "
            "continue with that class"
        )


def layout(param: Tensor) -> str:
    """What the pages of a parameter depend on: its shape, dtype and device."""
    return f"{tuple(param.shape)} in {param.dtype} on {param.device}"


class PagedAdamW(Optimizer):
    """torch.optim.AdamW with at most resident_bytes of its state on the device (None: all of it).

    On a GPU that shares pages with the host all state is in unified memory. With None, the driver
    then decides how much of it stays on the device.

    Three pages, two of which may be resident. The first step creates all three and evicts one;
    the second loads and evicts three:

    >>> weight = torch.nn.Parameter(torch.ones(6))
    >>> optimizer = PagedAdamW([weight], page_bytes=16, resident_bytes=32)
    >>> for grad in torch.ones(2, 6):
    ...     weight.grad = grad
    ...     optimizer.step()
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
        if type(page_bytes) is not int:
            raise ValueError(
                f"page_bytes must be an int, got {page_bytes}; give a whole number of bytes"
            )
        budget = float("inf") if resident_bytes is None else resident_bytes
        if not budget >= page_bytes:
            raise ValueError(
                f"resident_bytes must hold a page, got {budget}; give {page_bytes} or more, or None"
            )
        self.page_bytes = page_bytes
        self.pages: dict[Tensor, list[Page]] = {}
        self.layouts: dict[Tensor, str] = {}
        self.pager = Pager(budget)
        self.counters = self.pager.counters
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: StateDict) -> None:
        """Cut the state of a group into pages.

        Raises: ValueError or OSError; then the group is not added.
        """
        super().add_param_group(param_group)
        group = self.param_groups.pop()  # added again once it is valid and has its pages
        check_group(group)
        pages = self.pages | {param: self._cut(param) for param in group["params"]}
        self.pager.reserve_store([page for cut in pages.values() for page in cut])
        self.param_groups.append(group)
        self.pages = pages
        self.layouts |= {param: layout(param) for param in group["params"]}

    def _cut(self, param: Tensor) -> list[Page]:
        """The pages of a parameter: its moments in runs of at most page_bytes."""
        if not param.is_floating_point():
            raise ValueError(
                f"parameters must be real floating point, got {param.dtype}; convert them"
            )
        n = local_shard(param).numel()
        element_bytes = 2 * param.element_size()  # both moments of an element
        k = self.page_bytes // element_bytes
        if k < 1:
            raise ValueError(
                f"page_bytes must hold an element's moments, got {self.page_bytes}; "
                f"give {element_bytes} or more"
            )
        return [Page((2, min(k, n - start)), param.dtype, param.device) for start in range(0, n, k)]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update each parameter that has a gradient; returns the loss of the closure."""
        with torch.enable_grad():
            loss = closure() if closure else None
        updates = [
            (param, group)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        for param, _ in updates:
            self._check(param)
        for index, (param, group) in enumerate(updates):
            if index + 1 < len(updates):
                next_param, _ = updates[index + 1]
                self.pager.prefetch(self.pages[next_param])
            self._update(param, group)
        return loss

    def _check(self, param: Tensor) -> None:
        """Raise a ValueError if a parameter no longer fits its pages, or its gradient is sparse."""
        if layout(param) != self.layouts[param]:
            raise ValueError(
                f"a parameter must keep its shape, dtype and device, got {layout(param)} after "
                f"{self.layouts[param]}; cast or move the model before you make the PagedAdamW"
            )
        if param.grad.layout != torch.strided:
            raise ValueError(f"gradients must be dense, got {param.grad.layout}; call to_dense()")

    def _update(self, param: Tensor, group: StateDict) -> None:
        step = self.state[param].get("step", 0) + 1
        self.state[param]["step"] = step
        shard = local_shard(param.detach())
        flat = shard.contiguous().view(-1)  # (n,)
        flat_grad = local_shard(param.grad).contiguous().view(-1)  # (n,)
        kernel = dispatch.adamw(flat, flat_grad, step, group)
        start = 0
        for page in self.pages[param]:
            moments = self.pager.fetch(page, write=True)  # (2, k)
            end = start + page.shape[1]
            if kernel:
                kernel(start, moments)
            else:
                adamw_(flat[start:end], flat_grad[start:end], moments, step, group)
            start = end
        if not shard.is_contiguous():
            shard.copy_(flat.view_as(shard))

    def state_dict(self) -> StateDict:
        """The state in torch.optim.AdamW's layout, with copies of the moments on the host.

        The moments of a sharded parameter have its sharding and its device. Fetches are counted.
        """
        packed = super().state_dict()
        for index, param in enumerate(self.pages):
            if index in packed["state"]:
                exp_avg, exp_avg_sq = self._read_moments(param)
                packed["state"][index] = {
                    "step": torch.tensor(float(self.state[param]["step"])),
                    "exp_avg": exp_avg,
                    "exp_avg_sq": exp_avg_sq,
                }
        return packed

    def _read_moments(self, param: Tensor) -> list[Tensor]:
        shard = local_shard(param)
        moments = torch.empty(2, shard.numel(), dtype=param.dtype)  # (2, n)
        for page, run in self._runs(param, moments):
            run.copy_(self.pager.fetch(page))
        # Cloned, because safetensors does not write tensors that share a storage.
        return [from_local_shard(moment.clone().view(shard.shape), param) for moment in moments]

    def _runs(self, param: Tensor, moments: Tensor) -> Iterable[tuple[Page, Tensor]]:
        """Each page of a parameter with its view (2, k) of the parameter's moments (2, n)."""
        pages = self.pages[param]
        return zip(pages, moments.split([page.shape[1] for page in pages], dim=1))

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue from a state_dict of this class or of torch.optim.AdamW.

        Raises: ValueError; then nothing has changed.
        """
        loaded = self._checked_state(state_dict)
        super().load_state_dict({**state_dict, "state": {}})
        for param, state in loaded.items():
            self.state[param]["step"] = int(state["step"])
            exp_avg, exp_avg_sq = (
                local_shard(shard_like(state[name], param)).flatten()
                for name in ("exp_avg", "exp_avg_sq")
            )
            for page, run in self._runs(param, torch.stack([exp_avg, exp_avg_sq])):
                self.pager.fetch(page, write=True).copy_(run)

    def _checked_state(self, state_dict: StateDict) -> dict[Tensor, StateDict]:
        """The state of each parameter in a state_dict.

        Raises: ValueError unless it is the state of an AdamW and fits the parameters.
        """
        missing = [key for key in ("state", "param_groups") if key not in state_dict]
        if missing:
            raise ValueError(f"{missing[0]} must not be missing; load the state of an AdamW")
        indices = []
        for group in state_dict["param_groups"]:
            check_group(group)
            indices += group["params"]
        states = {
            param: state_dict["state"][index]
            for param, index in zip(self.pages, indices)
            if state_dict["state"].get(index)
        }
        for param, state in states.items():
            shapes = {"step": (), "exp_avg": tuple(param.shape), "exp_avg_sq": tuple(param.shape)}
            for name, shape in shapes.items():
                value = state.get(name)
                found = "nothing" if value is None else tuple(torch.as_tensor(value).shape)
                if found != shape:
                    raise ValueError(
                        f"{name} must have shape {shape}, got {found}; "
                        "load AdamW's state of this model"
                    )
        return states

    def __getstate__(self) -> StateDict:
        raise TypeError(
            "a PagedAdamW cannot be copied or pickled, because its store has no name; "
            "save state_dict() instead"
        )
