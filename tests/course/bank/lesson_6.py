"""Answers to lesson 6: the update of AdamW, and the pager."""

from bank.answers import Answer

SAYS = "A page says"
HELD = "The pages that are held"
RECENT = "The page that leaves"
CLEAN = "A page that leaves is written"
RECOUNT = "Hits, faults"
MOVES = "If the pages exceed"
ROUNDING = "Two hundred updates"
BITS = "An update has the bits"
ONE_PAGE = "Any page size"

DENOM = 'sqrt(exp_avg_sq).div_((1 - beta2**step) ** 0.5).add_(group["eps"])'
DECAY = "param.mul_(1 - lr * weight_decay)"
ROOM = "while self.resident + page.nbytes > self.budget:"

WRONG = [
    Answer(
        "a write counts at a fault alone, not at a hit",
        SAYS,
        {
            "(page)\n        if write:\n            page.saved = False\n": "(page)\n"
            "            if write:\n                page.saved = False\n"
        },
    ),
    Answer(
        "a page that is read counts as saved",
        SAYS,
        {"        if write:\n            page.saved = False\n": "        page.saved = not write\n"},
    ),
    Answer(
        "a page that was written before is not written again",
        SAYS,
        {"if write:": "if write and not page.saved:"},
        shows="to write",
    ),
    Answer(
        "a page leaves without being written",
        SAYS,
        {"page.store.evict(page, tensor)": "None"},
    ),
    Answer(
        "a page is marked as saved before it is written",
        SAYS,
        functions={
            "Pager._evict": """
    def _evict(self):
        page, tensor = self.cache.popitem(last=False)
        if not page.saved:
            page.saved = True
            self.counters["bytes_out"] += page.nbytes
        page.store.evict(page, tensor)
        self.resident -= page.nbytes
        self.counters["evictions"] += 1
"""
        },
    ),
    Answer(
        "a page always starts empty",
        SAYS,
        {"page.store.load(page) if page.store else page.empty()": "page.empty()"},
    ),
    Answer(
        "room is made after the page was loaded",
        HELD,
        functions={
            "Pager._load": """
    def _load(self, page):
        self.cache[page] = page.store.load(page) if page.store else page.empty()
        self.resident += page.nbytes
        if page.saved:
            self.counters["bytes_in"] += page.nbytes
        while self.resident > self.budget:
            self._evict()
        self.peak = max(self.peak, self.resident)
"""
        },
        shows="bytes held",
    ),
    Answer(
        "one page leaves, however large the next one is",
        HELD,
        {ROOM: "if self.resident + page.nbytes > self.budget:"},
    ),
    Answer(
        "a page more than the budget",
        HELD,
        {ROOM: "while self.resident > self.budget:"},
    ),
    Answer(
        "a page that has left is kept for later",
        HELD,
        {
            "page.store.evict(page, tensor)": "page.store.evict(page, tensor)\n"
            "        self.counters.setdefault('kept', []).append(tensor)"
        },
    ),
    Answer(
        "the peak is what is resident now",
        HELD,
        {"max(self.peak, self.resident)": "self.resident"},
        shows="peak",
    ),
    Answer(
        "first in, first out",
        RECENT,
        {"            self.cache.move_to_end(page)\n": ""},
        shows="wanted [0, 2], got [1, 2]",
    ),
    Answer(
        "the smallest page leaves first",
        RECENT,
        {
            "page, tensor = self.cache.popitem(last=False)": "page = min("
            "self.cache, key=lambda page: page.nbytes)\n"
            "        tensor = self.cache.pop(page)"
        },
    ),
    Answer(
        "one page less than the budget",
        RECENT,
        {ROOM: "while self.cache and self.resident + page.nbytes >= self.budget:"},
    ),
    Answer(
        "every page that leaves is written",
        CLEAN,
        {"if write:": "if True:"},
        shows="bytes_out: wanted 32, got 48",
    ),
    Answer(
        "a page without a value counts as read from the store",
        RECOUNT,
        {"if page.saved:\n            self.counters": "if page.store:\n            self.counters"},
        shows="bytes_in",
    ),
    Answer(
        "only pages that are written count as evicted",
        RECOUNT,
        functions={
            "Pager._evict": """
    def _evict(self):
        page, tensor = self.cache.popitem(last=False)
        self.resident -= page.nbytes
        if not page.saved:
            page.store.evict(page, tensor)
            page.saved = True
            self.counters["bytes_out"] += page.nbytes
            self.counters["evictions"] += 1
"""
        },
        shows="evictions",
    ),
    Answer(
        "the page that was used last leaves, which saves moves in a step of AdamW",
        MOVES,
        {"popitem(last=False)": "popitem(last=True)"},
    ),
    Answer(
        "the moments are not corrected for their bias",
        ROUNDING,
        {
            ".div_((1 - beta2**step) ** 0.5)": "",
            "value=-lr / (1 - beta1**step))": "value=-lr)",
        },
        shows="paged_optim.adamw_(",
    ),
    Answer(
        "the correction of the bias is a step late",
        ROUNDING,
        {
            ".div_((1 - beta2**step) ** 0.5)": ".div_((1 - beta2 ** (step + 1)) ** 0.5)",
            "value=-lr / (1 - beta1**step))": "value=-lr / (1 - beta1 ** (step + 1)))",
        },
    ),
    Answer(
        "eps is inside the square root",
        ROUNDING,
        {DENOM: 'exp_avg_sq.div(1 - beta2**step).add_(group["eps"]).sqrt_()'},
    ),
    Answer(
        "eps is added before the correction",
        ROUNDING,
        {DENOM: 'sqrt(exp_avg_sq).add_(group["eps"]).div_((1 - beta2**step) ** 0.5)'},
    ),
    Answer(
        "decay goes into the gradient",
        ROUNDING,
        {DECAY: "grad = grad.add(param, alpha=weight_decay)"},
    ),
    Answer(
        "decay is not multiplied by lr",
        ROUNDING,
        {DECAY: "param.mul_(1 - weight_decay)"},
    ),
    Answer(
        "the moments start as what the memory holds",
        ROUNDING,
        {"        moments.zero_()\n": "        pass\n"},
    ),
    Answer(
        "the second moment is that of the gradient's magnitude",
        ROUNDING,
        {"addcmul_(grad, grad, value=1 - beta2)": "add_(grad.abs() * (1 - beta2))"},
    ),
    Answer(
        "the first moment is a sum of two products",
        BITS,
        {"exp_avg.lerp_(grad, 1 - beta1)": "exp_avg.mul_(beta1).add_(grad * (1 - beta1))"},
    ),
    Answer(
        "the update is computed in float64 and rounded at the end",
        BITS,
        functions={
            "adamw_": """
def adamw_(param, grad, moments, step, group):
    if step == 1:
        moments.zero_()
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    p, g, m, v = param.double(), grad.double(), moments[0].double(), moments[1].double()
    p = p * (1 - lr * group["weight_decay"])
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    root = v.sqrt() / (1 - beta2**step) ** 0.5 + group["eps"]
    param.copy_(p - lr / (1 - beta1**step) * m / root)
    moments[0].copy_(m)
    moments[1].copy_(v)
"""
        },
    ),
    Answer(
        "the sign of a zero depends on its place in the page",
        ONE_PAGE,
        {"        exp_avg.add_(0.0)\n": "        pass\n"},
    ),
]

RIGHT = [
    Answer(
        "the time of the last use of each page, in one function",
        edits={
            "        self.resident = 0  # bytes\n": "        self.resident = 0  # bytes\n"
            "        self._time = 0\n        self._last_use = {}\n"
        },
        functions={
            "Pager.fetch": """
    def fetch(self, page, write=False):
        self._time += 1
        self._last_use[page] = self._time
        if page in self.cache:
            self.counters["hits"] += 1
            page.saved = page.saved and not write
            return self.cache[page]
        self.counters["faults"] += 1
        while page.nbytes > self.budget - self.resident:
            old = min(self.cache, key=self._last_use.get)
            page_of_store = self.cache.pop(old)
            self.resident -= old.nbytes
            self.counters["evictions"] += 1
            if not old.saved:
                old.store.evict(old, page_of_store)
                self.counters["bytes_out"] += old.nbytes
                old.saved = True
            page_of_store = None
        if page.saved:
            self.counters["bytes_in"] += page.nbytes
        tensor = page.empty() if page.store is None else page.store.load(page)
        self.cache[page] = tensor
        self.resident += page.nbytes
        self.peak = max(self.peak, self.resident)
        page.saved = page.saved and not write
        return tensor
""",
            "Pager._load": "",
            "Pager._evict": "",
        },
    ),
    Answer(
        "a dictionary in the order of use, and new tensors in the update",
        edits={
            "            self.cache.move_to_end(page)\n": "            "
            "self.cache[page] = self.cache.pop(page)\n",
            "page, tensor = self.cache.popitem(last=False)": "page = next(iter(self.cache))\n"
            "        tensor = self.cache.pop(page)",
        },
        functions={
            "adamw_": """
def adamw_(param, grad, moments, step, group):
    beta1, beta2 = group["betas"]
    m, v = torch.zeros_like(moments) if step == 1 else moments
    m = torch.lerp(m, grad, 1 - beta1)
    m = m + 0.0 if 1 - beta1 >= 1 - 2**-25 else m
    v = torch.addcmul(v * beta2, grad, grad, value=1 - beta2)
    lr = float(group["lr"])
    decayed = param * (1 - lr * group["weight_decay"]) if group["weight_decay"] else param
    root = sqrt(v) / (1 - beta2**step) ** 0.5 + group["eps"]
    param.copy_(torch.addcdiv(decayed, m, root, value=-lr / (1 - beta1**step)))
    moments.copy_(torch.stack([m, v]))
"""
        },
    ),
]
