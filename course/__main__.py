"""The commands of the course; the targets of the Makefile call them.

python -m course lesson 2     write the student's file of lesson 2
python -m course grade 2      grade it
python -m course build        write the figures and the page
"""

import sys

from course.grade import grade_and_write
from course.lessons import LESSONS
from course.stubs import write_stub

USAGE = (
    f"use: make lesson LESSON=N or make grade LESSON=N, with N of {', '.join(map(str, LESSONS))}"
)


def main(argv: list[str]) -> None:
    match argv:
        case ["lesson", number] if number.isdigit() and int(number) in LESSONS:
            print(write_stub(LESSONS[int(number)]))
        case ["grade", number] if number.isdigit() and int(number) in LESSONS:
            result = grade_and_write(LESSONS[int(number)])
            print(result)
            sys.exit(result.points < result.most)
        case _:
            sys.exit(USAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
