"""The one family of errors that a user can cause and can mend.

Each message is one line that names the file, key or client, says what was wrong and what to do. The command line
prints it and exits with code 2; a library user catches `FedrotError`, or `ValueError`, which it is too.
"""

from collections.abc import Iterable


class FedrotError(ValueError):
    """Something that the user can mend; the message is one line."""


class AdapterError(FedrotError):
    """An adapter that cannot be read, written or used; names the file or the key."""


class RecipeError(FedrotError):
    """A recipe that cannot work; names the key."""


class DataError(FedrotError):
    """Data or a model that cannot be read or used; names the file, column or client."""


class RunError(FedrotError):
    """A run that cannot go on; what was written before is intact."""


def choices(names: Iterable[object]) -> str:
    """The names, sorted, as 'a, b or c', for the end of a message."""
    listed = sorted(str(n) for n in names)
    if len(listed) < 2:
        return "".join(listed)
    return ", ".join(listed[:-1]) + " or " + listed[-1]
