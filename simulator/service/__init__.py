"""A victim that sells answers, from both sides of the counter."""
