"""The commands of the course; the targets of the Makefile call them.

python -m course lesson 2     write the student's file of lesson 2
python -m course grade 2      grade it, and write results.json beside it
python -m course autograder 2 write the zip that grades it on Gradescope
python -m course slides 2     write lesson 2 as slides
python -m course build        draw the figures of the lessons, and write the pages and the notebooks
"""

import sys

from course import autograder, figures
from course.grade import grade_and_write
from course.lesson import ROOT, Lesson
from course.lessons import LESSONS
from course.stubs import write_stub

NOTEBOOKS = ROOT / "course" / "notebooks"
NUMBERS = ", ".join(map(str, LESSONS))
COMMANDS = "make lesson LESSON=N; the others are grade, slides and autograder in place of lesson"
USAGE = f"use: {COMMANDS}, with N one of {NUMBERS}; or make course"


def build() -> None:
    from course.page import build as page  # needs packages of requirements-course.txt
    from course.page import notebook

    for lesson in LESSONS.values():
        print(f"drew {figures.write(lesson).relative_to(ROOT)}")
    page.main()
    for lesson in LESSONS.values():
        path = notebook.write(lesson.folder / "lesson.md", NOTEBOOKS)
        print(f"wrote {path.relative_to(ROOT)}")


def write_slides(lesson: Lesson) -> None:
    from course.page import build as page

    path = page.slides(lesson.folder / "lesson.md", page.SITE)
    print(f"wrote {path.relative_to(ROOT)}; arrow keys turn the slides")


def main(argv: list[str]) -> None:
    lessons = {str(number): lesson for number, lesson in LESSONS.items()}
    match argv:
        case ["build"]:
            build()
        case ["lesson", number] if number in lessons:
            print(write_stub(lessons[number]))
        case ["grade", number] if number in lessons:
            result = grade_and_write(lessons[number])
            print(result)
            sys.exit(result.points < result.most)
        case ["slides", number] if number in lessons:
            write_slides(lessons[number])
        case ["autograder", number] if number in lessons:
            print(f"wrote {autograder.write(lessons[number])}")
        case ["lesson" | "grade" | "slides" | "autograder", number] if number.isdecimal():
            sys.exit(f"there is no lesson {number}; {USAGE}")
        case _:
            sys.exit(USAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
