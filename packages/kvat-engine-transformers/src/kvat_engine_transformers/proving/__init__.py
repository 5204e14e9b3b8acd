"""What really ran: read back from live objects, and held against the recipe."""
