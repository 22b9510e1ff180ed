"""The computations of a run, and the run in one process."""
