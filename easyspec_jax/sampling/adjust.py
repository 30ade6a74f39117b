"""Changes to logits themselves, made before anything else: bans, least length, bias, penalties.

The distribution of the token after a node of a tree is warp(adjust(logits)). Every verifier, plain
decoding and the draft get adjusted logits, so none of them knows about these options. The order is
vLLM's: what a grammar forbids, bad words and stop tokens are masked, biases are added, and
penalties are applied.

An option that no row of a batch uses is static (`Kinds`): its arrays are None, and nothing of it is
in the compiled programs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.arithmetic import power_of_two
from easyspec_jax.options import MAX_STOP_TOKEN_IDS, SamplingParams
from easyspec_jax.parallel.mesh import ALL_AXES, Axes
from easyspec_jax.sampling.grammar import Grammars
from easyspec_jax.sampling.grammar_rows import Forced, GrammarRows, within_grammar
from easyspec_jax.sampling.vocabulary import NO_CHOICE, NO_TOKEN, local_ids

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


def whole(rows: RowAdjustments) -> RowAdjustments:
    """Collect every device's part of the vocabulary, for a draft that each device has whole."""
    gather = partial(jax.lax.all_gather, axis_name=ALL_AXES, axis=1, tiled=True)
    if rows.bias is not None:
        rows = replace(rows, bias=gather(rows.bias))
    if (own := rows.penalties) is not None:
        gathered = replace(own, prompted=gather(own.prompted), counts=gather(own.counts))
        rows = replace(rows, penalties=gathered)
    return rows


def adjust(
    logits: Float[Array, "batch nodes vocab_shard"],
    position: Int[Array, "batch nodes"],
    drafted: Int[Array, "batch nodes levels"],
    rows: RowAdjustments,
    stop_ids: tuple[int, ...],
    axes: Axes,
    grammars: Grammars | None = None,
) -> Float[Array, "batch nodes vocab_shard"]:
    """Change logits as each row asks.

    Args:
        logits: A model's logits after each node.
        position: Absolute position of the token after each node.
        drafted: Tokens of the path from the root, itself not counted, to each node, and NO_TOKEN.
            They belong to the output that the node's penalties are for.
        rows: Each row's changes, split over the same axes.
        stop_ids: The checkpoint's stop tokens.
        axes: Mesh axes that split the vocabulary.
        grammars: The grammars that rows have by number; None if there are none.

    Returns:
        The logits whose warped distribution is the target's.

    Examples:
        >>> sampling = SamplingParams(logit_bias={2: 1.5}, min_new_tokens=1)
        >>> rows = row_adjustments(Kinds.of(sampling), sampling, [[5, 6]], vocab=4)
        >>> rows = jax.tree.map(jnp.asarray, rows)
        >>> nodes = jnp.array([[2, 3]]), jnp.array([[[-1], [3]]])
        >>> adjust(jnp.zeros((1, 2, 4)), *nodes, rows, stop_ids=(0,), axes=())[0].tolist()
        [[-inf, 0.0, 1.5, 0.0], [0.0, 0.0, 1.5, 0.0]]
    """
    if rows.grammar is not None and grammars is not None:
        logits = within_grammar(logits, drafted, rows.grammar, axes, grammars)
    if rows.bad_words is not None:
        logits = _without_bad_words(logits, drafted, rows.bad_words, axes)
    if rows.stops is not None:
        early = position < rows.stops.earliest[:, None]
        is_stop = _stop_mask(rows.stops, stop_ids, logits.shape[-1], axes)
        masked = early[:, :, None] & is_stop[:, None, :]
        logits = jnp.where(masked, -jnp.inf, logits)
    if rows.bias is not None:
        logits = logits + rows.bias[:, None, :]
    if rows.penalties is not None:
        logits = _penalised(logits, drafted, rows.penalties, axes)
    return logits


def _without_bad_words(
    logits: Float[Array, "batch nodes vocab_shard"],
    drafted: Int[Array, "batch nodes levels"],
    words: BadWords,
    axes: Axes,
) -> Float[Array, "batch nodes vocab_shard"]:
    """Mask the last token of each word whose other tokens the output ends with."""
    context = _last_tokens(drafted, words.output)
    before = words.before[:, None]  # [batch, 1, words, length]
    fits = (before == ANY_TOKEN) | (before == context[:, :, None, :])
    banned = jnp.where(jnp.all(fits, axis=3), words.last[:, None, :], NO_TOKEN)
    local = local_ids(banned, logits.shape[-1], axes)
    mask = jnp.vectorize(
        lambda row, places: row.at[places].set(-jnp.inf, mode="drop"), signature="(v),(w)->(v)"
    )
    return mask(logits, local)


def _last_tokens(
    drafted: Int[Array, "batch nodes levels"], output: Int[Array, "batch length"]
) -> Int[Array, "batch nodes length"]:
    """Continue an output, written from its end back, by each node's path: its last tokens."""
    # Path "7 6 -" of a node of depth 2 and output "5 4 3" give "7 6 5": the first two columns of
    # the path, and then those of the output.
    levels, length = drafted.shape[2], output.shape[1]
    behind = jnp.broadcast_to(output[:, None, :], (*drafted.shape[:2], length))
    both = jnp.concatenate([drafted, behind], axis=2)
    depth = jnp.sum(drafted != NO_TOKEN, axis=2, dtype=jnp.int32)[:, :, None]
    column = jnp.arange(length, dtype=jnp.int32)[None, None, :]
    column = jnp.where(column < depth, column, levels + column - depth)
    return jnp.take_along_axis(both, column, axis=2)


def _penalised(
    logits: Float[Array, "batch nodes vocab_shard"],
    drafted: Int[Array, "batch nodes levels"],
    rows: Penalties,
    axes: Axes,
) -> Float[Array, "batch nodes vocab_shard"]:
    """Apply penalties for the text and for each node's own path."""
    counts = jnp.broadcast_to(rows.counts[:, None, :], logits.shape)
    # A path adds its few tokens to the counts of the text. With a text "a b a" and paths of a chain
    #   node        root   c      c a
    #   counts of a  2     2      3
    #   counts of c  0     1      1
    counts = _add_at(counts, drafted, axes)
    is_said = counts > 0
    is_repeated = is_said | rows.prompted[:, None, :]
    factor = jnp.where(is_repeated, rows.repetition[:, None, None], 1.0)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = logits - rows.frequency[:, None, None] * counts.astype(jnp.float32)
    return logits - jnp.where(is_said, rows.presence[:, None, None], 0.0)


def _add_at(
    counts: Int[Array, "*rows vocab_shard"], ids: Int[Array, "*rows some"], axes: Axes
) -> Int[Array, "*rows vocab_shard"]:
    """Count ids, on whichever shard holds them; NO_TOKEN is dropped."""
    if ids.shape[-1] == 0:
        return counts
    local = local_ids(ids, counts.shape[-1], axes)
    add = jnp.vectorize(
        lambda row, places: row.at[places].add(1, mode="drop"), signature="(v),(i)->(v)"
    )
    return add(counts, local)


def with_output(
    rows: RowAdjustments | None, tokens: Int[Array, "batch some"], num_tokens: Int[Array, " batch"]
) -> RowAdjustments | None:
    """Count new tokens of each row's output.

    Args:
        rows: Each row's changes, or None.
        tokens: New tokens; only the first `num_tokens` count.
        num_tokens: How many there are.
    """
    if rows is None or (rows.penalties is None and rows.bad_words is None and rows.grammar is None):
        return rows
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    new = jnp.where(columns < num_tokens[:, None], tokens, NO_TOKEN)
    if rows.penalties is not None:
        counts = _add_at(rows.penalties.counts, new, ALL_AXES)
        rows = replace(rows, penalties=replace(rows.penalties, counts=counts))
    if rows.bad_words is not None:
        # From the end back, the new tokens are a path like a node's: "6 7 -" -> "7 6 -".
        back = jnp.maximum(num_tokens[:, None] - 1 - columns, 0)
        path = jnp.where(new != NO_TOKEN, jnp.take_along_axis(new, back, axis=1), NO_TOKEN)
        output = _last_tokens(path[:, None, :], rows.bad_words.output)[:, 0]
        rows = replace(rows, bad_words=replace(rows.bad_words, output=output))
    if (own := rows.grammar) is not None:
        rows = replace(rows, grammar=own.with_output(new, num_tokens))
    return rows


def with_forced(rows: RowAdjustments | None, forced: Forced) -> RowAdjustments | None:
    """Count forced tokens as output, though no pass of the target has verified them yet."""
    rows = with_output(rows, forced.tokens, forced.num_tokens)
    if rows is None or rows.grammar is None:
        return rows
    return replace(rows, grammar=replace(rows.grammar, ahead=forced.num_tokens))


def _stop_mask(
    stops: Stops, stop_ids: tuple[int, ...], size: int, axes: Axes
) -> Bool[Array, "batch vocab_shard"]:
    """Mark the ids of this shard that min_new_tokens keeps away: also an eos that is ignored."""
    batch = stops.ids.shape[0]
    eos = jnp.broadcast_to(jnp.asarray(stop_ids, jnp.int32), (batch, len(stop_ids)))
    local = local_ids(jnp.concatenate([stops.ids, eos], axis=1), size, axes)
    none = jnp.zeros((batch, size), bool)
    return jax.vmap(lambda row, ids: row.at[ids].set(True, mode="drop"))(none, local)


def ends_text(
    tokens: Int[Array, "batch tokens"], rows: RowAdjustments | None, stop_ids: tuple[int, ...]
) -> Bool[Array, "batch tokens"]:
    """Find the tokens that end their row's text; NO_CHOICE always does.

    Args:
        tokens: Token ids.
        rows: Each row's changes; None for none.
        stop_ids: The checkpoint's stop tokens.
    """
    ends = jnp.isin(tokens, jnp.asarray((*stop_ids, NO_CHOICE), jnp.int32))
    if rows is None or rows.stops is None:
        return ends
    own = jnp.any(tokens[:, :, None] == rows.stops.ids[:, None, :], axis=2)
    return (ends & ~rows.stops.ignore_eos[:, None]) | own | (tokens == NO_CHOICE)
