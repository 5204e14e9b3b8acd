"""What can be set, what of it can run here, and what a setting asks Transformers for."""
