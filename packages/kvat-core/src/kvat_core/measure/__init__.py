"""Measuring in child processes: the parent holds the clockwork, a child holds the engine."""
