"""The commands of the course; the targets of the Makefile call them.

python -m course lesson 2     write the student's file of lesson 2
python -m course grade 2      grade it, and write results.json beside it
python -m course build        draw the figures of the lessons and write the page
"""

import sys
from importlib.util import find_spec

from course import figures
from course.grade import grade_and_write
from course.lessons import LESSONS, ROOT
from course.stubs import write_stub

NUMBERS = ", ".join(map(str, LESSONS))
USAGE = f"use: make lesson LESSON=N or make grade LESSON=N, with N one of {NUMBERS}; make course"


def build() -> None:
    for lesson in LESSONS.values():
        print(f"drew {figures.write(lesson).relative_to(ROOT)}")
    if find_spec("course.page"):
        from course.page import build as page

        page.main()


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
        case _:
            sys.exit(USAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
