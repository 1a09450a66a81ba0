"""Errors for people: each message says what was wrong, with which value, where, and what to do.

`composer_megatron.cli` prints the message alone and exits with `exit_code`; ``--debug`` shows the traceback.
"""


class ComposerError(Exception):
    """Something failed that the user can understand and mend. Exit status 1."""

    exit_code = 1


class UsageError(ComposerError, ValueError):
    """The request itself was wrong: a value, an option, a combination. Exit status 2."""

    exit_code = 2


class SequenceError(UsageError):
    """A text that is no Composite sequence. Shows the text with a mark under the offending position."""

    def __init__(self, text: str, position: int, problem: str, expected: str) -> None:
        """Compose the message; `position` counts characters of `text` from 0."""
        self.text, self.position = text, position
        shown = "".join(" " if character.isspace() else character for character in text[:200])
        shown += "…" if len(text) > 200 else ""
        pointer = f"\n  {shown}\n  {' ' * min(position, 200)}^" if text else ""
        super().__init__(f"bad sequence {shown!r}: at position {position}: {problem}; expected {expected}{pointer}")


class ShapeError(UsageError):
    """Widths that do not fit together, or an unknown shape."""


class FileError(ComposerError):
    """A file that is missing, unreadable, corrupt or cannot be written."""
