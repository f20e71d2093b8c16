"""What a run takes: predicted from the shape of the model, and measured."""
