"""The exceptions that reach the user as a single line."""


class InputError(ValueError):
    """A user's input is wrong: a config, a data file, a model, a key, a query, a missing resource.

    The message is one line that names what was wrong, the value found and what is allowed. The command line
    prints it on stderr and exits with status 2, without a traceback.
    """


class RunFailed(Exception):
    """A run cannot go on, by no fault of its input. The command line prints the one line and exits with status 1."""


def one_line(error: BaseException) -> str:
    """An exception as one line: its type and what it says."""
    return plain(f"{type(error).__name__}: {error}")


def plain(text: str) -> str:
    """Text as one line that a terminal only shows: what would move its cursor, colour it or turn its direction is
    spelt out."""
    line = " ".join(text.split())
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
