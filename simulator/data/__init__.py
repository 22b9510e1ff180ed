"""Labelled images: where they come from, how they are split, and what a thief may ask with."""
