"""The pages that show what commands print: README.md and docs/*.md."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def text_of_pages() -> str:
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return "\n".join(path.read_text() for path in paths)
