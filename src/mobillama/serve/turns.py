"""How a conversation becomes the ids that a model continues: by its chat template, or as one growing text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mobillama.data.template import ChatTemplate, Encoded, Message, check_messages
from mobillama.data.tokenizer import Tokenizer


class Turns(Protocol):
    """What turns a conversation into ids; :class:`mobillama.data.template.ChatTemplate` is one."""

    stop_ids: frozenset[int]
    """Ids that end an answer."""

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Encoded:
        """Return a conversation in ids.

        Raises:
            UsageError: it is no conversation, or the template refuses it.
        """
        ...


class Continuation:
    """A conversation with a model that was only pre-trained: one text, in which each later message of the user's begins a line.

    The model continues it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = frozenset({tokenizer.eos_id})

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Encoded:
        """Return the text in ids; spans are not told.

        Raises:
            UsageError: it is no conversation.
        """
        check_messages(messages)
        begins = ["\n" if number and message["role"] != "assistant" else "" for number, message in enumerate(messages)]
        text = "".join(begin + message["content"] for begin, message in zip(begins, messages, strict=True))
        return Encoded(self._tokenizer.encode([text])[0], [])


def turns_of(tokenizer: Tokenizer) -> Turns:
    """Return a tokenizer's chat template, or a continuation where it has none.

    Raises:
        UsageError: the template is none, or breaks a limit.
    """
    return ChatTemplate.of(tokenizer) or Continuation(tokenizer)
