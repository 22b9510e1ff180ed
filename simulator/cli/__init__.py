"""The command line ``exsim``, the one place that knows all three packages.

Exit status: 0 every row is done (``verify``: the watermark is there; ``serve``: it was ended), 1 some row failed
(``verify``: it is not there), 2 bad input, 130 interrupted. Bad input is one line on stderr.
"""

from simulator.cli.commands import entry, exsim, main

__all__ = ["entry", "exsim", "main"]
