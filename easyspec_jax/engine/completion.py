"""A prompt's text while it is generated, and when it is complete."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from easyspec_jax.decode.round import Fault, Report
from easyspec_jax.decode.stats import Stats
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams
from easyspec_jax.tokenizer.conversation import Conversation, Prompt
from easyspec_jax.tokenizer.stream import TextStream

Item = TypeVar("Item")


def batched(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Split items into consecutive batches of a size; the last may be shorter. Raises EasySpecError if size < 1."""
    if size < 1:
        raise EasySpecError(f"--batch-size {size} must be at least 1")
    return [items[first : first + size] for first in range(0, len(items), size)]


@dataclass(frozen=True)
class Completion:
    """Text generated for one prompt.

    token_ids: generated ids, a stop token included, or up to the one that completed a stop string; text ends before
    either. finish_reason: "stop", "length" or "error", which error explains. tokens_per_round: of token_ids, all
    but the first, which prefill made.
    """

    prompt: Prompt
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    stats: Stats
    tokens_per_round: list[int]
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        fields = {
            "prompt": asdict(self.prompt) if isinstance(self.prompt, Conversation) else self.prompt,
            "prompt_ids": self.prompt_ids,
            "token_ids": self.token_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "stats": self.stats.as_dict(),
        }
        return fields if self.error is None else fields | {"error": self.error}


@dataclass
class Generation:
    """One prompt of a batch on its way. limit: tokens to generate; begun: when, by time.perf_counter()."""

    prompt: Prompt
    prompt_ids: list[int]
    text: TextStream
    stats: Stats
    sampling: SamplingParams
    limit: int
    begun: float = field(default=0.0, init=False)
    started: bool = field(default=False, init=False)
    finished: bool = field(default=False, init=False)
    fault: Fault = field(default=Fault.NONE, init=False)
    tokens_per_round: list[int] = field(default_factory=list, init=False)

    def take(self, report: Report, row: int) -> str:
        """Takes the first token or a round's; returns the text they add."""
        seconds = time.perf_counter() - self.begun
        return (self._advanced if self.started else self._prefilled)(report, row, seconds)

    def _prefilled(self, report: Report, row: int, seconds: float) -> str:
        self.started, self.stats = True, replace(self.stats, prefill_seconds=seconds)
        return self._push(report, row)[0]

    def _advanced(self, report: Report, row: int, seconds: float) -> str:
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
        piece = self.text.push(
            [int(token) for token in report.tokens[row, : report.num_tokens[row]]]
        )
        self.finished = self.text.stopped or bool(report.done[row])
        self.fault = Fault.NONE if self.text.stopped else Fault(int(report.fault[row]))
        return piece, len(self.text.ids) - before

    def completion(self, stop_ids: Sequence[int], directories: Mapping[Fault, str]) -> Completion:
        """The finished row. directories: of the models that may be at fault."""
        reason, error = "length", None
        if self.fault:
            reason, error = (
                "error",
                f"{directories[self.fault]} gave logits that are not finite; check its weights",
            )
        elif self.text.stopped or self.text.ids[-1] in stop_ids:
            reason = "stop"
        ids, text = self.text.ids, self.text.text
        return Completion(
            self.prompt,
            self.prompt_ids,
            ids,
            text,
            reason,
            self.stats,
            self.tokens_per_round,
            error,
        )
