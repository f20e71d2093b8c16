"""Draws the figure of each lesson, with the same bytes at each run.

A lesson's folder has figure.py, whose `draw(figure)` fills a figure of matplotlib with results of
the real code, and the drawing, figure.svg.
"""

import importlib.util
import io
from pathlib import Path

from course.lesson import Lesson

STYLE = {
    "svg.hashsalt": "course",  # the ids in the file, else random
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def drawn(lesson: Lesson) -> bytes:
    """The figure of a lesson as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    spec = importlib.util.spec_from_file_location("figure", lesson.folder / "figure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=(9, 4.2), layout="constrained")
        module.draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return file.getvalue()


def write(lesson: Lesson) -> Path:
    path = lesson.folder / "figure.svg"
    path.write_bytes(drawn(lesson))
    return path
