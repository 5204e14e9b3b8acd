"""How Transformers is called, in every way that a recipe may ask for."""
