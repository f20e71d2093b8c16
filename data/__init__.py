"""Rows of people's files as token ids and labels."""
