"""A third party looks on: statistics of finished models."""
