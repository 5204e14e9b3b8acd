"""A plan at work, in a process of its user."""
