"""From ids to text: text that grows with its ids and is, at every moment, what the tokenizer's decoder says.

The text of some ids after a prompt is a function of both alone: the decoding of all of them without what the decoding
of the prompt begins with. To decode everything anew for each token would take time that grows with the text, so a
stream decodes from an *anchor* on: a token before which nothing can change how the ids from there on are spelled. Two
things reach across tokens: characters of several bytes, and decoders that strip a blank at the start. A visible token
that by itself is whole characters ends both.
"""

import json
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

Tokenizer = Any

_HALF = "\ufffd"
"""Stands for bytes that are no whole character; a real one in a text is taken for such until another follows it."""

_PIECEWISE = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace"}
"""Decoders that spell a token without looking at those after it (but for the bytes of a character)."""


class Detokenizer:
    """The decoder of a tokenizer, and what a stream must know of it.

    Attributes:
        piecewise: Whether text can be shown before all ids are there.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}
        decoder = self._backend.decoder
        parts = [] if decoder is None else _parts(json.loads(decoder.__getstate__()))
        self.piecewise = _is_piecewise(parts)
        self._has_bytes = any(part["type"] == "ByteFallback" for part in parts)
        self.is_anchor, self.is_byte, self.is_hidden = map(
            cache, (self._is_anchor, self._is_byte, self._is_hidden)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def _is_anchor(self, number: int) -> bool:
        """Whether nothing before this token can change how it and those after it are spelled."""
        text = self.decode([number])
        return text != "" and _HALF not in text and not self.is_byte(number)

    def _is_byte(self, number: int) -> bool:
        """Whether the token may be one byte, which a sentencepiece decoder spells together with its neighbours."""
        token = self._backend.id_to_token(number) or ""
        return (
            self._has_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        )

    def _is_hidden(self, number: int) -> bool:
        """Whether the decoder never sees the token: it is special, or not in the vocabulary."""
        return number in self._special or self._backend.id_to_token(number) is None


def _parts(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _is_piecewise(parts: list[dict[str, Any]]) -> bool:
    kinds = [part["type"] for part in parts]
    # Once everything is one string, a pattern can match across tokens.
    fused = min(
        (place for place, kind in enumerate(kinds) if kind in ("Fuse", "ByteLevel")),
        default=len(kinds),
    )
    return all(
        (kind == "Strip" and not part["stop"])
        or (kind in _PIECEWISE and not (kind == "Replace" and place > fused))
        for place, (kind, part) in enumerate(zip(kinds, parts, strict=True))
    )


_detokenizer = lru_cache(maxsize=8)(Detokenizer)


class TextStream:
    """Text that grows with its ids, never shows half a character, and ends before the stop string completed first.

    Whatever the portions in which ids are pushed, the text is the same, and so are its pieces put together.

    Attributes:
        ids: The ids taken so far; those after the one that completed a stop string are dropped.
        stopped: Whether a stop string was completed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        prompt_ids: Sequence[int] = (),
        stop_ids: Sequence[int] = (),
    ) -> None:
        """Start behind a prompt.

        Args:
            tokenizer: The target's.
            stop: Strings that end the text.
            prompt_ids: The ids that the text goes on from.
            stop_ids: Ids that end the text and are not spelled, even where the tokenizer takes them for plain text.
        """
        self.ids: list[int] = []
        self.stopped = False
        self._decoder = _detokenizer(tokenizer)
        self._stop, self._stop_ids = stop, frozenset(stop_ids)
        # The prompt and the ids that are spelled, without those that the decoder never sees.
        self._all = [number for number in prompt_ids if not self._decoder.is_hidden(number)]
        self._certain = ""  # text that no further id can change
        self._shown = 0  # characters of it that push() has returned
        self._read_to(len(self._all), "")

    @property
    def text(self) -> str:
        """The text of all ids, certain or not, before the stop string that ended it."""
        return self._certain if self.stopped else self._spelled(len(self._all))

    def push(self, ids: Sequence[int]) -> str:
        """Take further ids and return the text that they add, as far as it is certain."""
        before = self._shown
        for number in ids:
            if self.stopped:
                break
            self._take(number)
        return self._certain[before : self._shown]

    def rest(self) -> str:
        """Return what push() still holds back, when no more ids come."""
        return self.text[self._shown :]

    def _take(self, number: int) -> None:
        self.ids.append(number)
        if number in self._stop_ids or self._decoder.is_hidden(number):
            return
        self._all.append(number)
        if not self._decoder.piecewise and not self._stop:
            return
        text, end = self._spelled(len(self._all)), self._start_of_open_bytes()
        stop = self._first_stop(text.rstrip(_HALF))
        if stop is not None:
            self.stopped, self._certain, self._shown = True, text[:stop], stop
        elif self._decoder.piecewise:
            closed = text if end == len(self._all) else self._spelled(end)
            self._certain = closed.rstrip(_HALF)
            self._shown = max(self._shown, len(self._certain) - self._withheld())
            if end == len(self._all) and self._certain == text:
                self._read_to(end, text)

    def _read_to(self, end: int, text: str) -> None:
        """Settle that the ids up to end say text, so that spelling goes on from the last anchor before it."""
        anchors = (
            place for place in range(end - 1, -1, -1) if self._decoder.is_anchor(self._all[place])
        )
        self._anchor = next(anchors, 0)
        self._known, self._text = self._decoder.decode(self._all[self._anchor : end]), text

    def _spelled(self, end: int) -> str:
        """The text of the ids up to end; those that are settled are not decoded again."""
        spelled = self._decoder.decode(self._all[self._anchor : end])
        return self._text + spelled[_common_length(self._known, spelled) :]

    def _start_of_open_bytes(self) -> int:
        """Find where trailing byte tokens begin, which a further byte could turn into other characters."""
        start = place = len(self._all)
        while place > self._anchor:
            place -= 1
            if not self._decoder.is_byte(self._all[place]):
                break
            start = place
        return start

    def _first_stop(self, text: str) -> int | None:
        """Find the stop string that ends first in the text not shown yet; returns where it begins."""
        found = [
            (place + len(stop), place)
            for stop in self._stop
            if (place := text.find(stop, self._shown)) >= 0
        ]
        return min(found)[1] if found else None

    def _withheld(self) -> int:
        """Length of the longest end of the certain text that may yet become a stop string."""
        shown = self._certain[self._shown :]
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(shown)), longest, -1):
                if shown.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def _common_length(first: str, second: str) -> int:
    """Length of what two texts have in common at the start."""
    if second.startswith(first):
        return len(first)
    pairs = enumerate(zip(first, second, strict=False))
    return next(
        (place for place, (one, other) in pairs if one != other), min(len(first), len(second))
    )


def decode_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Decode ids to text without special tokens, spaces as they are."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
