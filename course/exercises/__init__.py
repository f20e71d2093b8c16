"""One file a lesson: what the student writes, and the laws that grade it."""
