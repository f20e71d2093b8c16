"""Turns rows of data files into token ids and labels."""
