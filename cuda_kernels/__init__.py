"""The hot path on a GPU, and the memory that it shares with the host."""
