"""The syllabus has every lesson, and every lesson has the points that it names."""

import pytest

from course.lesson import ROOT, Lesson
from course.lessons import LESSONS

SYLLABUS = (ROOT / "course" / "README.md").read_text()


@pytest.mark.parametrize("lesson", LESSONS.values(), ids=lambda lesson: lesson.slug)
def test_every_lesson_is_in_the_syllabus_with_20_points(lesson: Lesson) -> None:
    assert f"[{lesson.number} " in SYLLABUS
    assert f"({lesson.folder.name}/lesson.md)" in SYLLABUS
    assert sum(law.points for law in lesson.laws) == 20
