"""What a retry cannot cure: the one rule by which a failed stage is refused or tried again.

It stands in the lowest room, so that any exception can say so by its base class and whoever
decides need not import the module that raises it. A list of names would miss subclasses.
"""

from __future__ import annotations


class BadInput(Exception):
    """A person has to change data, settings, weights or the machine; trying again ends alike."""


LASTING = (BadInput, ValueError, LookupError, PermissionError)
"""Beside our own, Python's ways of saying that a value, a name or a permission is wrong. Anything
else (a lost process, a full socket, a disk error) may be gone the next time."""


def cured_by_no_retry(problem: BaseException) -> bool:
    """Whether `problem` would come back if the same work were started again."""
    return isinstance(problem, LASTING)
