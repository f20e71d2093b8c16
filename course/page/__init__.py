"""The static site of the course: lessons rendered at build time, with widgets that run offline."""
