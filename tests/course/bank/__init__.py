"""Answers to the exercises, wrong and right: what the grader must say about each is tested."""
