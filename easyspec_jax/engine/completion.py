"""A prompt before, during and after its text is generated."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from easyspec_jax.decode.state import Fault, Report
from easyspec_jax.decode.stats import Stats
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams
from easyspec_jax.sampling.adjustments import PLAIN, Kinds
from easyspec_jax.sampling.logprobs import Logprobs
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


def repeated(items: Sequence[Item], times: int) -> list[Item]:
    """Repeat each item.

    Examples:
        >>> repeated("ab", 2)
        ['a', 'a', 'b', 'b']
    """
    return [item for item in items for _ in range(times)]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and its token ids; `Engine.prepare` makes one."""

    prompt: Prompt
    ids: list[int]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of a token under the target, and of the likeliest ones in its place.

    The target's own distribution counts, before biases, penalties, temperature or truncation.

    Attributes:
        token_id: The token.
        logprob: Its log-probability.
        top: Likeliest ids and their log-probabilities, in descending order.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        top = [{"token_id": number, "logprob": logprob} for number, logprob in self.top]
        return {"token_id": self.token_id, "logprob": self.logprob, "top_logprobs": top}


def read_logprobs(
    found: Logprobs, row: int, tokens: Sequence[int], best: int
) -> list[TokenLogprobs]:
    """Read the log-probabilities of a row of a report.

    Args:
        found: NumPy arrays, [batch, columns] and [batch, columns, ids].
        row: The row.
        tokens: The tokens of the first columns; others do not count.
        best: How many likeliest ids to read.
    """
    result = []
    for column, token in enumerate(tokens):
        ids, values = found.ids[row, column, :best], found.best[row, column, :best]
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
        result.append(TokenLogprobs(token, float(found.chosen[row, column]), top))
    return result


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
        logprobs: Those of each of token_ids, if the sampling asks for them.
        prompt_logprobs: Likewise of prompt_ids. The first is None, since nothing precedes it.
    """

    prompt: Prompt
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    stats: Stats
    tokens_per_round: list[int]
    error: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None

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
        for name in ("logprobs", "prompt_logprobs"):
            listed = getattr(self, name)
            if listed is not None:
                fields[name] = [None if one is None else one.as_dict() for one in listed]
        return fields if self.error is None else fields | {"error": self.error}


class Gain(NamedTuple):
    """Part of a text that one report added.

    Attributes:
        pieces: Text of each new token. A token can have none yet: one that ends inside a character,
            or whose text may become a stop string.
        drafted: Levels that the round drafted; 0 for the prefill.
        accepted: How many of them were accepted. These are the first tokens behind forced ones.
        forced: How many tokens a grammar forced. They are the very first ones.
    """

    pieces: list[str]
    drafted: int
    accepted: int
    forced: int = 0


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
        stop_ids: Ids that end its text.
        kinds: Options that its programs know besides its own.
        begun: Start of its prefill, by time.perf_counter().
        started: Whether its first token has been reported.
        finished: Whether its text is complete.
        fault: The model whose logits were not finite, if any.
        tokens_per_round: See Completion.
        latest: What the latest report added.
        logprobs: See Completion, empty if there are none; likewise prompt_logprobs.
    """

    prompt: Prompt
    prompt_ids: list[int]
    text: TextStream
    stats: Stats
    sampling: SamplingParams
    limit: int
    stop_ids: tuple[int, ...] = ()
    kinds: Kinds = PLAIN
    begun: float = field(default=0.0, init=False)
    started: bool = field(default=False, init=False)
    finished: bool = field(default=False, init=False)
    fault: Fault = field(default=Fault.NONE, init=False)
    tokens_per_round: list[int] = field(default_factory=list, init=False)
    latest: Gain = field(default=Gain([], 0, 0), init=False)
    logprobs: list[TokenLogprobs] = field(default_factory=list, init=False)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list, init=False)

    @property
    def latest_logprobs(self) -> list[TokenLogprobs]:
        """Those of the tokens that the latest report added, if the sampling asks for them."""
        return self.logprobs[max(0, len(self.logprobs) - len(self.latest.pieces)) :]

    def take(self, report: Report, row: int, read_at: float = 0.0) -> str:
        """Add what a report says about one of its rows, and return the new text.

        The first report is that of the prefill, every other one that of a round.

        Args:
            report: The report.
            row: The row of it.
            read_at: When the draft had read the prompt, by time.perf_counter(); see Batch.
        """
        seconds = time.perf_counter() - self.begun
        if self.started:
            if not self.tokens_per_round and read_at > self.begun:
                self.stats = replace(self.stats, prefill_seconds=read_at - self.begun)
            self.latest = self._take_round(report, row, seconds)
        else:
            self.started = True
            self.stats = replace(self.stats, prefill_seconds=seconds)
            self._take_prompt(report, row)
            self.latest = Gain(self._push(report, row), 0, 0)
        return "".join(self.latest.pieces)

    def _take_prompt(self, report: Report, row: int) -> None:
        best = self.sampling.prompt_logprobs
        if best is None or report.prompt is None:
            return
        self.prompt_logprobs.append(None)
        for part in report.prompt:
            # Column i of a chunk is about token i + 1. After the last one, no prompt token follows.
            begin = len(self.prompt_logprobs)
            about = self.prompt_ids[begin : begin + part.chosen.shape[1]]
            self.prompt_logprobs += read_logprobs(part, row, about, best)

    def _take_round(self, report: Report, row: int, seconds: float) -> Gain:
        counts = report.drafted, report.accepted, report.lookup_drafted, report.lookup_accepted
        positions = [int(count[row]) for count in counts]
        forced = int(report.forced[row])
        pieces = self._push(report, row)
        kept = len(pieces)
        if kept < int(report.num_tokens[row]):
            # A stop string ended the text within this round. Positions past it do not count, just
            # as the devices do not count positions past a stop token.
            forced = min(forced, kept)
            positions = _cut(*positions, room=kept - forced)
        self.tokens_per_round.append(kept)
        levels = int(report.levels)
        stats = self.stats.with_round(kept, *positions, levels=levels, forced=forced)
        self.stats = replace(stats, decode_seconds=seconds - stats.prefill_seconds)
        return Gain(pieces, positions[0], positions[1], forced)

    def _push(self, report: Report, row: int) -> list[str]:
        """Return the text of each token of a report, up to the one that completes a stop string."""
        pieces = []
        for token in report.tokens[row, : report.num_tokens[row]]:
            if self.text.stopped:
                break
            pieces.append(self.text.push([int(token)]))
        best = self.sampling.logprobs
        if best is not None and report.logprobs is not None:
            kept = self.text.ids[len(self.text.ids) - len(pieces) :]
            self.logprobs += read_logprobs(report.logprobs, row, kept, best)
        self.finished = self.text.stopped or bool(report.done[row])
        self.fault = Fault.NONE if self.text.stopped else Fault(int(report.fault[row]))
        return pieces

    def completion(self, directories: Mapping[Fault, str]) -> Completion:
        """Return the finished text.

        Args:
            directories: What to call each model if its logits were not finite.
        """
        reason, error = "length", None
        # A text that ended before its model failed is complete; see _push().
        if self.fault:
            reason = "error"
            error = f"{directories[self.fault]} gave logits that are not finite; check its weights"
            if self.sampling.grammar is not None and self.fault == Fault.TARGET:
                error = (
                    f"no token may follow here by `{self.sampling.grammar.kind}` and the other "
                    f"options, or {error}"
                )
        elif self.text.stopped or self.text.ids[-1] in self.stop_ids:
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
            logprobs=None if self.sampling.logprobs is None else self.logprobs,
            prompt_logprobs=None if self.sampling.prompt_logprobs is None else self.prompt_logprobs,
        )


def _cut(
    drafted: int, accepted: int, lookup_drafted: int, lookup_accepted: int, *, room: int
) -> list[int]:
    """Count the positions of a round up to where its text ends, in the order of the arguments.

    Looked-up positions are the last ones: a path that leaves what the draft model drafted does not
    come back.

    Examples:
        Five positions, of which three were accepted and the last two of those looked up. The text
        ends after two:

        >>> _cut(5, 3, 4, 2, room=2)
        [2, 2, 1, 1]
    """
    first = accepted - lookup_accepted if lookup_accepted else drafted - lookup_drafted
    return [
        min(drafted, room),
        min(accepted, room),
        min(lookup_drafted, max(0, room - first)),
        min(lookup_accepted, max(0, room - first)),
    ]
