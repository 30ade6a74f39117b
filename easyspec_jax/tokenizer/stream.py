"""Text that grows with its token ids, and at every moment is what the tokenizer would decode.

The text that follows a prompt is a function of the ids alone: decode the prompt and the ids
together, and cut off what they have in common with the decoded prompt. Doing so again for each
token would take time that grows with the text. A stream therefore starts decoding at an *anchor*:
a token such that nothing before it changes how the ids from there on are spelled.

Only two things reach across tokens. A character of several bytes can be split over tokens, and some
decoders strip a space at the start of a text. A token that decodes on its own to whole, visible
characters is past both, so it can serve as an anchor.
"""

import json
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

Tokenizer = Any
"""A transformers tokenizer that is backed by the tokenizers library."""

# Decoders write U+FFFD for bytes that are not a whole character yet. A genuine U+FFFD in a text
# looks the same, so it is held back too, until another character follows.
_HALF = "\ufffd"

_PIECEWISE = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace"}
"""Decoders that spell a token without looking at later tokens (except for bytes of a character)."""


def decode_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Decode ids to text, without special tokens and without tidying up spaces.

    Examples:
        >>> from easyspec_jax import demo
        >>> from easyspec_jax.tokenizer import encode, load_tokenizer
        >>> tokenizer = load_tokenizer(demo.TARGET)
        >>> decode_text(tokenizer, encode(tokenizer, "def f(x):"))
        'def f(x):'
    """
    return tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True)


class Detokenizer:
    """A tokenizer's decoder, with what a stream must know about it.

    Attributes:
        piecewise: Whether text can be shown before all ids are there.
        is_anchor: Whether no earlier token can change how this id and later ones are spelled.
        is_byte: Whether this id is a single byte, which is decoded together with its neighbours.
        is_hidden: Whether the decoder never sees this id: it is special or unknown.
        has_bytes: Whether some ids are single bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}
        decoder = self._backend.decoder
        parts = [] if decoder is None else _parts(json.loads(decoder.__getstate__()))
        self.piecewise = _is_piecewise(parts)
        # Sentencepiece spells an unknown character as byte tokens "<0xE4>", "<0xB8>", "<0xAD>",
        # which its ByteFallback decoder joins. ByteLevel has no such tokens: each of its letters
        # stands for a byte ("Ġ" for a space), and any token may begin or end inside a character.
        self.has_bytes = any(part["type"] == "ByteFallback" for part in parts)
        # Asked for every token of every text: each instance remembers its own answers.
        self.is_anchor = cache(self._is_anchor)
        self.is_byte = cache(self._is_byte)
        self.is_hidden = cache(self._is_hidden)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, without special tokens."""
        return decode_text(self._tokenizer, ids)

    def is_whole(self, ids: Sequence[int]) -> bool:
        """Whether ids spell whole, visible characters on their own."""
        text = self.decode(ids)
        return text != "" and _HALF not in text

    def _is_anchor(self, number: int) -> bool:
        return self.is_whole([number]) and not self.is_byte(number)

    def _is_byte(self, number: int) -> bool:
        token = self._backend.id_to_token(number) or ""
        looks_so = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        return self.has_bytes and looks_so

    def _is_hidden(self, number: int) -> bool:
        return number in self._special or self._backend.id_to_token(number) is None


def _parts(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _is_piecewise(parts: list[dict[str, Any]]) -> bool:
    """Whether no part of a decoder lets a later token change the spelling of earlier ones."""
    joined = False
    for part in parts:
        kind = part["type"]
        # Stripping the end of a text waits for the end; stripping its start does not.
        if kind == "Strip":
            if part["stop"]:
                return False
        elif kind not in _PIECEWISE or (kind == "Replace" and joined):
            # Once the tokens are one string, a pattern can match across them.
            return False
        joined = joined or kind in ("Fuse", "ByteLevel")
    return True


_detokenizer = lru_cache(maxsize=8)(Detokenizer)


class TextStream:
    """Text that grows with its ids, in whole characters, and ends before the first stop string.

    The text does not depend on how the ids are divided into pushes. What the pushes return, with
    rest() at the end, adds up to the text.

    Attributes:
        ids: The ids taken so far. Those after the one that completed a stop string are dropped.
        stopped: Whether a stop string was completed.

    Examples:
        >>> from easyspec_jax import demo
        >>> from easyspec_jax.tokenizer import encode, load_tokenizer
        >>> tokenizer = load_tokenizer(demo.TARGET)
        >>> stream = TextStream(tokenizer, stop=[":"])
        >>> stream.push(encode(tokenizer, "def f("))
        'def f('
        >>> stream.push(encode(tokenizer, "x): return"))
        'x)'
        >>> stream.stopped, stream.text
        (True, 'def f(x)')
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        prompt_ids: Sequence[int] = (),
        stop_ids: Sequence[int] = (),
    ) -> None:
        """Start after a prompt.

        Args:
            tokenizer: The target's.
            stop: Strings that end the text.
            prompt_ids: Ids that come before the text.
            stop_ids: Ids that end the text. They are not spelled, even if the tokenizer takes
                them for ordinary text.
        """
        self.ids: list[int] = []
        self.stopped = False
        self._decoder = _detokenizer(tokenizer)
        self._stop, self._stop_ids = stop, frozenset(stop_ids)
        self._overlaps = [_Overlap(one) for one in stop]
        # Prompt and text, without the ids that the decoder never sees.
        self._all = [number for number in prompt_ids if not self._decoder.is_hidden(number)]
        self._certain = ""  # text that no further id can change
        self._shown = 0  # characters of it that push() has returned
        self._anchor = self._read = 0  # where decoding starts, and up to where _known goes
        self._open = 0  # byte tokens at the end; a further one may change their text
        for number in reversed(self._all):
            if not self._decoder.is_byte(number):
                break
            self._open += 1
        self._read_to(len(self._all), "")

    @property
    def text(self) -> str:
        """The text of all ids so far, final or not, up to the stop string."""
        return self._certain if self.stopped else self._spelled(len(self._all))

    def push(self, ids: Sequence[int]) -> str:
        """Take further ids and return the text that they add, as far as it is final."""
        before = self._shown
        for number in ids:
            if self.stopped:
                break
            self._take(number)
        return self._certain[before : self._shown]

    def rest(self) -> str:
        """Return the text that push() still holds back, once no more ids come."""
        return self.text[self._shown :]

    def _take(self, number: int) -> None:
        self.ids.append(number)
        if number in self._stop_ids or self._decoder.is_hidden(number):
            return
        self._all.append(number)
        self._open = self._open + 1 if self._decoder.is_byte(number) else 0
        if not self._stop and (self._open or not self._decoder.piecewise):
            return
        text, end = self._spelled(len(self._all)), len(self._all) - self._open
        stop = self._first_stop(text.rstrip(_HALF))
        if stop is not None:
            self.stopped, self._certain, self._shown = True, text[:stop], stop
        elif self._decoder.piecewise:
            closed = text if end == len(self._all) else self._spelled(end)
            self._certain = closed.rstrip(_HALF)
            for overlap in self._overlaps:
                overlap.follow(self._certain)
            # A push never takes back what an earlier one returned, hence the max().
            self._shown = max(self._shown, len(self._certain) - self._withheld())
            if end == len(self._all) and self._certain == text:
                self._read_to(end, text)

    def _read_to(self, end: int, text: str) -> None:
        """Record that the ids up to `end` spell `text`, and move the anchor towards it."""
        # With ids [.., A, x, y | z] and A the last anchor before end, _known is "Axy". When z
        # comes, "Axyz" is decoded, and the text grows by what follows "Axy" in it.
        places = range(end - 1, self._read - 1, -1)
        is_anchor = self._decoder.is_anchor
        anchor = next((place for place in places if is_anchor(self._all[place])), None)
        # Characters that the vocabulary lacks have several tokens, none of them an anchor. Together
        # they are one.
        new = self._all[self._read : end]
        if anchor is None and not self._decoder.has_bytes and self._decoder.is_whole(new):
            anchor = self._read
        self._anchor = self._anchor if anchor is None else anchor
        self._read = end
        self._known, self._text = self._decoder.decode(self._all[self._anchor : end]), text

    def _spelled(self, end: int) -> str:
        """Return the text of the ids up to `end`, decoding only those from the anchor on."""
        spelled = self._decoder.decode(self._all[self._anchor : end])
        return self._text + spelled[_common_length(self._known, spelled) :]

    def _first_stop(self, text: str) -> int | None:
        """Return where the stop string begins that ends first in the text not shown yet."""
        first = None
        for stop in self._stop:
            place = text.find(stop, self._shown)
            if place >= 0 and (first is None or (place + len(stop), place) < first):
                first = place + len(stop), place
        return None if first is None else first[1]

    def _withheld(self) -> int:
        """Return the length of the longest end of the text that may become a stop string."""
        longest = max((overlap.length for overlap in self._overlaps), default=0)
        return min(longest, len(self._certain) - self._shown)


class _Overlap:
    """The longest end of a growing text with which a stop string may begin (Knuth-Morris-Pratt).

    Attributes:
        length: Its length.
    """

    def __init__(self, stop: str) -> None:
        self.length = 0
        self._stop, self._read = stop, 0
        # Entry n: the longest end of the first n characters with which they begin as well. It is
        # found as far as is needed: a stop string may be long.
        self._borders = [0, 0]

    def follow(self, text: str) -> None:
        """Take in what a text has grown by."""
        for character in text[self._read :]:
            self.length = self._next(self.length, character)
        self._read = max(self._read, len(text))

    def _next(self, length: int, character: str) -> int:
        while length and (length == len(self._stop) or self._stop[length] != character):
            length = self._border(length)
        return length + (self._stop[length] == character)

    def _border(self, length: int) -> int:
        while len(self._borders) <= length:
            last = self._borders[-1]
            self._borders.append(self._next(last, self._stop[len(self._borders) - 1]))
        return self._borders[length]


def _common_length(first: str, second: str) -> int:
    """Return the length of the longest common prefix of two texts."""
    if second.startswith(first):  # the usual case, without a loop in Python
        return len(first)
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length
