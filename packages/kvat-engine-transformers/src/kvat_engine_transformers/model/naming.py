"""Schemes of model ids that only this engine understands."""

BUILTIN = "builtin:"
RANDOM = "random:"
