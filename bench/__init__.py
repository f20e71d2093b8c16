"""Every number about speed, beside the peers."""
