"""The memory of a run: predicted from the model's shape, and measured."""
