"""Grammars on the host: which tokens may follow, by llguidance.

Compiled rounds ask for masks in callbacks (see adjust.py). An answer depends on the arguments
alone: the output so far, and the path below it. So rounds may be dispatched ahead, every device may
ask by itself, and a rejected draft leaves no trace. What is kept between calls only saves time.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from easyspec_jax.arithmetic import ceil_div
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import MAX_LEVELS, Grammar, SamplingParams
from easyspec_jax.parallel import hosts
from easyspec_jax.sampling.grammar_compiler import compiled, open_vocabulary
from easyspec_jax.sampling.vocabulary import NO_TOKEN

NO_GRAMMAR = 0
"""Number of no grammar: everything is allowed."""

WORD = 32
"""Tokens whose bits are in one number of a mask."""

MOST_FORCED = 2
"""Tokens that a round takes at most before it drafts, because a grammar allows no others."""

_ANSWERS = 4
"""Latest answers that are kept: devices ask the same one after the other."""

_COMPILED = 64
"""Grammars that are kept compiled."""

_NUMBERS = 1024
"""Grammars that have numbers; those of running texts are the latest used."""

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Mask = Int[np.ndarray, " words"]
"""Bit id % 32 of word id // 32 says whether an id is allowed."""


def _keep(store: OrderedDict[Key, Value], key: Key, value: Value, most: int) -> Value:
    """Store a value as the latest one, and drop the oldest beyond a number."""
    store[key] = value
    store.move_to_end(key)
    while len(store) > most:
        store.popitem(last=False)
    return value


@dataclass
class _Position:
    """A place in a text from which a grammar goes on.

    Attributes:
        matcher: llguidance's, after the output.
        always: The mask after any path, once the text has ended or its matcher has failed.
        masks: The masks of paths below the output that have been asked for.
    """

    matcher: Any = None
    always: Mask | None = None
    masks: dict[tuple[int, ...], Mask] = field(default_factory=dict)


class Grammars:
    """Grammars of one vocabulary by number, and what masks the tokens that they forbid.

    It may be used from any thread.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stop_ids: tuple[int, ...]) -> None:
        """Take a tokenizer; it is not read until a grammar is used.

        Args:
            tokenizer: The target's tokenizer.
            vocab_size: Ids that the target has. Those without a token are never allowed.
            stop_ids: The checkpoint's stop tokens.
        """
        self._tokenizer, self._vocab_size, self._stop_ids = tokenizer, vocab_size, stop_ids
        self._everything = np.full(ceil_div(vocab_size, WORD), -1, np.int32)
        self._lock, self._opening = Lock(), Lock()
        self._vocabulary: Any = None  # llguidance's tokenizer
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._tried: OrderedDict[Grammar, None] = OrderedDict()
        self._numbered: OrderedDict[int, tuple[Grammar, tuple[int, ...]]] = OrderedDict()
        self._latest = NO_GRAMMAR
        self._positions: OrderedDict[tuple[int, tuple[int, ...]], _Position] = OrderedDict()
        self._answers: OrderedDict[tuple[Any, ...], np.ndarray] = OrderedDict()

    def check(self, sampling: SamplingParams) -> None:
        """Raise EasySpecError unless the grammar of a way of sampling can be used.

        The first grammar takes seconds, and each new one up to some; see grammar_compiler.py.
        """
        if (grammar := sampling.grammar) is None:
            return
        if hosts.count() > 1:
            raise EasySpecError(
                f"`{grammar.kind}` works in one process only; run without `distributed`"
            )
        if not sampling.end_ids(self._stop_ids):
            raise EasySpecError(
                f"`{grammar.kind}` needs a token that ends the text: give `stop_token_ids`"
            )
        # Not within the lock, which rounds of other texts wait for.
        with self._opening:
            if self._vocabulary is None:
                self._vocabulary = open_vocabulary(
                    self._tokenizer, self._vocab_size, self._stop_ids, grammar.kind
                )
        with self._lock:
            known = self._compiled.get(grammar)
        if known is None:
            # Once is enough: a request that waits must not be refused later.
            known = compiled(grammar, self._vocabulary, trial=grammar not in self._tried)
        with self._lock:
            _keep(self._compiled, grammar, known, _COMPILED)
            _keep(self._tried, grammar, None, _NUMBERS)

    def number(self, sampling: SamplingParams) -> int:
        """Return the number of the grammar of a way of sampling; NO_GRAMMAR for none.

        Args:
            sampling: A way of sampling that check() allows.
        """
        if (grammar := sampling.grammar) is None:
            return NO_GRAMMAR
        own = grammar, sampling.end_ids(self._stop_ids)
        with self._lock:
            known = [number for number, other in self._numbered.items() if other == own]
            number = known[0] if known else self._latest + 1
            self._latest = max(self._latest, number)
            _keep(self._numbered, number, own, _NUMBERS)
            return number

    def masks(
        self, words: int, shape: tuple[int, int, int], *pieces: ArrayLike
    ) -> Int[np.ndarray, "batch nodes words"]:
        """Return which tokens may follow each node. It does not raise, since devices call it.

        Args:
            words: Words of a mask, which cover the vocabulary with its padding.
            shape: Rows, nodes of each, and tokens of a path.
            pieces: One flat array of int32, cut anywhere. Each row has its grammar's number, how
                many tokens its output has and how many of these are ahead of what is verified, the
                tokens from each node up to the root, which is left out, and then NO_TOKEN; and its
                output, and then anything.

        Returns:
            A mask for each node. All is allowed past the end of the text, and below a path that is
            forbidden itself.
        """
        batch, nodes, levels = shape

        def of_row(row: Int[np.ndarray, " columns"]) -> Int[np.ndarray, "nodes words"]:
            number, count, ahead = row[:3].tolist()
            found = np.full((nodes, words), -1, np.int32)
            if number == NO_GRAMMAR:
                return found
            drafted, output = np.split(row[3:], [nodes * levels])
            verified, forced = np.split(output[:count], [count - ahead])
            place = self._place(number, verified, 2 * batch)
            for node, path in enumerate(drafted.reshape(nodes, levels).tolist()):
                # From the root down: [7, 6, -] -> (6, 7), behind what is forced.
                below = (*forced.tolist(), *(x for x in reversed(path) if x != NO_TOKEN))
                found[node, : self._everything.size] = place(below)
            return found

        return self._answer(("masks", words, shape), batch, pieces, of_row)

    def forced(self, shape: tuple[int, int], *pieces: ArrayLike) -> Int[np.ndarray, "batch most"]:
        """Return the tokens that follow because no others may. Like masks(), it does not raise.

        Args:
            shape: Rows, and tokens to find at most.
            pieces: As for masks(). Each row has its grammar's number, how many tokens its output
                has, and its output, and then anything.

        Returns:
            Each row's tokens, which may end its text, and then NO_TOKEN.
        """
        batch, most = shape

        def of_row(row: Int[np.ndarray, " columns"]) -> Int[np.ndarray, " most"]:
            number, count = row[:2].tolist()
            path: tuple[int, ...] = ()
            if number != NO_GRAMMAR:
                place = self._place(number, row[2 : 2 + count], 2 * batch)
                while len(path) < most and (only := _only(place(path))) is not None:
                    path = (*path, only)
            return np.asarray([*path, *[NO_TOKEN] * (most - len(path))], np.int32)

        return self._answer(("forced", shape), batch, pieces, of_row)

    def _answer(
        self,
        name: tuple[Any, ...],
        batch: int,
        pieces: tuple[ArrayLike, ...],
        of_row: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """Answer a question row by row, or as it was answered a moment ago."""
        asked = np.concatenate([np.asarray(piece) for piece in pieces])
        question = *name, asked.tobytes()
        with self._lock:
            if question not in self._answers:
                # Rows may be alike: several texts for a prompt begin as one.
                known: dict[bytes, np.ndarray] = {}
                rows = asked.reshape(batch, -1)
                for row in rows:
                    if row.tobytes() not in known:
                        known[row.tobytes()] = of_row(row)
                answer = np.stack([known[row.tobytes()] for row in rows])
                _keep(self._answers, question, answer, _ANSWERS)
            return self._answers[question]

    def _place(
        self, number: int, output: Int[np.ndarray, " tokens"], most: int
    ) -> Callable[[tuple[int, ...]], Mask]:
        """Return what finds masks below an output; at most some positions are kept for later."""
        grammar, ends = self._numbered[number]
        _keep(self._numbered, number, (grammar, ends), _NUMBERS)
        text = tuple(output.tolist())
        position = self._position(number, text)
        _keep(self._positions, (number, text), position, most)

        def mask(path: tuple[int, ...]) -> Mask:
            if path not in position.masks:
                position.masks[path] = self._mask(position, path, ends)
            return position.masks[path]

        return mask

    def _position(self, number: int, output: tuple[int, ...]) -> _Position:
        """Find where a text is, going on from where it was before."""
        if (known := self._positions.get((number, output))) is not None:
            return known
        grammar, ends = self._numbered[number]
        if not set(ends).isdisjoint(output):
            return _Position(always=self._everything)
        # The place before the latest round is at most this far back. If it is gone, begin anew.
        most = MAX_LEVELS + MOST_FORCED + 1
        matcher, new = None, output
        for count in range(1, min(most, len(output)) + 1):
            if earlier := self._positions.pop((number, output[:-count]), None):
                matcher, new = earlier.matcher, output[-count:]
                break
        else:
            matcher = self._matcher(grammar).deep_copy()
        # It consumes less if it runs into a limit; there is none where it has failed before.
        consumed = 0 if matcher is None else matcher.try_consume_tokens(list(new))
        if consumed < len(new):
            return _Position(always=0 * self._everything)
        return _Position(matcher)

    def _mask(self, position: _Position, path: tuple[int, ...], ends: tuple[int, ...]) -> Mask:
        """Return the mask after a path below a position."""
        if position.always is not None:
            return position.always
        matcher = position.matcher
        if not set(ends).isdisjoint(path) or matcher.validate_tokens(list(path)) < len(path):
            return self._everything
        matcher.try_consume_tokens(list(path))
        # llguidance counts one id more than there are.
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: self._everything.size].copy()
        _set(mask, self._vocabulary.eos_tokens, False)
        if matcher.is_accepting():
            _set(mask, ends, True)
        if matcher.is_error():
            position.always = 0 * self._everything
            return position.always
        matcher.rollback(len(path))
        return mask.view(np.int32)

    def _matcher(self, grammar: Grammar) -> Any:
        """Return a matcher before any output; not to be changed."""
        known = self._compiled.get(grammar)
        if known is None:
            known = compiled(grammar, self._vocabulary)
        return _keep(self._compiled, grammar, known, _COMPILED)


def _only(mask: Mask) -> int | None:
    """Return the only id that a mask allows; None if it allows more, or none."""
    (words,) = np.nonzero(mask)
    if words.size != 1:
        return None
    word = int(mask[words[0]]) & 0xFFFFFFFF
    return int(words[0]) * WORD + word.bit_length() - 1 if word.bit_count() == 1 else None


def _set(mask: np.ndarray, ids: Iterable[int], allowed: bool) -> None:
    """Allow or forbid ids."""
    for number in ids:
        bit = np.uint32(1 << number % WORD)
        mask[number // WORD] = mask[number // WORD] & ~bit | (bit if allowed else np.uint32(0))
