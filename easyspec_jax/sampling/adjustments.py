"""Options of the rows of a batch besides temperature and truncation, as arrays.

An option that no row of a batch uses is static (`Kinds`): its arrays are None, and nothing of it is
in the compiled programs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.arithmetic import power_of_two
from easyspec_jax.options import MAX_STOP_TOKEN_IDS, SamplingParams
from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.sampling.grammar_rows import GrammarRows
from easyspec_jax.sampling.vocabulary import NO_TOKEN

ANY_TOKEN = -2
"""Stands for whatever token comes before a bad word."""


@dataclass(frozen=True)
class Kinds:
    """Which options some row of a batch uses, and so what its programs can do.

    Attributes:
        min_p: Some row has min_p.
        bias: Some row has logit_bias.
        stops: Some row has stop_token_ids, ignore_eos or min_new_tokens.
        penalties: Some row has a presence, frequency or repetition penalty.
        logprobs: Some row has logprobs.
        prompt_logprobs: Some row has prompt_logprobs.
        bad_words: Room for this many bad words of a row; a power of two, or 0.
        bad_word_length: Room for the tokens of a bad word before its last one, likewise.
        grammar: Room for the output of a row with a grammar, likewise.

    Examples:
        >>> one, other = SamplingParams(logit_bias={7: 1.0}), SamplingParams(ignore_eos=True)
        >>> Kinds.of(one) | Kinds.of(other) == Kinds(bias=True, stops=True)
        True
    """

    min_p: bool = False
    bias: bool = False
    stops: bool = False
    penalties: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    bad_words: int = 0
    bad_word_length: int = 0
    grammar: int = 0

    @classmethod
    def of(cls, sampling: SamplingParams) -> Self:
        """Return what one request uses."""
        return cls(
            # Greedy decoding takes the likeliest id, which min-p always keeps.
            min_p=sampling.min_p > 0 and sampling.temperature > 0,
            bias=bool(sampling.biases),
            stops=bool(sampling.stop_token_ids or sampling.ignore_eos or sampling.min_new_tokens),
            penalties=bool(
                sampling.presence_penalty
                or sampling.frequency_penalty
                or sampling.repetition_penalty != 1
            ),
            logprobs=sampling.logprobs is not None,
            prompt_logprobs=sampling.prompt_logprobs is not None,
            # Sizes are powers of two, so that few programs are ever compiled.
            bad_words=_room(len(sampling.bad_words_ids)),
            bad_word_length=_room(max(map(len, sampling.bad_words_ids), default=1) - 1),
            grammar=_room(sampling.max_new_tokens) if sampling.grammar else 0,
        )

    def __or__(self, other: Self) -> Self:
        """Return what either of two uses."""
        return type(self)(
            *(max(getattr(self, kind.name), getattr(other, kind.name)) for kind in fields(self))
        )

    @property
    def adjusts(self) -> bool:
        """Whether programs have RowAdjustments."""
        room = self.bad_words + self.grammar
        return self.bias or self.stops or self.penalties or room > 0


def _room(count: int) -> int:
    """Return the next power of two: 0 -> 0, 1 -> 1, 5 -> 8."""
    return power_of_two(count) if count else 0


PLAIN = Kinds()
"""Programs without any of these options."""


@partial(
    jax.tree_util.register_dataclass, data_fields=["ids", "ignore_eos", "earliest"], meta_fields=[]
)
@dataclass(frozen=True)
class Stops:
    """Tokens that end each row's text.

    Attributes:
        ids: The row's own stop_token_ids, and then NO_TOKEN.
        ignore_eos: Whether the checkpoint's stop tokens do not end the text.
        earliest: First position in the text at which a stop token may stand.
    """

    ids: Int[Array, "batch stops"]
    ignore_eos: Bool[Array, " batch"]
    earliest: Int[Array, " batch"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["presence", "frequency", "repetition", "prompted", "counts"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Penalties:
    """Each row's penalties, and the tokens that they are for.

    Attributes:
        presence: Taken from the logit of every id that the output contains.
        frequency: Taken from an id's logit for each time that the output contains it.
        repetition: Divides positive logits of ids that the prompt or the output contains, and
            multiplies negative ones.
        prompted: Which ids the prompt contains.
        counts: How often the output, up to the last token of the text, contains each id.
    """

    presence: Float[Array, " batch"]
    frequency: Float[Array, " batch"]
    repetition: Float[Array, " batch"]
    prompted: Bool[Array, "batch vocab_shard"]
    counts: Int[Array, "batch vocab_shard"]


@partial(jax.tree_util.register_dataclass, data_fields=["last", "before", "output"], meta_fields=[])
@dataclass(frozen=True)
class BadWords:
    """Sequences of tokens that a row's output may not contain: the last is banned after the rest.

    Attributes:
        last: Last token of each word; NO_TOKEN for absent words.
        before: The tokens before it, from the last one back; ANY_TOKEN beyond the first.
        output: The last tokens of each row's output, from the last one back, then NO_TOKEN.
    """

    last: Int[Array, "batch words"]
    before: Int[Array, "batch words length"]
    output: Int[Array, "batch length"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["bias", "stops", "penalties", "bad_words", "grammar"],
    meta_fields=[],
)
@dataclass(frozen=True)
class RowAdjustments:
    """Each row's changes to logits; a field is None if no row of the batch needs it.

    Attributes:
        bias: What to add to each id's logit. Like the other arrays of the vocabulary's size, it is
            split over all devices as the target's head is.
        stops: Tokens that end the text.
        penalties: Penalties on tokens that were there before.
        bad_words: What the output may not contain.
        grammar: What the output must be.
    """

    bias: Float[Array, "batch vocab_shard"] | None = None
    stops: Stops | None = None
    penalties: Penalties | None = None
    bad_words: BadWords | None = None
    grammar: GrammarRows | None = None


def row_adjustments(
    kinds: Kinds,
    sampling: SamplingParams,
    prompts: Sequence[Sequence[int]],
    vocab: int,
    grammar: int = 0,
) -> RowAdjustments | None:
    """Make the arrays of rows with the same sampling.

    Args:
        kinds: What the programs can do; at least what the sampling uses.
        sampling: How the rows are sampled.
        prompts: Each row's prompt.
        vocab: Ids of the vocabulary, padding included.
        grammar: Number of the sampling's grammar; see Grammars.number.

    Returns:
        NumPy arrays, bias over the whole vocabulary; None if the programs adjust nothing.

    Examples:
        >>> sampling = SamplingParams(logit_bias={2: 1.5}, min_new_tokens=4)
        >>> rows = row_adjustments(Kinds.of(sampling), sampling, [[5, 6, 7]], vocab=4)
        >>> rows.bias.tolist(), rows.stops.earliest.tolist()
        ([[0.0, 0.0, 1.5, 0.0]], [7])
    """
    if not kinds.adjusts:
        return None
    rows = len(prompts)
    bias = stops = penalties = bad_words = own = None
    if kinds.bias:
        bias = np.zeros((rows, vocab), np.float32)
        bias[:, list(sampling.biases)] = list(sampling.biases.values())
    if kinds.stops:
        ids = np.full((rows, MAX_STOP_TOKEN_IDS), NO_TOKEN, np.int32)
        ids[:, : len(sampling.stop_token_ids)] = sampling.stop_token_ids
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        arrays: Any = ids, np.full(rows, sampling.ignore_eos), lengths + sampling.min_new_tokens
        stops = Stops(arrays[0], arrays[1], arrays[2].astype(np.int32))
    if kinds.penalties:
        penalties = _penalties(sampling, prompts, vocab)
    if kinds.bad_words:
        bad_words = _bad_words(kinds, sampling, rows)
    if kinds.grammar:
        empty: Any = np.full((rows, kinds.grammar), NO_TOKEN, np.int32)
        numbers: Any = np.full(rows, grammar, np.int32)
        own = GrammarRows(numbers, empty, np.zeros_like(numbers), np.zeros_like(numbers))
    return RowAdjustments(bias, stops, penalties, bad_words, own)  # pyright: ignore[reportArgumentType]


def _bad_words(kinds: Kinds, sampling: SamplingParams, rows: int) -> BadWords:
    # The words "7" and "5 6 7", with room for two words of up to three tokens:
    #   last 7 7    before * *, 6 5
    last = np.full(kinds.bad_words, NO_TOKEN, np.int32)
    before = np.full((kinds.bad_words, kinds.bad_word_length), ANY_TOKEN, np.int32)
    for number, (*start, end) in enumerate(sampling.bad_words_ids):
        last[number] = end
        before[number, : len(start)] = start[::-1]
    output: Any = np.full((rows, kinds.bad_word_length), NO_TOKEN, np.int32)
    words: Any = np.repeat(last[None], rows, axis=0), np.repeat(before[None], rows, axis=0)
    return BadWords(words[0], words[1], output)


def _penalties(sampling: SamplingParams, prompts: Sequence[Sequence[int]], vocab: int) -> Penalties:
    rows = len(prompts)
    prompted: Any = np.zeros((rows, vocab), bool)
    for row, prompt in enumerate(prompts):
        prompted[row, np.asarray(prompt, np.int32)] = True
    counts: Any = np.zeros((rows, vocab), np.int32)
    numbers = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty
    presence, frequency, repetition = (np.full(rows, x, np.float32) for x in numbers)
    return Penalties(presence, frequency, repetition, prompted, counts)  # pyright: ignore[reportArgumentType]


def adjustment_specs(kinds: Kinds) -> Any:
    """Return how row_adjustments() are split: what spans the vocabulary like the target's head."""
    if not kinds.adjusts:
        return None
    everywhere: Any = P()
    split: Any = P(None, ALL_AXES)
    return RowAdjustments(
        bias=split if kinds.bias else None,
        stops=Stops(everywhere, everywhere, everywhere) if kinds.stops else None,
        penalties=Penalties(everywhere, everywhere, everywhere, split, split)
        if kinds.penalties
        else None,
        bad_words=BadWords(everywhere, everywhere, everywhere) if kinds.bad_words else None,
        grammar=GrammarRows(*[everywhere] * 4) if kinds.grammar else None,
    )
