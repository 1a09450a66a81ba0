"""New tokens as text, as they come: whole characters alone, and nothing that a stop text would take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTEXT = 8
"""Tokens before the new ones that are decoded along: some tokenizers drop the space with which a text begins."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What stands for bytes that are no character, or not yet."""


class TextStream:
    """The continuation of one prompt.

    Attributes:
        is_stopped: Whether a stop text has come; what follows is not part of the continuation.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        """Begin behind a prompt.

        Args:
            tokenizer: Decodes.
            prompt: Its tokens.
            stop: Texts that end the continuation, and are not part of it.
        """
        self.is_stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._context, self._pending = list(prompt[-_CONTEXT:]), list[int]()
        self._held = ""  # text that may be the beginning of a stop text

    def add(self, token: int) -> str:
        """Take one more token.

        Returns:
            Text that is certain to belong to the continuation, behind what was returned before; often none.
        """
        self._pending.append(token)
        text = self._decoded()
        if text.endswith(_INCOMPLETE):
            return ""
        self._context, self._pending = (self._context + self._pending)[-_CONTEXT:], []
        return self._release(text)

    def end(self) -> str:
        """The rest, once no more tokens come; bytes that never became a character among it."""
        if self.is_stopped:
            return ""
        text = self._release(self._decoded()) + self._held
        self._held, self._pending = "", []
        return text

    def _decoded(self) -> str:
        """What the pending tokens mean behind their context."""
        before, whole = self._tokenizer.decode(self._context), self._tokenizer.decode(self._context + self._pending)
        return whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(self._pending)

    def _release(self, text: str) -> str:
        text = self._held + text
        ends = [text.find(stop) for stop in self._stop if stop in text]
        if ends:
            self.is_stopped, self._held = True, ""
            return text[: min(ends)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
