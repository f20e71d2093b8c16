"""Every number about speed, next to the peers."""
