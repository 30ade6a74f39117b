"""Statistics of speculation, as serving engines define them."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Self


@dataclass(frozen=True)
class Stats:
    """Statistics of one request. Times in seconds; the first token, made by prefill, belongs to no round.

    drafted and accepted count positions (levels), those past a stop token or the limit in neither.
    accepted_per_position[i]: rounds whose draft was accepted at position i.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_per_position: tuple[int, ...] = ()
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted positions, the paper's α; 0 without drafting."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted positions per round: tokens that one pass of the target yields."""
        return 1.0 + (self.accepted / self.rounds if self.rounds else 0.0)

    @property
    def tokens_per_second(self) -> float:
        """Speed of the rounds, prefill and its token left out; 0 without rounds."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def with_round(self, tokens: int, drafted: int, accepted: int) -> Self:
        """These figures after one more round."""
        return replace(
            self,
            rounds=self.rounds + 1,
            drafted=self.drafted + drafted,
            accepted=self.accepted + accepted,
            accepted_per_position=tuple(
                n + (i < accepted) for i, n in enumerate(self.accepted_per_position)
            ),
            decoded_tokens=self.decoded_tokens + tokens,
        )

    def beside(self, other: Self) -> Self:
        """The figures of both together, where both ran at once: times are those of the longer one."""
        return replace(
            self + other,
            prefill_seconds=max(self.prefill_seconds, other.prefill_seconds),
            decode_seconds=max(self.decode_seconds, other.decode_seconds),
        )

    def __add__(self, other: Self) -> Self:
        """The figures of both together, where one followed the other."""
        pairs = zip(self.accepted_per_position, other.accepted_per_position, strict=True)
        return replace(
            self,
            rounds=self.rounds + other.rounds,
            drafted=self.drafted + other.drafted,
            accepted=self.accepted + other.accepted,
            accepted_per_position=tuple(a + b for a, b in pairs),
            prefill_seconds=self.prefill_seconds + other.prefill_seconds,
            decode_seconds=self.decode_seconds + other.decode_seconds,
            decoded_tokens=self.decoded_tokens + other.decoded_tokens,
        )

    def as_dict(self) -> dict[str, Any]:
        """Every figure by name, for `--json`."""
        names = ("acceptance_rate", "mean_acceptance_length", "tokens_per_second")
        fields = asdict(self) | {name: getattr(self, name) for name in names}
        del fields["decoded_tokens"]
        return fields
