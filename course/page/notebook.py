"""Turns a lesson into a Jupyter notebook: its examples become cells to run and to change.

The format is that of nbformat 4.5. A doctest is split after each expected output, so that a cell
shows its last value, as in the lesson. Examples inside <details> become cells after it whose source
is hidden until the reader opens them: later examples need their names. Other code stays text.
"""

import doctest
import json
import re
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

FIRST = """import os
import sys

os.chdir("../..")  # to the root of the repository
sys.path.insert(0, os.getcwd())"""
WIDGET_LINE = re.compile(r"<!-- widget: \w+ -->\n?")
OWN_FILE = re.compile(
    r"\]\((?!\w+:|#|\.\./)"
)  # the start of a link to a file of the lesson's folder

Cell = dict[str, str | None | list[str] | dict[str, dict[str, bool]]]


class Part(NamedTuple):
    """Text of a lesson: Markdown, or a doctest."""

    text: str
    is_code: bool = False
    is_folded: bool = False


def write(lesson: Path, folder: Path) -> Path:
    """Writes the notebook of a lesson into a folder beside those of the lessons."""
    name = lesson.parent.name
    cells = [code_cell(FIRST)]
    for part in split(lesson.read_text()):
        if part.is_code:
            cells += [code_cell(source, part.is_folded) for source in sources(part.text)]
        else:
            cells.append(markdown_cell(part.text, name))
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


def split(text: str) -> list[Part]:
    """The parts of a lesson in order; the examples of a <details> follow it."""
    lines = text.splitlines(keepends=True)
    parts = []
    folded = []
    start = 0
    depth = 0
    for token in MarkdownIt().parse(text):
        if token.type == "html_block":
            depth += token.content.count("<details>") - token.content.count("</details>")
        is_example = token.type == "fence" and token.content.startswith(">>>")
        if is_example and depth:
            folded.append(Part(token.content, is_code=True, is_folded=True))
            begin, end = token.map
            lines[begin:end] = [""] * (end - begin)
        elif is_example:
            begin, end = token.map
            parts += [Part("".join(lines[start:begin])), Part(token.content, is_code=True)]
            start = end
        elif folded and not depth:
            end = token.map[1]
            parts += [Part("".join(lines[start:end])), *folded]
            folded = []
            start = end
    parts.append(Part("".join(lines[start:])))
    return [part for part in parts if part.text.strip()]


def sources(block: str) -> list[str]:
    """The cells of a doctest, without its prompts and outputs.

    >>> sources(">>> a = 1\\n>>> a\\n1\\n>>> a + 1\\n2\\n")
    ['a = 1\\na', 'a + 1']
    """
    cells = [""]
    for example in doctest.DocTestParser().get_examples(block):
        cells[-1] += example.source
        if example.want:
            cells.append("")
    return [cell.strip() for cell in cells if cell.strip()]


def code_cell(source: str, is_hidden: bool = False) -> Cell:
    return {
        "cell_type": "code",
        "metadata": {"jupyter": {"source_hidden": True}} if is_hidden else {},
        "execution_count": None,
        "outputs": [],
        "source": source,
    }


def markdown_cell(text: str, name: str) -> Cell:
    """A cell of text: without widgets, and with links that hold in the folder of the notebooks."""
    source = OWN_FILE.sub(f"](../{name}/", WIDGET_LINE.sub("", text)).strip()
    return {"cell_type": "markdown", "metadata": {}, "source": source}
