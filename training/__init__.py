"""The parts of train.py: options, checks, processes, states, reports."""
