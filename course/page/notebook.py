"""Turns a lesson into a Jupyter notebook: its examples become cells to run and to change.

The format is that of nbformat 4.5. A doctest is split after each expected output, so that a cell
shows its last value, as in the lesson. Blocks inside <details> stay folded in the text.
"""

import doctest
import json
import re
from pathlib import Path

from markdown_it import MarkdownIt

FIRST = "import sys\n\nsys.path.insert(0, '../..')  # the root of the repository"
WIDGET_LINE = re.compile(r"<!-- widget: \w+ -->\n?")
OWN_FILE = re.compile(
    r"\]\((?!\w+:|#|\.\./)"
)  # the start of a link to a file of the lesson's folder

Cell = dict[str, str | None | list[str] | dict[str, str]]


def write(lesson: Path, folder: Path) -> Path:
    """Writes the notebook of a lesson into a folder beside those of the lessons."""
    name = lesson.parent.name
    text = lesson.read_text()
    cells = [code_cell(FIRST)]
    for kind, part in split(text):
        if kind == "markdown":
            cells.append(markdown_cell(part, name))
        else:
            cells += [code_cell(source) for source in sources(part)]
    for index, cell in enumerate(cells):
        cell["id"] = f"cell-{index}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {
        "cells": cells,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    return path


def split(text: str) -> list[tuple[str, str]]:
    """The parts of a lesson: Markdown, and the Python that is not inside <details>."""
    lines = text.splitlines(keepends=True)
    parts = []
    start = 0
    depth = 0
    for token in MarkdownIt().parse(text):
        if token.type == "html_block":
            depth += token.content.count("<details>") - token.content.count("</details>")
        if token.type == "fence" and token.info == "python" and token.level == 0 and depth == 0:
            begin, end = token.map
            parts.append(("markdown", "".join(lines[start:begin])))
            parts.append(("code", token.content))
            start = end
    parts.append(("markdown", "".join(lines[start:])))
    return [(kind, part) for kind, part in parts if part.strip()]


def sources(block: str) -> list[str]:
    """The cells of a block: a doctest without its prompts and outputs, or the block as it is.

    >>> sources(">>> a = 1\\n>>> a\\n1\\n>>> a + 1\\n2\\n")
    ['a = 1\\na', 'a + 1']
    """
    examples = doctest.DocTestParser().get_examples(block)
    if not examples:
        return [block.strip()]
    cells = [""]
    for example in examples:
        cells[-1] += example.source
        if example.want:
            cells.append("")
    return [cell.strip() for cell in cells if cell.strip()]


def code_cell(source: str) -> Cell:
    return {
        "cell_type": "code",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": source,
    }


def markdown_cell(text: str, name: str) -> Cell:
    """A cell of text: without widgets, and with links that hold in the folder of the notebooks."""
    source = OWN_FILE.sub(f"](../{name}/", WIDGET_LINE.sub("", text)).strip()
    return {"cell_type": "markdown", "metadata": {}, "source": source}
