"""Renders Markdown with LaTeX to HTML at build time, so the page needs no library of its own.

    $..$ and $$..$$          MathML, which browsers draw themselves
    ```python                highlighted by pygments, as spans with short classes (style.css)
    <!-- widget: NAME -->    the place of a widget
    ![text](figure.svg)      a data URI with the size of the picture, so that nothing moves later
    [text](../../nf4.py)     whatever `resolve` makes of the path

Errors of a lesson (a formula, a link, a picture) are ValueErrors of one line.
"""

import base64
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token
from math_core import LatexError, LatexToMathML
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

WIDGET = re.compile(r"<!-- widget: (\w+) -->\s*")
SVG_SIZE = re.compile(r'<svg[^>]*?\sviewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"', re.DOTALL)
PNG_START = b"\x89PNG"


class Section(NamedTuple):
    """A heading of the second level: its text and its id in the page."""

    title: str
    id: str


class Rendered(NamedTuple):
    """What a Markdown file becomes. The body does not hold the title."""

    title: str
    body: str
    sections: list[Section]
    widgets: list[str]


def render(path: Path, resolve: Callable[[Path], str]) -> Rendered:
    """Renders a Markdown file; `resolve` gives the address of a local file that it links to.

    Raises: ValueError for a file without a title, and for a link or a picture that leads nowhere.
    """
    parser = _parser()
    tokens = parser.parse(path.read_text())
    if len(tokens) < 3 or tokens[0].tag != "h1":
        raise ValueError(f"{path} must begin with its title; write # and the title in line 1")
    title = tokens[1].content
    tokens = tokens[3:]
    sections = _name_sections(tokens)
    widgets = [match[1] for token in tokens if (match := WIDGET.fullmatch(token.content))]
    for token in _inline(tokens):
        if token.type == "link_open":
            token.attrs["href"] = _address(path, token.attrs["href"], resolve)
        elif token.type == "image":
            _embed(path, token)
    return Rendered(title, parser.renderer.render(tokens, parser.options, {}), sections, widgets)


def code(text: str, language: str) -> str:
    """A block of highlighted code. It can be scrolled by keyboard."""
    if text.startswith(">>>"):
        language = "pycon"
    spans = highlight(text, get_lexer_by_name(language or "text"), HtmlFormatter(nowrap=True))
    return f'<pre tabindex="0"><code>{spans}</code></pre>\n'


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"highlight": lambda text, name, _: code(text, name)})
    parser.enable("table")
    parser.use(dollarmath_plugin, allow_space=False, allow_digits=False, renderer=_math)
    rules = parser.renderer.rules
    rules["html_block"] = lambda tokens, index, *_: _html(tokens[index].content)
    rules["table_open"] = lambda *_: '<div class="scroll" tabindex="0"><table>\n'
    rules["table_close"] = lambda *_: "</table></div>\n"
    return parser


def _math(latex: str, options: dict) -> str:
    """Raises: ValueError for what is no LaTeX of mathematics."""
    try:
        return LatexToMathML().convert_with_local_state(latex, displaystyle=options["display_mode"])
    except LatexError:
        raise ValueError(
            f"a formula must be LaTeX that math-core knows, got {latex}; try simpler commands"
        ) from None


def _html(content: str) -> str:
    """A block of HTML as it is, or the place of a widget."""
    match = WIDGET.fullmatch(content)
    if not match:
        return content
    # Filled at once, before the text below it is drawn: so that nothing has to move.
    name = match[1]
    place = f'<section class="widget" id="widget-{name}"></section>'
    return f'{place}<script>page.mount("{name}");</script>\n'


def _inline(tokens: list[Token]) -> list[Token]:
    return [child for token in tokens for child in token.children or []]


def _name_sections(tokens: list[Token]) -> list[Section]:
    """Give each h2 an id made of its words."""
    sections = []
    for token, content in zip(tokens, tokens[1:]):
        if token.type == "heading_open" and token.tag == "h2":
            words = re.findall(r"\w+", content.content.lower())
            section = Section(content.content, "-".join(words))
            token.attrs["id"] = section.id
            sections.append(section)
    return sections


def _address(path: Path, href: str, resolve: Callable[[Path], str]) -> str:
    """The address in the site of a link in the Markdown file `path`."""
    if href.startswith(("#", "https://", "http://")):
        return href
    name, mark, place = href.partition("#")
    target = (path.parent / name).resolve()
    if not target.exists():
        raise ValueError(f"{path} links to {href}, which does not exist; correct the link")
    return resolve(target) + mark + place


def _embed(path: Path, image: Token) -> None:
    """Put the bytes of a picture and its size into the image."""
    source = path.parent / image.attrs["src"]
    if not source.exists():
        raise ValueError(f"{path} shows {source.name}, which does not exist; draw the figure first")
    content = source.read_bytes()
    width, height = picture_size(content)
    kind = "png" if content.startswith(PNG_START) else "svg+xml"
    image.attrs["src"] = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    image.attrs["width"] = str(width)
    image.attrs["height"] = str(height)


def picture_size(content: bytes) -> tuple[int, int]:
    """Width and height of a PNG in pixels, or of the view box of an SVG."""
    if content.startswith(PNG_START):
        return struct.unpack(">II", content[16:24])
    match = SVG_SIZE.search(content.decode())
    if not match:
        raise ValueError("a figure must be a PNG or an SVG with a viewBox; draw it with matplotlib")
    return round(float(match[1])), round(float(match[2]))
