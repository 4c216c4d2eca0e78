"""A reply as it was generated: its tokens, their texts and probabilities."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StreamedToken:
    """A generated token, the text that has become complete with it, and the model's own probability of it, in [0, 1].

    The text may be empty: in the middle of a character of several bytes, or where what follows could still change it. The
    probability is the softmax of the logits before the repetition penalty, the temperature and the filters.
    """

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True)
class PromptReply:
    """A prompt and the tokens that answer it; `colorize`: whether they are to be shown in colours."""

    prompt: str
    tokens: tuple[StreamedToken, ...]
    colorize: bool = False

    @property
    def text(self) -> str:
        """The reply."""
        return "".join(each.text for each in self.tokens)
