"""What a prompt becomes, while it does and when it has."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from easyspec_jax.decode.metrics import Stats
from easyspec_jax.decode.round import Report
from easyspec_jax.errors import EasySpecError
from easyspec_jax.tokenizer import Prompt, TextStream

Item = TypeVar("Item")


def batched(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Consecutive items, so many at a time, the last ones perhaps fewer. Raises EasySpecError if size < 1."""
    if size < 1:
        raise EasySpecError(f"--batch-size {size} must be at least 1")
    return [items[first : first + size] for first in range(0, len(items), size)]


@dataclass(frozen=True)
class Completion:
    """What one prompt became.

    token_ids: generated ids, a stop token included, or up to the one that completed a stop string; text ends before
    either. finish_reason: "stop" or "length". tokens_per_round: of token_ids, all but the first, which prefill made.
    """

    prompt: Prompt
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    stats: Stats
    tokens_per_round: list[int]

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "prompt": self.prompt,
            "prompt_ids": self.prompt_ids,
            "token_ids": self.token_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "stats": self.stats.as_dict(),
        }


@dataclass
class Row:
    """One prompt of a batch on its way."""

    prompt: Prompt
    prompt_ids: list[int]
    text: TextStream
    stats: Stats
    finished: bool = field(default=False, init=False)
    tokens_per_round: list[int] = field(default_factory=list, init=False)

    def prefilled(self, report: Report, row: int, seconds: float) -> str:
        """Takes the first token, after so many seconds; returns the text it adds."""
        self.stats = replace(self.stats, prefill_seconds=seconds)
        return self._push(report, row)[0]

    def advanced(self, report: Report, row: int, seconds: float) -> str:
        """Takes a round's tokens, so many seconds after the start; returns the text they add."""
        drafted, accepted = int(report.drafted[row]), int(report.accepted[row])
        piece, kept = self._push(report, row)
        if kept < int(report.num_tokens[row]):
            # What lies past a stop string counts as little as what lies past a stop token.
            drafted = accepted = kept
        self.tokens_per_round.append(kept)
        stats = self.stats.with_round(kept, drafted, accepted)
        self.stats = replace(stats, decode_seconds=seconds - stats.prefill_seconds)
        return piece

    def _push(self, report: Report, row: int) -> tuple[str, int]:
        """The text that a report adds to the row, and of how many tokens."""
        before = len(self.text.ids)
        piece = self.text.push([int(token) for token in report.tokens[row, : report.num_tokens[row]]])
        self.finished = self.text.stopped or bool(report.done[row])
        return piece, len(self.text.ids) - before

    def completion(self, stop_ids: Sequence[int]) -> Completion:
        """The finished row."""
        stopped = self.text.stopped or self.text.ids[-1] in stop_ids
        reason = "stop" if stopped else "length"
        return Completion(
            self.prompt, self.prompt_ids, self.text.ids, self.text.text, reason, self.stats, self.tokens_per_round
        )
