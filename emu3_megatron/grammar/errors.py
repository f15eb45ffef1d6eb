"""What is wrong with a token sequence, and where."""

from __future__ import annotations


class GrammarError(ValueError):
    """A token sequence is not a document (or not a span) of the dialect.

    `position` is the number of leading ids that are in order: the index of the first id that cannot follow
    them, or the length of the sequence where it ends too early.
    """

    position: int
    """Index of the offending id; the length of the sequence if `incomplete`."""
    incomplete: bool
    """True where every id is in order and only the rest is missing (a proper prefix)."""

    def __init__(self, message: str, *, position: int, incomplete: bool = False) -> None:
        super().__init__(message)
        self.position = position
        self.incomplete = incomplete

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling (errors cross process borders in the data workers)."""
        return _rebuild, (str(self), self.position, self.incomplete)


def _rebuild(message: str, position: int, incomplete: bool) -> GrammarError:
    return GrammarError(message, position=position, incomplete=incomplete)
