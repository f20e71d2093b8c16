"""What train.py is made of: options, processes, states, reports."""
