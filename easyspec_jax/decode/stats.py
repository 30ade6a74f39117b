"""Statistics of speculation, as serving engines define them."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Self


@dataclass(frozen=True)
class TierStats:
    """Rounds of one number of levels, where that is chosen round by round.

    Attributes:
        num_speculative_tokens: The levels; 0 for plain decoding, or with `prompt_lookup` for
            lookups without a draft model.
        rounds: Rounds that were run.
        drafted: Positions that they drafted.
        accepted: Positions that they accepted.
    """

    num_speculative_tokens: int
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: Self) -> Self:
        return replace(
            self,
            rounds=self.rounds + other.rounds,
            drafted=self.drafted + other.drafted,
            accepted=self.accepted + other.accepted,
        )


@dataclass(frozen=True)
class Stats:
    """Statistics of one request, or of several together.

    A position is a level of a round's draft. Positions that the text cannot reach, past a stop
    token or the limit, count as neither drafted nor accepted.

    Attributes:
        rounds: Rounds that were run.
        drafted: Positions that were drafted.
        accepted: Positions that were accepted.
        accepted_per_position: For each position of a draft, the rounds that accepted it.
        prefill_seconds: Time of prefill, in seconds: by the target until the first token, and by
            the draft after it, if the first round drafts.
        decode_seconds: Time of all rounds, in seconds, and of prefill by the draft between them.
        decoded_tokens: Tokens that rounds added. The first token of a text comes from prefill and
            belongs to no round.
        lookup_drafted: Drafted positions that hold a token from a lookup in the text.
        lookup_accepted: Accepted positions whose token came from a lookup. A draft model proposed
            the others.
        forced: Tokens that a grammar left no choice about, and that rounds took without a draft.
        cached_tokens: Prompt tokens that were not prefilled, because their keys and values were
            copied from the store of prefixes or from another text with the same prompt.
        tiers: The same figures by the levels of the round, fewest first; () where all rounds draft
            alike.

    Examples:
        Two rounds of three levels. The first accepts all and adds four tokens, the second none:

        >>> stats = Stats(accepted_per_position=(0, 0, 0), decode_seconds=0.5)
        >>> stats = stats.with_round(tokens=4, drafted=3, accepted=3)
        >>> stats = stats.with_round(tokens=1, drafted=3, accepted=0)
        >>> stats.acceptance_rate, stats.mean_acceptance_length, stats.tokens_per_second
        (0.5, 2.5, 10.0)
        >>> stats.accepted_per_position
        (1, 1, 1)
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_per_position: tuple[int, ...] = ()
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0
    lookup_drafted: int = 0
    lookup_accepted: int = 0
    forced: int = 0
    cached_tokens: int = 0
    tiers: tuple[TierStats, ...] = ()

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted positions, the paper's α; 0 without drafting."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a round yields on average: accepted positions and forced ones, plus 1."""
        return 1.0 + ((self.accepted + self.forced) / self.rounds if self.rounds else 0.0)

    @property
    def tokens_per_second(self) -> float:
        """Speed of the rounds, without prefill and its token; 0 where no time was measured."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def with_round(
        self,
        tokens: int,
        drafted: int,
        accepted: int,
        lookup_drafted: int = 0,
        lookup_accepted: int = 0,
        levels: int | None = None,
        forced: int = 0,
    ) -> Self:
        """Add one more round, whose time is counted elsewhere.

        Args:
            tokens: Tokens that it added.
            drafted: Positions that it drafted.
            accepted: Positions that it accepted, which are the first ones.
            lookup_drafted: Drafted positions that hold a token from a lookup.
            lookup_accepted: Accepted positions whose token came from a lookup.
            levels: Levels of the round, which say whose of `tiers` it is.
            forced: Tokens that were forced.
        """
        # A round accepts a prefix of its draft: with 2 of 3 accepted, (5, 3, 1) becomes (6, 4, 1).
        per_position = list(self.accepted_per_position)
        for position in range(min(accepted, len(per_position))):
            per_position[position] += 1
        return replace(
            self,
            rounds=self.rounds + 1,
            drafted=self.drafted + drafted,
            accepted=self.accepted + accepted,
            accepted_per_position=tuple(per_position),
            decoded_tokens=self.decoded_tokens + tokens,
            lookup_drafted=self.lookup_drafted + lookup_drafted,
            lookup_accepted=self.lookup_accepted + lookup_accepted,
            forced=self.forced + forced,
            tiers=tuple(
                tier + replace(tier, rounds=1, drafted=drafted, accepted=accepted)
                if tier.num_speculative_tokens == levels
                else tier
                for tier in self.tiers
            ),
        )

    def in_parallel(self, other: Self) -> Self:
        """Add the figures of requests that ran at the same time: the longer times count."""
        return replace(
            self + other,
            prefill_seconds=max(self.prefill_seconds, other.prefill_seconds),
            decode_seconds=max(self.decode_seconds, other.decode_seconds),
        )

    def __add__(self, other: Self) -> Self:
        """Add the figures of requests that ran one after the other.

        Raises:
            ValueError: Their drafts have different numbers of levels.
        """
        pairs = zip(self.accepted_per_position, other.accepted_per_position, strict=True)
        return replace(
            self,
            rounds=self.rounds + other.rounds,
            drafted=self.drafted + other.drafted,
            accepted=self.accepted + other.accepted,
            accepted_per_position=tuple(map(sum, pairs)),
            prefill_seconds=self.prefill_seconds + other.prefill_seconds,
            decode_seconds=self.decode_seconds + other.decode_seconds,
            decoded_tokens=self.decoded_tokens + other.decoded_tokens,
            lookup_drafted=self.lookup_drafted + other.lookup_drafted,
            lookup_accepted=self.lookup_accepted + other.lookup_accepted,
            forced=self.forced + other.forced,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            tiers=tuple(a + b for a, b in zip(self.tiers, other.tiers, strict=True)),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return every figure by name, for `--json`."""
        names = ("acceptance_rate", "mean_acceptance_length", "tokens_per_second")
        fields = asdict(self) | {name: getattr(self, name) for name in names}
        del fields["decoded_tokens"]
        return fields
