"""The static page: it is built as documented, and its widgets compute what the Python code does.

The widgets run in a headless Chromium (helpers/browser.py), and are used by keyboard.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from coverage import Coverage

import double_quant
import nf4
from course.page import build, export, notebook
from course.page.markdown import picture_size, render
from cuda_kernels import dequantize
from helpers import warpsim
from helpers.bounds import gamma
from helpers.browser import INSTALL, Browser, find
from kernels.page_store import Page
from memory.__main__ import CARDS
from memory.formula import METHODS, OUTSIDE_TORCH, QLORA, SHAPES, Shape, constant_bytes, predict
from paged_optim import Pager
from paper import codebooks

WIDGETS = sorted(export.TABLES)
PHONE = 360
FIGURE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 200"><path d="M0 0H9"/></svg>'
LESSON = r"""# Levels at the `quantiles` of a normal

## What you will know

- how `quantize` finds the nearest level, from the [figure](figure.svg) and the
  [next lesson](../3_next/lesson.md#what-you-will-know)

## The idea

$$ \mathrm{code}_j = \operatorname*{arg\,min}_i \left| \frac{w_j}{\mathrm{absmax}}
- \mathrm{level}_i \right|, \qquad |w - \hat w| \le h \cdot \mathrm{absmax} \text{ for each } j $$

so that $h = 0.1519$; a price of $5 and $6 is no formula.

![The levels](figure.svg)

<!-- widget: bins -->

<!-- widget: code -->

## Predict

<details>
<summary>Answer</summary>

Seven: $2^3 - 1$ levels are *negative*.

</details>

## A worked example

```python
>>> bits = 2
>>> [round(level, 4) for level in nf4.normal_float(bits).tolist()]  # a comment that makes it long
[-1.0, 0.0, 0.4358, 1.0]
```

```
plain text
```

| code | a column with a long heading | another column | and one more of them |
|---|---|---|---|
| NF4 | quantiles | 0.1519 | a_name_that_has_no_place_to_break_on_a_phone |

<!-- widget: pager -->

<!-- widget: memory -->

<!-- widget: warp -->

<!-- widget: adapters -->
"""
NEXT = "# The next lesson\n\n## What you will know\n\nSee [the code](../2_levels/figure.svg).\n"


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    course = tmp_path_factory.mktemp("course")
    for name, text in (("2_levels", LESSON), ("3_next", NEXT)):
        (course / name).mkdir()
        (course / name / "lesson.md").write_text(text)
    (course / "2_levels/figure.svg").write_text(FIGURE)
    return build.lessons(course)


@pytest.fixture(scope="module")
def site(lessons: list[Path]) -> Path:
    folder = lessons[0].parent.parent / "site"
    build.build(lessons, folder)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find()
    if path is None:
        pytest.fail(INSTALL, pytrace=False)
    browser = Browser(path)
    yield browser
    browser.close()


@pytest.fixture
def page(browser: Browser, site: Path) -> Iterator[Browser]:
    """The lesson with all widgets in a wide window; at the end the console must be empty."""
    browser.show(site / "2_levels.html")
    yield browser
    assert browser.problems == []


# building


def test_two_builds_give_the_same_bytes(lessons: list[Path], site: Path, tmp_path: Path) -> None:
    again = build.build(lessons, tmp_path)
    assert [path.name for path in again] == ["index.html", "2_levels.html", "3_next.html"]
    # Links to files outside the site depend on where it is: so compare at one place.
    first = {path.name: path.read_bytes() for path in site.iterdir()}
    (site / "removed.html").write_text("of a lesson that is gone")
    build.build(lessons, site)
    assert {path.name: path.read_bytes() for path in site.iterdir()} == first


def test_the_site_is_small(site: Path) -> None:
    assert sum(path.stat().st_size for path in site.iterdir()) <= build.LARGEST == 2 * 10**6


def test_the_command_builds_the_lessons_of_the_course(
    lessons: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build, "COURSE", lessons[0].parent.parent)
    monkeypatch.setattr(build, "SITE", tmp_path / "site")
    build.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("wrote ") and "index.html" in lines[0]


def test_links_lead_to_pages_and_to_files(lessons: list[Path], site: Path) -> None:
    text = (site / "2_levels.html").read_text()
    assert 'href="3_next.html#what-you-will-know"' in text
    assert 'href="../2_levels/figure.svg"' in text
    assert '<a href="2_levels.html">' in (site / "index.html").read_text()


def test_formulas_code_and_pictures_are_in_the_page_itself(site: Path) -> None:
    text = (site / "2_levels.html").read_text()
    assert text.count("<math") == 3 and "$5 and $6" in text
    assert '<span class="gp">&gt;&gt;&gt; </span>' in text
    assert 'src="data:image/svg+xml;base64,' in text and 'width="600" height="200"' in text
    assert "<title>Levels at the quantiles of a normal</title>" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Text without a title.", "must begin with its title"),
        ("", "must begin with its title"),
        ("# A\n\n[b](missing.py)", "links to missing.py, which does not exist"),
        ("# A\n\n![b](missing.svg)", "shows missing.svg, which does not exist"),
        ("# A\n\n<!-- widget: missing -->", "got missing, so correct its name"),
        ("# A\n\n$\\missing$", "got \\missing; try simpler commands"),
    ],
)
def test_a_lesson_that_cannot_be_built_is_refused_in_one_line(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "1_wrong").mkdir()
    path = tmp_path / "1_wrong/lesson.md"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        build.build([path], tmp_path / "site")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_site_that_is_too_large_is_refused(
    lessons: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "LARGEST", 1000)
    with pytest.raises(ValueError, match="the site may have 1,000 bytes, got "):
        build.build(lessons, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_picture_has_the_size_of_its_file() -> None:
    assert picture_size((build.COURSE.parent / "paper/nf4_levels.png").read_bytes()) == (1430, 468)
    assert picture_size(FIGURE.encode()) == (600, 200)
    with pytest.raises(ValueError, match="must be a PNG or an SVG with a viewBox"):
        picture_size(b"<svg></svg>")


def test_a_png_is_embedded_too(tmp_path: Path) -> None:
    picture = (build.COURSE.parent / "paper/nf4_levels.png").read_bytes()
    (tmp_path / "figure.png").write_bytes(picture)
    (tmp_path / "lesson.md").write_text("# A\n\n![b](figure.png)\n\n[c](https://arxiv.org)")
    body = render(tmp_path / "lesson.md", str).body
    assert 'src="data:image/png;base64,' in body and 'href="https://arxiv.org"' in body


# slides and notebooks


@pytest.fixture
def unmeasured() -> Iterator[None]:
    """Coverage follows the lanes of the simulator only where test_cuda_kernels.py sets it up."""
    measuring = Coverage.current()
    if measuring:
        measuring.stop()
    yield
    if measuring:
        measuring.start()


@pytest.fixture
def deck(browser: Browser, lessons: list[Path], tmp_path: Path) -> Path:
    return build.slides(lessons[0], tmp_path)


def test_each_section_is_a_slide_and_arrow_keys_turn_them(browser: Browser, deck: Path) -> None:
    browser.show(deck, 1280, 720)
    assert browser.run("document.querySelectorAll('.slide').length") == 1 + 4
    top = """[...document.querySelectorAll(".slide")].findIndex(function (slide) {
      return Math.abs(slide.getBoundingClientRect().top) < 2;
    })"""
    browser.show(deck, 1280, 5000)  # each slide fits
    for key, place in (("ArrowRight", 1), ("PageDown", 2), ("ArrowLeft", 1), ("ArrowRight", 2)):
        browser.press(key)
        assert browser.run(top) == place
    for _ in range(9):
        browser.press("PageDown")
    assert browser.run(top) == 4  # the last
    assert browser.problems == []


def test_a_slide_that_is_too_long_is_shown_to_its_end_before_the_next(
    browser: Browser, deck: Path
) -> None:
    browser.show(deck, 1280, 400)
    ends = browser.run("""[...document.querySelectorAll(".slide")].map(function (slide) {
      const { top, bottom } = slide.getBoundingClientRect();
      return [Math.ceil(top), Math.floor(bottom)];
    })""")
    seen = set()
    for _ in range(ends[-1][1] // 100):
        top = int(browser.run("scrollY"))
        seen |= {*range(top, top + 401)}
        browser.press("ArrowRight")
    for top, bottom in ends:
        assert seen >= {*range(top, bottom)}, "every line was on the screen"
    for _ in range(ends[-1][1] // 100):
        browser.press("ArrowLeft")
    assert browser.run("scrollY") == 0


def test_a_slider_keeps_its_arrow_keys_in_slides(browser: Browser, deck: Path) -> None:
    browser.show(deck)
    press(browser, "bins", "block size", "ArrowRight")
    place = browser.run("scrollY")
    press(browser, "bins", "block size", "ArrowRight")
    assert browser.run("scrollY") == place
    said = "document.querySelector('#widget-bins output').textContent"
    assert browser.run(said) == "256 weights"


def test_the_cells_of_a_notebook_run_and_give_the_values_of_the_lesson(
    lessons: list[Path], tmp_path: Path
) -> None:
    path = notebook.write(lessons[0], tmp_path)
    assert path.name == "2_levels.ipynb"
    cells = json.loads(path.read_text())["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    texts = "".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")
    assert "widget" not in texts and "](../2_levels/figure.svg)" in texts
    assert "[next lesson](../3_next/lesson.md#what-you-will-know)" in texts
    first, cell = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert first == notebook.FIRST
    names: dict[str, object] = {"nf4": nf4}
    statement, expression = cell.splitlines()
    exec(statement, names)
    assert eval(expression, names) == [-1.0, 0.0, 0.4358, 1.0]


def test_examples_that_are_folded_become_hidden_cells_after_the_text(tmp_path: Path) -> None:
    folded = "<details>\n\nSeven.\n\n```python\n>>> x = 1\n```\n\n</details>\n"
    hint = "<details>\n\n```python\ny = ...\n```\n\n</details>\n"
    (tmp_path / "lesson.md").write_text(f"# A\n\n{folded}\n{hint}\n```python\n>>> x\n1\n```\n")
    path = notebook.write(tmp_path / "lesson.md", tmp_path)
    cells = json.loads(path.read_text())["cells"]
    assert [(cell["source"], cell["metadata"]) for cell in cells] == [
        (notebook.FIRST, {}),
        ("# A\n\n<details>\n\nSeven.\n\n\n</details>", {}),
        ("x = 1", {"jupyter": {"source_hidden": True}}),
        (hint.strip(), {}),
        ("x", {}),
    ]


def test_the_notebooks_of_the_course_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unmeasured: None
) -> None:
    """Their cells in one namespace, without a kernel of Jupyter."""
    monkeypatch.syspath_prepend(tmp_path)  # what the first cell adds is taken away again
    for lesson in build.lessons(build.COURSE):
        monkeypatch.chdir(lesson.parent)  # as deep as the folder of the notebooks
        cells = json.loads(notebook.write(lesson, tmp_path).read_text())["cells"]
        names: dict[str, object] = {"__name__": lesson.parent.name}
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile(cell["source"], lesson, "exec"), names)


# the page


@pytest.mark.parametrize("name", ["index.html", "2_levels.html", "3_next.html"])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_loads_nothing_else_and_the_console_stays_empty(
    browser: Browser, site: Path, name: str, dark: bool
) -> None:
    browser.show(site / name, dark=dark)
    assert browser.run("performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    assert browser.run("document.querySelectorAll('h1').length") == 1
    assert browser.problems == []


@pytest.mark.parametrize("name", ["index.html", "2_levels.html", "3_next.html"])
def test_a_phone_needs_no_horizontal_scrolling(browser: Browser, site: Path, name: str) -> None:
    browser.show(site / name, PHONE, 740)
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") == PHONE


def test_the_lessons_of_the_course_become_a_site_that_a_phone_can_show(
    browser: Browser, tmp_path: Path
) -> None:
    for path in build.build(build.lessons(build.COURSE), tmp_path):
        browser.show(path, PHONE, 740)
        browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert browser.run("document.documentElement.scrollWidth") == PHONE, path.name
    assert browser.problems == []


USE_EVERYTHING = """
for (const input of document.querySelectorAll("input[type=range]")) {
  for (const value of [input.min, input.max, (Number(input.min) + Number(input.max)) / 2]) {
    input.value = value;
    input.dispatchEvent(new Event("input"));
    await frame();
  }
}
const clicked = ".widget :is(button, [type=radio], [type=checkbox])";
for (const button of document.querySelectorAll(clicked)) {
  for (let i = 0; i < 3; i++) {
    button.click();
    await frame();
  }
}
for (const select of document.querySelectorAll("select")) {
  for (const option of select.options) {
    select.value = option.value;
    select.dispatchEvent(new Event("change"));
    await frame();
  }
}
"""
OBSERVE = """
  let shifts = 0;
  const observer = new PerformanceObserver(function (list) {
    for (const entry of list.getEntries()) shifts += entry.value;
  });
  observer.observe({ type: "layout-shift", buffered: true });
  const frame = () => new Promise(requestAnimationFrame);
"""


@pytest.mark.parametrize("width", [PHONE, 1280])
def test_nothing_moves_while_the_page_loads_and_while_all_widgets_are_used(
    browser: Browser, site: Path, width: int
) -> None:
    """As the page scrolls past: shifts outside the window do not count."""
    browser.show(site / "2_levels.html", width, 20_000)
    script = f"(async () => {{ {OBSERVE} {USE_EVERYTHING} await frame(); return shifts; }})()"
    assert browser.run(script) == 0
    assert browser.problems == []


def test_the_observer_sees_a_shift(page: Browser) -> None:
    """The test above could fail."""
    script = "document.querySelector('h1').style.marginTop = '99px'; await frame(); await frame();"
    assert page.run(f"(async () => {{ {OBSERVE} {script} return shifts; }})()") > 0


def test_every_control_is_reached_by_tab_has_a_name_and_shows_the_focus(page: Browser) -> None:
    page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    described = """
      (function () {
        const seen = document.activeElement;
        const shown = seen.matches("[type=radio]") ? seen.nextElementSibling : seen;
        const name = [...(seen.labels || [])].map((label) => label.textContent).join();
        window.all = [...document.querySelectorAll("a, button, input, select, summary, pre")];
        return {
          place: all.indexOf(seen),
          name: name || seen.textContent,
          outline: getComputedStyle(shown).outlineStyle,
        };
      })()
    """
    reached = {}
    for _ in range(200):
        page.press("Tab")
        seen = page.run(described)
        if seen["place"] in reached:
            break
        reached[seen["place"]] = seen
    assert all(seen["name"].strip() and seen["outline"] != "none" for seen in reached.values())
    # Of radio buttons only the chosen one is reached; what is disabled or hidden is not.
    expected = page.run(
        """all.flatMap(function (each, i) {
          const isOther = each.type === "radio" && !each.checked;
          return each.disabled || isOther || !each.checkVisibility() ? [] : i;
        })"""
    )
    assert {*expected} <= {*reached}


def background(browser: Browser) -> str:
    return browser.run("getComputedStyle(document.body).backgroundColor")


def test_the_theme_follows_the_system_until_the_reader_chooses(
    browser: Browser, site: Path
) -> None:
    path = site / "2_levels.html"
    browser.show(path, dark=True)
    dark = background(browser)
    browser.show(path)
    light = background(browser)
    assert light != dark
    browser.run("document.getElementById('theme').focus()")
    browser.press("Enter")
    assert background(browser) == dark
    browser.show(path)  # loaded again
    assert background(browser) == dark
    assert browser.run("document.getElementById('theme').textContent") == "Light"
    browser.run("document.getElementById('theme').focus()")
    browser.press(" ")
    assert background(browser) == light
    browser.run("localStorage.clear()")
    assert browser.problems == []


def test_paper_gets_the_text_without_the_controls(page: Browser) -> None:
    page.command("Emulation.setEmulatedMedia", media="print")
    shown = "getComputedStyle(document.querySelector('{}')).display !== 'none'"
    hidden = ["#theme", ".controls", ".contents", ".skip"]
    assert not any(page.run(shown.format(name)) for name in hidden)
    assert page.run(shown.format("h1")) and page.run(shown.format("#widget-bins svg"))


# widgets


def numbers(page: Browser, widget: str) -> dict[str, str]:
    """The named numbers that a widget shows."""
    return page.run(
        f"Object.fromEntries([...document.querySelectorAll('#widget-{widget} dd')]"
        ".map((cell) => [cell.dataset.name, cell.textContent]))"
    )


def focus(page: Browser, widget: str, label: str) -> None:
    """Focus the control of a widget whose label begins so."""
    script = """(widget, label) => {
      const place = document.getElementById("widget-" + widget);
      const controls = [...place.querySelectorAll("input, select, button")];
      const text = (each) => (each.labels?.length ? each.labels[0] : each).textContent;
      controls.find((each) => text(each).startsWith(label)).focus();
    }"""
    page.call(script, widget, label)


def press(page: Browser, widget: str, label: str, *keys: str) -> None:
    focus(page, widget, label)
    page.press(*keys)


def sample_with(outlier: float) -> torch.Tensor:
    weights = torch.tensor(export.sample())
    weights[300] = outlier
    return weights


def codes_of(q: nf4.Quantized) -> torch.Tensor:
    return torch.stack([q.packed >> 4, q.packed & 15], 1).flatten().int()


def bins_in_python(name: str, block_size: int, outlier: float) -> dict[str, object]:
    weights = sample_with(outlier)
    codebook = {"NF4": nf4.NF4, "Int4": codebooks.integers(4)}[name]
    q = nf4.quantize(weights, block_size, codebook)
    error = (nf4.dequantize(q).double() - weights.double()).abs()
    is_inside = torch.arange(len(weights)) // block_size == 300 // block_size
    codes = codes_of(q)
    size = len(codebook)
    return {
        "inside": codes[is_inside].bincount(minlength=size).tolist(),
        "outside": codes[~is_inside].bincount(minlength=size).tolist(),
        "error": error.mean().item(),
        "errorInside": error[is_inside].mean().item(),
        "errorOutside": error[~is_inside].mean().item(),
    }


def test_bins_hold_as_many_weights_as_in_python_and_the_errors_agree(page: Browser) -> None:
    cases = [*itertools.product(["NF4", "Int4"], [16, 32, 64, 128, 256, 512], [1, 2, 4, 13, 60])]
    table = export.bins()
    script = "(table, cases) => cases.map((each) => page.widgets.bins.summary(table, ...each))"
    shown = page.call(script, table, cases)
    n = len(table["weights"])
    for case, got in zip(cases, shown):
        wanted = bins_in_python(*case)
        assert [got["inside"], got["outside"]] == [wanted["inside"], wanted["outside"]], case
        for name in ("error", "errorInside", "errorOutside"):
            # The same numbers, added up in another order.
            assert abs(got[name] - wanted[name]) <= 2 * gamma(n, torch.float64) * wanted[name]


def test_a_weight_near_a_midpoint_takes_the_level_that_it_takes_in_python(page: Browser) -> None:
    """Each block has the 15 midpoints, times its absmax: only the same roundings decide alike."""
    midpoints = (nf4.NF4[1:] + nf4.NF4[:-1]) / 2
    absmax = torch.cat([torch.ones(1), torch.rand(400, generator=torch.manual_seed(0)) * 8])
    weights = (absmax[:, None] * torch.cat([midpoints, torch.ones(1)])).flatten()
    script = "(...all) => page.widgets.bins.quantize(...all).codes"
    codes = page.call(script, weights.tolist(), 16, nf4.NF4.tolist())
    assert codes[:16] == [*range(16)]
    assert codes == codes_of(nf4.quantize(weights, 16)).tolist()


def test_the_widget_of_bins_is_used_by_keyboard(page: Browser) -> None:
    press(page, "bins", "block size", "ArrowRight", "ArrowRight")
    press(page, "bins", "the outlier", "End")
    press(page, "bins", "NF4", "ArrowRight")
    wanted = bins_in_python("Int4", 256, 60)
    used = sum(count > 0 for count in wanted["inside"])
    assert numbers(page, "bins") == {
        "mean error": f"{wanted['error']:.4f}",
        "in the outlier's block": f"{wanted['errorInside']:.4f}",
        "in all other blocks": f"{wanted['errorOutside']:.4f}",
        "levels used in its block": f"{used} of 15",
    }
    assert page.run("document.querySelectorAll('#widget-bins rect.hot').length") == 15


def test_the_cost_of_a_code_is_that_of_its_bytes(page: Browser) -> None:
    """n is so large that no constant is counted twice, and the float32 mean of a tensor is not."""
    n = 2**20
    cases = [*itertools.product(export.BITS, export.BLOCK_SIZES, [False, True])]
    script = """(cases) => cases.map(function (each) {
      return [page.widgets.code.cost(...each), page.widgets.code.stored(...each)];
    })"""
    for (bits, block_size, double), (cost, stored) in zip(cases, page.call(script, cases)):
        constants = constant_bytes(n, block_size, double) - 4 * double
        assert n * cost == n * bits + 8 * constants
        packed = nf4.quantize(torch.zeros(n), block_size, nf4.normal_float(bits)).packed
        assert n * stored == 8 * (packed.numel() + constants)


def test_the_widget_of_codes_is_used_by_keyboard(page: Browser) -> None:
    press(page, "code", "bits", "ArrowLeft")
    press(page, "code", "block size", "Home")
    press(page, "code", "double", " ")
    assert numbers(page, "code") == {
        "levels of NormalFloat": "8",
        "error of NormalFloat": f"{export.root_mean_squared_error(nf4.normal_float(3), 32):.4f}",
        "error of the integers": f"{export.root_mean_squared_error(codebooks.integers(3), 32):.4f}",
        "bits per weight": "4.000",
        "as nf4.py stores it": "5.000",
    }
    ticks = page.run("document.querySelectorAll('#widget-code svg line.mark').length")
    assert ticks == 8


def test_the_drawn_density_holds_all_weights_but_the_largest_of_each_block() -> None:
    for block_size in export.BLOCK_SIZES:
        share = sum(export.density(block_size)) * 2 / export.POINTS
        rounding = export.POINTS * 2.0**-14  # four decimals each
        assert abs(share - (1 - 1 / block_size)) <= rounding * 2 / export.POINTS


def walk(budget: int, sizes: list[int], visits: int) -> list[list[object]]:
    """After each visit the counters of a Pager, and the resident pages by their numbers."""
    pages = [Page((size,), torch.uint8, torch.device("cpu")) for size in sizes]
    pager = Pager(budget)
    pager.reserve_store(pages)
    states = []
    for visit in range(visits):
        pager.fetch(pages[visit % len(pages)], write=True)
        counters = {name: n for name, n in pager.counters.items() if name != "prefetches"}
        states.append([counters, [pages.index(page) for page in pager.cache]])
    return states


def test_the_pager_of_the_page_is_that_of_the_optimizer_at_every_visit(page: Browser) -> None:
    sizes = [size for cut in export.pager().values() for size in cut]
    visits = 3 * len(sizes)
    script = """(sizes, budget, visits) => {
      const pager = page.widgets.pager.pager(sizes, budget);
      return Array.from({ length: visits }, (_, visit) => {
        pager.fetch(visit % sizes.length);
        return [{ ...pager.counters }, [...pager.cache]];
      });
    }"""
    for budget in range(2, sum(sizes) // export.MIB + 1):
        wanted = walk(budget * export.MIB, sizes, visits)
        assert page.call(script, sizes, budget * export.MIB, visits) == wanted


def test_the_widget_of_the_pager_is_used_by_keyboard(page: Browser) -> None:
    sizes = [size for cut in export.pager().values() for size in cut]
    press(page, "pager", "budget", "ArrowLeft", "ArrowLeft")
    press(page, "pager", "End of step", "Enter")
    press(page, "pager", "Next page", " ", "Enter")
    counters, resident = walk(6 * export.MIB, sizes, len(sizes) + 2)[-1]
    assert numbers(page, "pager") == {
        "hits": str(counters["hits"]),
        "faults": str(counters["faults"]),
        "evictions": str(counters["evictions"]),
        "read from the store": f"{counters['bytes_in'] // export.MIB} MiB",
        "written to the store": f"{counters['bytes_out'] // export.MIB} MiB",
    }
    label = page.run("document.querySelector('#widget-pager svg').ariaLabel")
    assert label == f"on the device: pages {', '.join(map(str, resident))}"
    said = page.run("document.querySelector('#widget-pager .said').textContent")
    assert said.startswith("Step 2: page 1 is not on the device, a fault; page ")
    press(page, "pager", "Start again", "Enter")
    assert numbers(page, "pager")["faults"] == "0"


SHAPES_TO_PRICE = SHAPES | export.OTHER_MODELS | {"odd": Shape(3, 24, 55, 3, 1, 10, 101, tied=True)}


def test_other_models_have_the_published_numbers_of_parameters() -> None:
    assert {name: shape.parameters() for name, shape in export.OTHER_MODELS.items()} == {
        "SmolLM2-135M": 134_515_008,
        "TinyLlama-1.1B": 1_100_048_384,
        "Mistral-7B": 7_241_732_096,
        "Llama-3.1-8B": 8_030_261_248,
        "Llama-3.1-70B": 70_553_706_496,
    }


def test_the_price_of_a_step_is_that_of_the_formula_to_the_byte(page: Browser) -> None:
    cases = [
        {
            "model": model,
            "method": method,
            "r": r,
            "batch": batch,
            "length": length,
            "isCheckpointing": checkpointing,
            "isDouble": double,
            "isPaged": paged,
            "blockSize": 64,
            "rows": export.ROWS,
        }
        for model, method, (r, batch, length), checkpointing, double, paged in itertools.product(
            SHAPES_TO_PRICE,
            METHODS,
            [(1, 1, 2), (8, 3, 17), (64, 1, 512), (256, 32, 16384)],
            [False, True],
            [False, True],
            [False, True],
        )
    ]
    shapes = {name: shape._asdict() for name, shape in SHAPES_TO_PRICE.items()}
    script = """(shapes, cases) => cases.map(function (each) {
      return page.widgets.memory.predict(shapes[each.model], each);
    })"""
    for case, got in zip(cases, page.call(script, shapes, cases)):
        wanted = predict(
            SHAPES_TO_PRICE[case["model"]],
            case["method"],
            case["batch"],
            case["length"],
            r=case["r"],
            checkpointing=case["isCheckpointing"],
            double_quant=case["isDouble"],
        )
        assert got["components"] == wanted.components, case
        assert got["peak"] == wanted.peak(case["isPaged"]), case
        assert sum(got["atPeak"].values()) == got["peak"]


def test_the_widget_of_memory_is_used_by_keyboard(page: Browser) -> None:
    press(page, "memory", "model", "End")
    press(page, "memory", "rank", "ArrowLeft", "ArrowLeft")
    press(page, "memory", "sequences", "ArrowRight", "ArrowRight")
    press(page, "memory", "length", "ArrowRight")
    press(page, "memory", "double", " ")
    press(page, "memory", "AdamW", " ")
    shape = [*export.OTHER_MODELS.values()][-1]
    predicted = predict(shape, QLORA, 3, 1024, r=16, double_quant=False)
    peak = predicted.peak(paged=True)
    shown = numbers(page, "memory")
    assert shown["peak"] == f"{peak / 1e9:.3f} GB"
    assert shown["constants"] == f"{predicted.components['constants'] / 1e9:.3f} GB"
    card = min(size for size in CARDS if peak <= size * 2**30 - OUTSIDE_TORCH)
    said = page.run("document.querySelector('#widget-memory .said').textContent")
    assert said.startswith(f"The smallest card it fits on has {card} GiB = ")
    assert f"{card * 2**30 / 1e9:.3f} GB" in said
    texts = page.run(
        "[...document.querySelectorAll('#widget-memory text')].map((each) => each.textContent)"
    )
    assert texts.count("✓ fits") == len([size for size in CARDS if size >= card])


def test_any_other_model_can_be_priced(page: Browser) -> None:
    page.run("document.querySelector('#widget-memory details').open = true")
    shape = SHAPES["llama-7b"]._replace(layers=5)
    page.call(
        """(widget, value) => {
          const input = document.querySelector("#widget-memory .sizes input");
          input.value = "";
          input.dispatchEvent(new Event("input"));
          input.value = value;
          input.dispatchEvent(new Event("input"));
        }""",
        "memory",
        shape.layers,
    )
    assert numbers(page, "memory")["peak"] == f"{predict(shape, QLORA, 1, 512).peak() / 1e9:.3f} GB"
    said = "document.querySelector('#widget-memory .said').textContent"
    page.run("document.querySelector('#widget-memory .sizes input').value = 0")
    page.run(
        "document.querySelector('#widget-memory .sizes input').dispatchEvent(new Event('input'))"
    )
    assert page.run(said) == "layers: give a whole number from 1 on; shown is the step before."
    press(page, "memory", "head is", " ")
    tied = predict(shape._replace(tied=True), QLORA, 1, 512)
    assert numbers(page, "memory")["peak"] == f"{tied.peak() / 1e9:.3f} GB"
    press(page, "memory", "4 bits", "ArrowRight", "ArrowRight")
    assert page.run("document.querySelector('#widget-memory [type=checkbox]').disabled")


def test_a_step_that_no_card_holds_is_told(page: Browser) -> None:
    press(page, "memory", "model", "End")
    press(page, "memory", "4 bits", "ArrowRight", "ArrowRight")
    said = page.run("document.querySelector('#widget-memory .said').textContent")
    assert said == f"It fits on none of these cards; the largest has {CARDS[-1]} GiB."


def test_a_warp_of_the_page_decodes_what_the_reference_does(page: Browser) -> None:
    """Every number of the 1024, each by one lane, with the constants of double quantization."""
    weights = torch.tensor(export.sample())
    q = nf4.quantize(weights)
    constants = double_quant.dequantize(double_quant.quantize(q.absmax))
    decoded = nf4.dequantize(
        nf4.Quantized(q.packed, constants, q.codebook, q.shape, q.dtype, q.block_size)
    )
    script = """(table) => Array.from({ length: 32 }, (_, lane) =>
      Array.from({ length: 16 }, function (_, step) {
        const [word, byte] = page.widgets.warp.at(lane, step + 1);
        return page.widgets.warp.decode(table, word, byte);
      }))"""
    steps = [step for lane in page.call(script, export.warp()) for step in lane]
    written = {step["element"] + i: step["written"][i] for step in steps for i in range(2)}
    assert len(written) == export.WEIGHTS
    in_order = [written[i] for i in range(export.WEIGHTS)]
    assert in_order == decoded.bfloat16().tolist()
    for step in steps:
        assert step["scale"] == constants[step["block"]]
        assert step["packed"] == q.packed[step["element"] // 2]
        assert step["codes"] == codes_of(q)[step["element"] :][:2].tolist()


def test_numbers_of_the_page_are_rounded_to_bfloat16_as_torch_does(page: Browser) -> None:
    """Ties, their neighbours, and normal numbers."""
    ties = torch.arange(128, 256).bfloat16().float() + 0.5
    near = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (0.0, 999.0)]
    numbers = torch.cat([ties, *near, torch.tensor(export.sample())])
    rounded = page.call("(all) => all.map(page.widgets.warp.bfloat16)", numbers.tolist())
    assert rounded == numbers.bfloat16().tolist()


def test_lanes_read_and_write_as_those_of_the_kernel_do(
    page: Browser, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel runs in the simulator, and its reads and writes of global memory are noted."""
    reads: dict[int, list[int]] = {}
    writes: dict[int, list[int]] = {}
    q = nf4.quantize(torch.tensor(export.sample()))
    out = torch.empty(export.WEIGHTS, dtype=torch.bfloat16)

    def lane() -> int:
        return int(dequantize.cuda.threadIdx.x) & 31

    def noted_load(memory: np.ndarray, unit: int, load4: object = dequantize.load4) -> object:
        reads.setdefault(lane(), []).extend(range(4 * int(unit), 4 * int(unit) + 4))
        return load4(memory, unit)

    def noted_store(
        memory: np.ndarray, unit: int, *words: int, store4: object = dequantize.store4
    ) -> None:
        if np.shares_memory(memory, out.view(torch.uint8).numpy()):
            writes.setdefault(lane(), []).append(int(unit))
        store4(memory, unit, *words)

    monkeypatch.setattr(dequantize, "load4", noted_load)
    monkeypatch.setattr(dequantize, "store4", noted_store)
    nothing = torch.zeros(1)
    shift = int(math.log2(q.block_size))
    weight = (q.packed, q.codebook, q.absmax, nothing.byte(), nothing, nothing, 0.0, shift, 0, 0)
    warpsim.run(dequantize.v4("bfloat16"), 1, (weight, out, 1))
    assert torch.equal(out, nf4.dequantize(q).bfloat16())
    script = "(lane) => [page.widgets.warp.reads(lane), page.widgets.warp.decodes(lane)]"
    for each in range(32):
        assert page.call(script, each) == [reads[each], writes[each]]


def test_the_widget_of_the_warp_is_used_by_keyboard(page: Browser) -> None:
    press(page, "warp", "lane", "ArrowRight", "ArrowRight")
    press(page, "warp", "Next", *["Enter"] * 6)  # the second byte of the second word
    press(page, "warp", "Back", "Enter", "Enter")
    press(page, "warp", "step", "ArrowRight")
    q = nf4.quantize(torch.tensor(export.sample()))
    constants = double_quant.dequantize(double_quant.quantize(q.absmax))
    word = 32 + 3
    element = 8 * word
    block = element // q.block_size
    first, second = codes_of(q)[element : element + 2].tolist()
    levels = nf4.NF4[[first, second]]
    written = (levels * constants[block]).bfloat16().tolist()
    assert numbers(page, "warp") == {
        "byte read": f"0x{q.packed[element // 2].item():02x}",
        "codes": f"{first}, {second}",
        "levels": f"{levels[0]:.4f}, {levels[1]:.4f}",
        "absmax": f"{constants[block]:.6f}",
        "written as bfloat16": f"{written[0]:.4f}, {written[1]:.4f}",
        "elements": f"{element}, {element + 1}",
    }
    said = page.run("document.querySelector('#widget-warp .said').textContent")
    assert said.startswith(f"Lane 3 decodes word {word}, which lane {word // 4} read.")


def trainable(shape: Shape, r: int, chosen: list[str]) -> int:
    maps = dict(zip(export.MAPS, shape.maps()))
    return shape.layers * sum(r * sum(maps[name]) for name in chosen)


CHOICES = {
    "q, v": "q v",
    "attention": "q k v o",
    "MLP": "gate up down",
    "all": "q k v o gate up down",
}


def test_the_adapters_have_as_many_parameters_as_in_python(page: Browser) -> None:
    table = export.adapters()
    shapes = SHAPES | export.OTHER_MODELS
    cases = [*itertools.product(shapes, [1, 8, 64, 256], CHOICES)]
    script = """(table, cases) => cases.map(function ([model, r, layers]) {
      const widget = page.widgets.adapters;
      return widget.trainable(table[model], r, widget.layers[layers]);
    })"""
    for (model, r, layers), count in zip(cases, page.call(script, table, cases)):
        assert count == trainable(shapes[model], r, CHOICES[layers].split())
        if layers == "all":
            assert 4 * count == predict(shapes[model], QLORA, 1, 2, r=r).components["adapters"]


def test_the_widget_of_adapters_is_used_by_keyboard(page: Browser) -> None:
    press(page, "adapters", "model", "End")
    press(page, "adapters", "rank", "Home", "ArrowRight")
    press(page, "adapters", "q, v", "ArrowRight", "ArrowRight")
    shape = [*export.OTHER_MODELS.values()][-1]
    count = trainable(shape, 2, ["gate", "up", "down"])
    assert numbers(page, "adapters") == {
        "trainable parameters": f"{count:,}",
        "of all parameters": f"{100 * count / (shape.parameters() + count):.2f} %",
        "adapters in float32": f"{4 * count / 1e9:.3f} GB",
        "with gradients and moments": f"{16 * count / 1e9:.3f} GB",
    }
    assert page.run("document.querySelectorAll('#widget-adapters rect.hot').length") == 2 * 3
