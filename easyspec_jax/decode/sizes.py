"""Sizes of caches and of prefill chunks: few of them, so that few programs are ever compiled."""

from dataclasses import dataclass

from easyspec_jax.arithmetic import power_of_two, round_up
from easyspec_jax.decode.chunks import PASS_OVERHEAD, PREFILL_SIZES, chunks
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.options import Platform

AHEAD = 256
"""Tokens after a prompt that a text gets cache entries for at first, whatever its limit."""

CAPACITY_UNIT = 128
"""Capacities of caches are multiples of it, and at least that."""


@dataclass(frozen=True)
class Sizes:
    """Sizes for the rounds of one configuration.

    Attributes:
        config: The round's configuration.
        platform: Platform of the devices, such as "gpu".
        max_length: Length that no text exceeds, or None.
    """

    config: RoundConfig
    platform: Platform
    max_length: int | None = None

    def capacity(self, tokens: int) -> int:
        """Return the size of caches for texts of a length.

        It is a power of two, so that few sizes are ever compiled, and leaves room behind the text
        for what one round writes. No cache is larger than texts of max_length need.

        Args:
            tokens: Length of the text.

        Returns:
            Cache entries per row.
        """
        # The next power of two: 300 -> 512, 512 -> 512.
        size = power_of_two(max(self._needed(tokens), CAPACITY_UNIT))
        if self.max_length is None:
            return size
        most = self._needed(max(tokens, self.max_length))
        return min(size, round_up(most, CAPACITY_UNIT))

    def _needed(self, tokens: int) -> int:
        """Count the entries that a round may write for a text of a length."""
        return tokens + self.config.scratch + 1

    def capacities(self, prompt: int, limit: int) -> tuple[int, ...]:
        """List the sizes that caches may have while a text grows to its limit.

        Args:
            prompt: Tokens of the prompt.
            limit: Tokens that may follow.
        """
        # A prompt of 100 tokens with a limit of 1000 starts with room for 356 and grows by powers
        # of two: 512, 1024, 2048.
        sizes = [self.capacity(prompt + self.ahead(limit))]
        while sizes[-1] < self.capacity(prompt + limit):
            sizes.append(self.capacity(sizes[-1]))
        return tuple(sizes)

    def ahead(self, limit: int) -> int:
        """Return how many tokens after a prompt get cache entries at first.

        Args:
            limit: Tokens that may follow.
        """
        # Sums over caches of other sizes may round otherwise, so bit-stable texts never grow them.
        return limit if self.config.rows else min(limit, AHEAD)

    def chunks(self, prompt: int, capacity: int, rows: int = 1) -> tuple[int, ...]:
        """List the sizes of the chunks in which rows are prefilled together.

        Args:
            prompt: Tokens of the longest prompt.
            capacity: Cache entries per row.
            rows: Rows of the batch.
        """
        listed = self._chunk_sizes
        # Several rows fill a pass as well as a long chunk does, and take as much working memory.
        most = max(CAPACITY_UNIT, listed[-1] // rows)
        sizes = [listed[0], *(size for size in listed[1:] if size <= most)]
        return chunks(prompt, sizes, self._overhead(rows), capacity)

    def prefill_from(self, prompt: int, cached: int, capacity: int, rows: int = 1) -> int:
        """Return at which token the prefill of a prompt starts that is partly in the caches.

        Args:
            prompt: Tokens of the longest prompt.
            cached: How many first tokens of each prompt could be taken from a PrefixStore.
            capacity: Cache entries per row.
            rows: Rows of the batch.

        Returns:
            How many of them to take; none if that would make the prefill no shorter.
        """
        start, least = min(cached, prompt - 1), self.smallest_chunk
        # The last chunk is padded. With 1000 of 1020 tokens cached and a capacity of 1024, a chunk
        # of 128 would not fit behind them. It does from 896 on, because sizes divide capacities.
        if start + round_up(prompt - start, least) > capacity:
            start = start // least * least
        rest = self.chunks(prompt - start, capacity - start, rows)
        whole = self.chunks(prompt, capacity, rows)
        spared = sum(whole) - sum(rest) + (len(whole) - len(rest)) * self._overhead(rows)
        return start if spared > 0 else 0

    def prefix_size(self, tokens: int, capacity: int) -> int:
        """Return how many entries to copy of a row that holds some tokens; few sizes are used.

        Args:
            tokens: The tokens.
            capacity: Cache entries per row.
        """
        # The next power of two: 300 -> 512, within a capacity of 1152; 1100 -> 1152.
        return min(power_of_two(max(tokens, CAPACITY_UNIT)), capacity)

    @property
    def reach(self) -> int:
        """Most entries that are written behind committed ones before these become more."""
        return max(self._chunk_sizes[-1], self.config.taken_in + self.config.scratch)

    @property
    def _chunk_sizes(self) -> tuple[int, ...]:
        return PREFILL_SIZES.get(self.platform, PREFILL_SIZES["gpu"])

    @property
    def smallest_chunk(self) -> int:
        """Tokens of the smallest chunk, which divides all others and every capacity."""
        return self._chunk_sizes[0]

    def _overhead(self, rows: int) -> float:
        """Return what a chunk costs each row whatever its tokens; they share what a pass costs."""
        return PASS_OVERHEAD.get(self.platform, PASS_OVERHEAD["gpu"]) / rows
