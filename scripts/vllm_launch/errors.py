"""The one error of the launcher: a sentence for the person, exit code 2."""

from __future__ import annotations


class UsageError(Exception):
    """Something the person gave cannot be used.

    Its text is one line: where, what is wrong, and what to do. ``__main__`` prints it and exits with 2;
    nothing has been started or written when it is raised.
    """

    def __init__(self, where: str, what: str, remedy: str) -> None:
        self.where, self.what, self.remedy = where, what, remedy
        text = " ".join(f"{where}: {what}; {remedy}".split())  # and no codes that move a terminal's cursor:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))
