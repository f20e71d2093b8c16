"""Which pages are on the device while AdamW steps, and what a step moves for each budget."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kernels.page_store import Page
from paged_optim import Pager

PAGES = 6
PAGE_BYTES = 2**21
BUDGET = 4  # pages, in the first panel
STEPS = 3  # in the first panel
LATER_STEPS = 30  # in the second panel, after a first step that creates the pages


class LastOut(Pager):
    """Evicts the page that was used last."""

    def _evict(self) -> None:
        self.cache.move_to_end(next(reversed(self.cache)), last=False)
        super()._evict()


def started(pager: Pager) -> list[Page]:
    """Pages as AdamW cuts them: two moments of each element in float32."""
    shape = (2, PAGE_BYTES // 8)
    pages = [Page(shape, torch.float32, torch.device("cpu")) for _ in range(PAGES)]
    pager.reserve_store(pages)
    return pages


def bytes_of_a_step(pager: Pager) -> float:
    """In and out, on average over the later steps. A step fetches each page once, to write it."""
    pages = started(pager)
    moved = []
    for _ in range(1 + LATER_STEPS):
        for page in pages:
            pager.fetch(page, write=True)
        moved.append(pager.counters["bytes_in"] + pager.counters["bytes_out"])
    return (moved[-1] - moved[0]) / LATER_STEPS


def draw(figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    draw_resident_pages(left)
    draw_bytes(right)


def draw_resident_pages(axes: Axes) -> None:
    pager = Pager(BUDGET * PAGE_BYTES)
    pages = started(pager)
    for time, index in enumerate(list(range(PAGES)) * STEPS):
        is_hit = pages[index] in pager.cache
        pager.fetch(pages[index], write=True)
        for place, page in enumerate(pages):
            if page in pager.cache:
                axes.broken_barh([(time - 0.5, 1)], (place - 0.4, 0.8), color="#9db8d2")
        marker = "o" if is_hit else "x"
        axes.plot(time, index, marker, color="#b5442e", markersize=5)
    for step in range(1, STEPS):
        axes.axvline(step * PAGES - 0.5, color="gray", linewidth=0.8, linestyle=":")
    axes.set_title(f"{PAGES} pages, room for {BUDGET}: every fetch (x) is a fault", fontsize=10)
    axes.set_xlabel(f"fetch ({PAGES} to a step)")
    axes.set_ylabel("page (blue: on the device)")
    axes.set_xticks(range(0, STEPS * PAGES, 3))
    axes.invert_yaxis()


def draw_bytes(axes: Axes) -> None:
    budgets = range(1, PAGES + 2)
    rules = [
        (Pager, "least recently used leaves", "o-", "#b5442e"),
        (LastOut, "last used leaves", "s--", "#1f3a5f"),
    ]
    for pager, label, style, color in rules:
        moved = [bytes_of_a_step(pager(budget * PAGE_BYTES)) / 2**20 for budget in budgets]
        axes.plot(budgets, moved, style, color=color, label=label)
    axes.axvline(PAGES, color="gray", linewidth=0.8, linestyle=":")
    axes.set_title("What a step moves", fontsize=10)
    axes.set_xlabel(f"budget (pages; the optimizer has {PAGES})")
    axes.set_ylabel("MiB in and out")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
