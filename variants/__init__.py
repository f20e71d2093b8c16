"""What a reader may skip: other ways to start an adapter, and DoRA."""
