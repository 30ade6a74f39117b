"""Prefixes: beginnings of texts whose keys and values are kept for prompts that begin alike.

A text that leaves its row has filled caches that the next turn of its conversation, another branch
of it, or a prompt with the same system message would fill again. A PrefixStore keeps a copy of such
rows, within a budget of bytes; what was used least recently goes first. A prompt then prefills only
what comes after the longest prefix that it shares with any of them.

Only entries that an exact pass has written are kept, so a text is what it would be without a store.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from easyspec_jax.arithmetic import round_up
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.refill import RowCaches

SHORTEST = 16
"""Tokens of a prefix that is kept at least; fewer are prefilled as fast as they are copied."""

Ids = Int[np.ndarray, " tokens"]


@dataclass(frozen=True, eq=False)
class Prefix:
    """The beginning of a text, and its keys and values.

    Attributes:
        ids: Its token ids.
        caches: Both models' entries of these tokens, with scratch behind them.
        size: Entries that the caches have room for.
    """

    ids: Ids
    caches: RowCaches
    size: int


class PrefixStore:
    """Prefixes in device memory, least recently used first.

    Everything is decided from token ids and sizes, so that several processes decide alike.

    Attributes:
        limit: Bytes that all prefixes may take together.
        entry_bytes: Bytes of one cache entry of one row, in both models.

    Examples:
        >>> store = PrefixStore(limit=4096, entry_bytes=8)
        >>> store.keep(range(100), 128, lambda: RowCaches((), (), ()))
        >>> store.find([*range(40), 7, 8])[0]
        40
        >>> store.bytes
        1024
    """

    def __init__(self, limit: int, entry_bytes: int) -> None:
        self.limit, self.entry_bytes = limit, entry_bytes
        self._held: list[Prefix] = []

    @property
    def bytes(self) -> int:
        """Bytes that are held."""
        return self.entry_bytes * sum(prefix.size for prefix in self._held)

    @property
    def most(self) -> int:
        """Entries that one prefix may have: the largest power of two within the limit."""
        room = self.limit // self.entry_bytes
        return 1 << (room.bit_length() - 1) if room else 0

    def find(self, prompt: Sequence[int]) -> tuple[int, Prefix | None]:
        """Find the prefix that shares the most first tokens with a prompt.

        Args:
            prompt: Token ids.

        Returns:
            How many tokens it shares, and the prefix; 0 and None if there is none. The prompt's
            last token never counts, because it must run for its logits.
        """
        wanted, best, found = np.asarray(prompt[:-1], np.int32), 0, None
        # The most recent first, so that the less recent of two equals is the first to go.
        for prefix in reversed(self._held):
            shared = shared_tokens(prefix.ids, wanted)
            if shared > best:
                best, found = shared, prefix
        return best, found

    def touch(self, prefix: Prefix) -> None:
        """Note that a prefix has been used."""
        self._held.remove(prefix)
        self._held.append(prefix)

    def keep(self, ids: Sequence[int], size: int, copy: Callable[[], RowCaches]) -> None:
        """Keep a text's beginning, unless it is short or held already.

        Args:
            ids: Its token ids.
            size: Entries that the copy will have, at most `most`.
            copy: Makes the copy; called once there is room for it.
        """
        new = np.asarray(ids, np.int32)
        if len(new) < SHORTEST:
            return
        for prefix in self._held:
            if shared_tokens(prefix.ids, new) == len(new):
                self.touch(prefix)
                return
        # Whatever would find the beginning of the new one will find the new one.
        self._held = [p for p in self._held if shared_tokens(p.ids, new) < len(p.ids)]
        while self.bytes + size * self.entry_bytes > self.limit:
            del self._held[0]
        self._held.append(Prefix(new, copy(), size))

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()


def shared_tokens(one: Ids, other: Ids) -> int:
    """Count the first tokens that two texts share.

    Examples:
        >>> shared_tokens(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
        2
    """
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(np.argmax(differ)) if differ.any() else length


class Repeat(NamedTuple):
    """Rows with one prompt, most of which is prefilled once and copied.

    Attributes:
        rows: The rows.
        end: First token of the prompt that each row prefills by itself.
    """

    rows: tuple[int, ...]
    end: int


@dataclass(frozen=True)
class Spared:
    """The part of a prefill that can be skipped.

    Attributes:
        start: Tokens that a store has of all prompts. It is the least that it has of any, so that
            rows without a repeat start at the same token.
        prefixes: By row, a prefix that holds them; empty if there are none.
        repeats: Rows that share what comes after them.
    """

    start: int
    prefixes: dict[int, Prefix]
    repeats: list[Repeat]

    def starts(self, rows: int) -> list[int]:
        """List the first token that each of some rows prefills by itself.

        Examples:
            >>> Spared(2, {}, [Repeat((1, 2), 9)]).starts(rows=4)
            [2, 9, 9, 2]
        """
        ends = {row: repeat.end for repeat in self.repeats for row in repeat.rows}
        return [ends.get(row, self.start) for row in range(rows)]


class PrefillSizes(NamedTuple):
    """Sizes of the steps by which prompts get into the caches.

    Attributes:
        chunks: Of chunks of all rows together.
        alone: Of chunks of one row, whose prompt others have as well.
        copies: Entries that are copied from or to a row.
    """

    chunks: set[int]
    alone: set[int]
    copies: set[int]


def prefill_sizes(
    programs: Programs,
    found: Spared,
    prompts: Mapping[int, Sequence[int]],
    capacity: int,
    rows: int,
) -> PrefillSizes:
    """List the sizes of the steps of a prefill; the arguments are those of spared().

    Args:
        programs: Compiled steps.
        found: What spared() returned.
        prompts: Token ids by row.
        capacity: Cache entries of each row.
        rows: Rows that are prefilled together.
    """
    starts = found.starts(rows)
    left = max(len(prompt) - starts[row] for row, prompt in prompts.items())
    alone = [
        programs.sizes.chunks(repeat.end - found.start, capacity - found.start)
        for repeat in found.repeats
        if len(repeat.rows) > 1
    ]
    return PrefillSizes(
        chunks=set(programs.sizes.chunks(left, capacity - max(starts), rows)),
        alone=set().union(*alone),
        copies={
            *(prefix.size for prefix in found.prefixes.values()),
            *(programs.sizes.prefix_size(repeat.end, capacity) for repeat in found.repeats),
        },
    )


def spared(
    programs: Programs,
    store: PrefixStore | None,
    prompts: Mapping[int, Sequence[int]],
    capacity: int,
    rows: int,
) -> Spared:
    """Find what need not be prefilled of prompts that are prefilled together.

    Args:
        programs: Compiled steps.
        store: The prefixes, or None.
        prompts: Token ids by row, without rows that hold no text.
        capacity: Cache entries of each row.
        rows: Rows that are prefilled together; those without a prompt count too.
    """
    # Log-probabilities of a prompt need a pass over all of it.
    if programs.config.kinds.prompt_logprobs or not prompts:
        return Spared(0, {}, [])
    start, prefixes = 0, {}
    if store is not None:
        found = {row: store.find(prompt) for row, prompt in prompts.items()}
        cached, longest = min(count for count, _ in found.values()), max(map(len, prompts.values()))
        if start := programs.sizes.prefill_from(longest, cached, capacity, rows):
            prefixes = {row: prefix for row, (_, prefix) in found.items() if prefix is not None}
    # Bit-stable texts need passes over all rows.
    shared = _repeats(programs, prompts, capacity, rows) if programs.config.rows is None else []
    found = Spared(start, prefixes, [repeat for repeat in shared if repeat.end > start])
    # The chunks of a row that shares nothing are written behind what others have shared.
    while found.repeats and not _fits(programs, found, prompts, capacity):
        longest = max(found.repeats, key=lambda repeat: repeat.end)
        fewer = [repeat for repeat in found.repeats if repeat is not longest]
        found = replace(found, repeats=fewer)
    return found


def _fits(
    programs: Programs, found: Spared, prompts: Mapping[int, Sequence[int]], capacity: int
) -> bool:
    """Whether what rows prefill by themselves fits behind what all of them hold by then."""
    starts = found.starts(1 + max(prompts))
    left = max(len(prompt) - starts[row] for row, prompt in prompts.items())
    return max(starts) + round_up(left, programs.sizes.smallest_chunk) <= capacity


def _repeats(
    programs: Programs, prompts: Mapping[int, Sequence[int]], capacity: int, rows: int
) -> list[Repeat]:
    """Find prompts that several rows have, where a shared prefill is shorter."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in prompts.items():
        alike.setdefault(tuple(prompt), []).append(row)
    return [
        Repeat(tuple(own), end)
        for prompt, own in alike.items()
        if len(own) > 1
        if (end := programs.sizes.prefill_from(len(prompt), len(prompt) - 1, capacity, rows))
    ]


class Text:
    """Host-side record of a row's text: which tokens both caches hold exactly.

    Attributes:
        ids: Token ids of the prompt and of all that was reported.
        exact: How many of them, the first ones, have exact entries in both caches.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self.ids, self.exact = list(prompt), len(prompt)

    def add(self, tokens: Sequence[int], keeps_exact: bool) -> None:
        """Add what a round, or the prefill, reported.

        Args:
            tokens: The new tokens.
            keeps_exact: Whether rounds leave exact entries in the draft's caches, if there are any.
        """
        # The draft's caches lack the tokens of the last round until the next one calibrates them,
        # and the target's lack only the last of them. So what both have is the text before it.
        if tokens and keeps_exact:
            self.exact = len(self.ids)
        self.ids += tokens

    def catch_up(self, pending: int) -> None:
        """Note that both caches hold all but the last `pending` tokens exactly, if not more."""
        if self.exact:
            self.exact = max(self.exact, len(self.ids) - pending)

    def spoil(self) -> None:
        """Note that a model's logits were not finite: nothing of this text can be kept."""
        self.exact = 0
