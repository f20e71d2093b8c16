"""Lessons on the method, with exercises that the tests of the project grade."""
