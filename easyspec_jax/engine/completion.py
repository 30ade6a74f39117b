"""A prompt before, during and after its text is generated."""

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
    """Split items into consecutive batches, of which the last may be shorter.

    Raises:
        EasySpecError: The size is less than 1.

    Examples:
        >>> batched("abcde", 2)
        ['ab', 'cd', 'e']
    """
    if size < 1:
        raise EasySpecError(f"`batch_size` {size} must be at least 1")
    return [items[first : first + size] for first in range(0, len(items), size)]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and its token ids; `Engine.prepare` makes one."""

    prompt: Prompt
    ids: list[int]


@dataclass(frozen=True)
class Completion:
    """Text generated for one prompt.

    Attributes:
        prompt: The prompt as it was given.
        prompt_ids: Its token ids.
        token_ids: Generated ids, including a stop token and the token that completed a stop string.
        text: Generated text; it ends before either.
        finish_reason: "stop", "length" or "error".
        stats: Rounds, acceptance and times.
        tokens_per_round: How many of token_ids each round added. Prefill added the first one.
        error: Explains the finish_reason "error".
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
        """Return the object that `--json` prints."""
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
    """A prompt whose text is being generated: the host's record of one row of a batch.

    Attributes:
        prompt: The prompt as it was given.
        prompt_ids: Its token ids.
        text: Ids and text so far.
        stats: Rounds, acceptance and times so far.
        sampling: How its tokens are chosen.
        limit: Tokens to generate at most.
        begun: Start of its prefill, by time.perf_counter().
        started: Whether its first token has been reported.
        finished: Whether its text is complete.
        fault: The model whose logits were not finite, if any.
        tokens_per_round: See Completion.
    """

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
        """Add what a report says about one of its rows, and return the new text.

        The first report is that of the prefill, every other one that of a round.
        """
        seconds = time.perf_counter() - self.begun
        if self.started:
            return self._take_round(report, row, seconds)
        self.started = True
        self.stats = replace(self.stats, prefill_seconds=seconds)
        return self._push(report, row)[0]

    def _take_round(self, report: Report, row: int, seconds: float) -> str:
        drafted = int(report.drafted[row])
        accepted = int(report.accepted[row])
        piece, kept = self._push(report, row)
        if kept < int(report.num_tokens[row]):
            # A stop string ended the text within this round. Positions past it do not count, just
            # as the devices do not count positions past a stop token.
            drafted = accepted = kept
        self.tokens_per_round.append(kept)
        stats = self.stats.with_round(kept, drafted, accepted)
        self.stats = replace(stats, decode_seconds=seconds - stats.prefill_seconds)
        return piece

    def _push(self, report: Report, row: int) -> tuple[str, int]:
        """Return the text that a report adds, and how many tokens of the report it keeps."""
        # The text drops tokens past a stop string, so it may keep fewer than it is given.
        before = len(self.text.ids)
        tokens = report.tokens[row, : report.num_tokens[row]]
        piece = self.text.push([int(token) for token in tokens])
        self.finished = self.text.stopped or bool(report.done[row])
        self.fault = Fault.NONE if self.text.stopped else Fault(int(report.fault[row]))
        return piece, len(self.text.ids) - before

    def completion(self, stop_ids: Sequence[int], directories: Mapping[Fault, str]) -> Completion:
        """Return the finished text.

        Args:
            stop_ids: Ids that end a text.
            directories: What to call each model if its logits were not finite.
        """
        reason, error = "length", None
        # A text that ended before its model failed is complete; see _push().
        if self.fault:
            reason = "error"
            error = f"{directories[self.fault]} gave logits that are not finite; check its weights"
        elif self.text.stopped or self.text.ids[-1] in stop_ids:
            reason = "stop"
        return Completion(
            prompt=self.prompt,
            prompt_ids=self.prompt_ids,
            token_ids=self.text.ids,
            text=self.text.text,
            finish_reason=reason,
            stats=self.stats,
            tokens_per_round=self.tokens_per_round,
            error=error,
        )
