"""Builds the static site of the course: an index, and one HTML file for each lesson.

    python -m course.page.build        writes course/site

`slides` writes a lesson with a slide for each of its sections, from the same text. Each page is one
file that needs no other: style, widgets, their tables and the pictures are in it. It works from the
file system and without a network. The same sources give the same bytes.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template

from course.page import export
from course.page.markdown import Rendered, Section, render

COURSE = Path(__file__).parent.parent
SITE = COURSE / "site"
PAGE = Path(__file__).parent
WIDGETS = PAGE / "widgets"
LARGEST = 2 * 10**6  # bytes of the site
TITLE = "A course on QLoRA"
SECTION = re.compile(r"(?=<h2 )")


def main() -> None:
    for path in build(lessons(COURSE), SITE):
        print(f"wrote {os.path.relpath(path)}, {path.stat().st_size / 1e3:.0f} kB")


def lessons(course: Path) -> list[Path]:
    """The lesson.md files, in the order of their numbers."""
    return sorted(course.glob("*/lesson.md"))


def build(paths: list[Path], site: Path) -> list[Path]:
    """Writes the site of these lessons and removes the pages of earlier ones.

    Raises: ValueError for a broken link, an unknown widget, or a site that is too large.
    """
    pages = rendered_pages(paths, site)
    size = sum(len(text.encode()) for text in pages.values())
    if size > LARGEST:
        raise ValueError(
            f"the site may have {LARGEST:,} bytes, got {size:,}; draw smaller figures, as PNG"
        )
    site.mkdir(parents=True, exist_ok=True)
    for old in site.glob("*.html"):
        old.unlink()
    for name, text in pages.items():
        (site / name).write_text(text)
    return [site / name for name in pages]


def rendered_pages(paths: list[Path], site: Path) -> dict[str, str]:
    """The files of the site, by name, with links that hold in the folder `site`."""
    rendered = [render(path, _resolver(paths, site)) for path in paths]
    names = [page_name(path) for path in paths]
    pages = {"index.html": _index(names, rendered)}
    for place, (name, lesson) in enumerate(zip(names, rendered)):
        before = _link("Before", names, rendered, place - 1)
        after = _link("Next", names, rendered, place + 1)
        pages[name] = _page(lesson, f"<h1>{_title(lesson)}</h1>\n{lesson.body}", before + after)
    return pages


def slides(path: Path, site: Path) -> Path:
    """Writes a lesson as slides: its title, and one for each section. Arrow keys turn them."""
    lesson = render(path, _resolver(lessons(path.parent.parent), site))
    parts = SECTION.split(f"<h1>{_title(lesson)}</h1>\n{lesson.body}")
    body = "\n".join(f'<section class="slide">\n{part}</section>' for part in parts)
    text = _page(lesson, body, footer="", extra=[PAGE / "slides.js"])
    site.mkdir(parents=True, exist_ok=True)
    target = site / page_name(path).replace(".html", ".slides.html")
    target.write_text(text)
    return target


def _resolver(paths: list[Path], site: Path) -> Callable[[Path], str]:
    """A function from a local file to its address in the site."""
    addresses = {path.resolve(): page_name(path) for path in paths}

    def resolve(target: Path) -> str:
        return addresses.get(target) or Path(os.path.relpath(target, site.resolve())).as_posix()

    return resolve


def page_name(lesson: Path) -> str:
    """The file of a lesson in the site.

    >>> page_name(Path("course/2_nf4/lesson.md"))
    '2_nf4.html'
    """
    return f"{lesson.parent.name}.html"


def _index(names: list[str], rendered: list[Rendered]) -> str:
    """The first page: what the course is, and its lessons."""
    items = "\n".join(
        f'<li><a href="{name}">{_title(lesson)}</a></li>' for name, lesson in zip(names, rendered)
    )
    text = (PAGE / "index.html").read_text()
    body = Template(text).substitute(title=TITLE, lessons=items)
    return _page(Rendered(TITLE, body, [], []), body, footer="")


def _page(rendered: Rendered, body: str, footer: str, extra: Sequence[Path] = ()) -> str:
    """A whole HTML file, with the widgets of this page only, their tables, and extra scripts."""
    known = sorted(path.stem for path in WIDGETS.glob("*.js"))
    for name in rendered.widgets:
        if name not in known:
            raise ValueError(f"the widgets are {', '.join(known)}; got {name}, so correct its name")
    used = sorted({*rendered.widgets})
    scripts = [PAGE / "page.js", *(WIDGETS / f"{name}.js" for name in used), *extra]
    tables = {name: export.TABLES[name]() for name in used}
    return Template((PAGE / "page.html").read_text()).substitute(
        title=_title(rendered),
        style=(PAGE / "style.css").read_text().strip(),
        tables=json.dumps(tables, separators=(",", ":")).replace("</", "<\\/"),
        script="\n".join(path.read_text().strip() for path in scripts),
        contents=_contents(rendered.sections),
        body=body.strip(),
        footer=footer.strip(),
    )


def _title(rendered: Rendered) -> str:
    return escape(rendered.title.replace("`", ""))


def _contents(sections: list[Section]) -> str:
    """The list of a page's sections, as links."""
    if not sections:
        return ""
    items = "\n".join(
        f'<li><a href="#{section.id}">{escape(section.title)}</a></li>' for section in sections
    )
    return f'<nav class="contents" aria-label="Sections">\n<ol>\n{items}\n</ol>\n</nav>'


def _link(word: str, names: list[str], rendered: list[Rendered], place: int) -> str:
    """A link to the lesson at this place, if there is one."""
    if not 0 <= place < len(names):
        return ""
    return f'<a href="{names[place]}"><small>{word}</small> {_title(rendered[place])}</a>\n'


if __name__ == "__main__":
    main()
