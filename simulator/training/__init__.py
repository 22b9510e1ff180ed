"""How a model learns and answers."""
