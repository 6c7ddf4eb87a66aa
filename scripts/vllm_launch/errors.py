"""The launcher's only error class: one sentence for the user, exit code 2."""

from __future__ import annotations


class UsageError(Exception):
    """The user's input cannot be used.

    Its text is one line: where the problem is, what is wrong, and what to do. ``__main__`` prints the line and exits
    with 2. When it is raised, nothing has been started or written.
    """

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        self.where, self.problem, self.remedy = where, problem, remedy
        text = " ".join(f"{where}: {problem}; {remedy}".split())
        # Escape control characters, which could move the terminal's cursor.
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))
