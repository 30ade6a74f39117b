"""Options of decoding: how to speculate, how to sample, on which platform and in which type.

Every value is checked when an option object is made. Messages name fields in backticks, which the
commands replace by their flags: `top_p` becomes --top-p.
"""

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, SupportsIndex, get_args

from easyspec_jax.errors import EasySpecError

Method = Literal["vanilla", "sd", "tree", "easyspec", "ngram"]
Verifier = Literal["rejection", "coupled", "block"]
DraftTensorParallelSize = Literal["1", "all"]
Platform = Literal["cpu", "gpu", "tpu"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
FLOAT_DTYPES = get_args(DType)[1:]
KVDType = Literal["auto", "int8"]
"""Types that key-value caches can be kept in; "auto" is the one that is computed in."""

Weights = Literal["bfloat16", "int8", "int4"]
"""Types that matrices can be kept in, apart from the one that is computed in."""

MAX_LEVELS = 16
"""Largest num_speculative_tokens."""

MAX_WIDTH = 64
"""Largest tree_width."""

MAX_LOOKUP = 32
"""Largest prompt_lookup_max."""

MAX_STOP_TOKEN_IDS = 64
"""Most stop_token_ids of a request. Programs have room for as many, so that none is special."""

MAX_BAD_WORDS = 1024
"""Most sequences of tokens that a request can ban."""

MAX_LOGPROBS = 20
"""Most likeliest tokens that are reported with a token."""

MAX_GRAMMAR = 65536
"""Most bytes of a JSON schema, of a regular expression, or of all choices of a request."""

GrammarKind = Literal["json_schema", "regex", "choice", "tool_calls"]


@dataclass(frozen=True)
class Grammar:
    """The texts that a request allows.

    Attributes:
        kind: Field of SamplingParams that describes them.
        text: Its value: a JSON schema, a regular expression, a JSON array of strings, or what
            ToolGrammar.text returns.
    """

    kind: GrammarKind
    text: str


@dataclass(frozen=True)
class SpeculativeConfig:
    """How a round drafts and verifies.

    Attributes:
        method: "vanilla" decodes without a draft, "sd" drafts a chain and "tree" a tree with an
            ordinary draft, and "easyspec" runs groups of the draft's layers at once. "ngram" needs
            no draft: a chain is whatever followed the text's last tokens where they stood before.
        num_speculative_tokens: Levels drafted per round.
        tree_width: Nodes per level. None stands for 1, a chain, or for 4 with method "tree".
        tree_nodes: How many of a tree's nodes, the likeliest, the target verifies. None: all.
        lp_size: Layers per group, for the paper's grouping rule.
        lp_strategy: Explicit groups such as "0,1-3,4-7x2", which override lp_size.
        mlp_lp_size: MLPs of a group that run at once, for groups whose strategy does not say.
        refit: "auto" uses projections refitted for these groups if the draft's directory holds
            them, "none" never does, and anything else is a directory that must hold them.
        calibration: Rebuild the draft's exact KV cache after every round.
        draft_tensor_parallel_size: Replicate ("1") the parts of the draft that are not
            layer-parallel, or split them over all devices ("all").
        verifier: "rejection", "coupled", "block", or a verifier of your own (see
            easyspec_jax.verify), which is used at every temperature. None stands for rejection
            sampling of chains and coupled sampling of trees, which accept more on average. Method
            "ngram" accepts as much with either, and samples coupled.
        bit_stable: Run every pass of the target over `stable_rows` tokens, so that greedy and
            coupled texts are those of plain decoding in the same mode, in any type.
        prompt_lookup: Look up repeats in addition to what the draft drafts; they become another
            branch of the tree, or all of it where prompt_lookup_max tokens match. Method "ngram"
            does this without a draft.
        prompt_lookup_max: Tokens at the end of a text that are looked for at most.
        prompt_lookup_min: Tokens that must stand somewhere else at least. Where fewer do, a round
            of method "ngram" is a step of plain decoding.
        adapt: Choose for every round whether to draft, and how many levels, by what has been
            accepted and by the time that rounds take. Greedy and coupled texts do not depend on it.
            So the default verifier is then the coupled one, and the others are refused.
        confidence_threshold: Draft a level only where some path of the level above has this
            probability under the draft, from 0 (always) to 1. The first level always is.

    Raises:
        EasySpecError: A value is out of range, or two of them conflict.

    Examples:
        >>> SpeculativeConfig(method="tree").width
        4
    """

    method: Method = "easyspec"
    num_speculative_tokens: int = 5
    tree_width: int | None = None
    tree_nodes: int | None = None
    lp_size: int = 4
    lp_strategy: str | None = None
    mlp_lp_size: int = 1
    refit: str = "auto"
    calibration: bool = True
    draft_tensor_parallel_size: DraftTensorParallelSize = "all"
    verifier: Verifier | Hashable | None = None
    bit_stable: bool = False
    prompt_lookup: bool = False
    prompt_lookup_max: int = 16
    prompt_lookup_min: int = 2
    adapt: bool = False
    confidence_threshold: float = 0.0

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        if isinstance(self.verifier, str):
            check_choice("verifier", self.verifier, get_args(Verifier))
        sizes = get_args(DraftTensorParallelSize)
        check_choice("draft_tensor_parallel_size", self.draft_tensor_parallel_size, sizes)
        check_whole("num_speculative_tokens", self.num_speculative_tokens, 1, MAX_LEVELS)
        check_whole("tree_width", self.width, 1, MAX_WIDTH)
        if self.method in ("vanilla", "sd", "ngram") and (
            self.width > 1 or self.tree_nodes is not None
        ):
            raise EasySpecError(
                f"`method` {self.method} grows no trees: leave out `tree_width` and `tree_nodes`"
            )
        if self.tree_nodes is not None:
            # Every level needs a node, or a drafted path would end before the last level.
            fewest = self.num_speculative_tokens
            most = fewest * self.width
            check_whole("tree_nodes", self.tree_nodes, fewest, most, ": one node a level to all")
        if not 0 <= self.confidence_threshold <= 1:
            raise EasySpecError(
                f"`confidence_threshold` {self.confidence_threshold} must be a probability from 0 "
                "(draft every level) to 1"
            )
        check_whole("lp_size", self.lp_size, 1)
        check_whole("mlp_lp_size", self.mlp_lp_size, 1)
        if self.bit_stable and (self.width > 1 or self.prompt_lookup):
            # A branch's keys lie apart from its text's, so they would be summed in another order.
            raise EasySpecError(
                "`bit_stable` needs a chain: leave out `tree_width`, `method` tree and "
                "`prompt_lookup`"
            )
        if self.prompt_lookup and not self.needs_draft:
            raise EasySpecError(
                f"`prompt_lookup` adds to a draft's trees, which `method` {self.method} has not; "
                "`method` ngram looks up by itself"
            )
        if self.prompt_lookup and not self.calibration:
            raise EasySpecError(
                "`prompt_lookup` needs calibration: a draft has no KV of what was looked up"
            )
        if self.adapt and self.verifier in ("rejection", "block"):
            # Which round a token is drafted in decides its noise, so that such texts would depend
            # on timing and on the other texts of a batch.
            raise EasySpecError(
                f"`adapt` cannot sample by {self.verifier}, whose texts depend on how many tokens "
                "a round drafts; leave out `verifier`, or take coupled"
            )
        if self.verifier == "block" and (self.width > 1 or self.prompt_lookup):
            raise EasySpecError(
                "`verifier` block is for chains: leave out `tree_width`, `method` tree and "
                "`prompt_lookup`, or take coupled"
            )
        check_whole("prompt_lookup_max", self.prompt_lookup_max, 1, MAX_LOOKUP)
        longest = self.prompt_lookup_max
        check_whole(
            "prompt_lookup_min", self.prompt_lookup_min, 1, longest, ", `prompt_lookup_max`"
        )

    @property
    def needs_draft(self) -> bool:
        """Whether a draft model drafts."""
        return self.method not in ("vanilla", "ngram")

    @property
    def looks_up(self) -> bool:
        """Whether repeats of the text are drafts."""
        return self.method == "ngram" or self.prompt_lookup

    @property
    def weights_key(self) -> Self:
        """A configuration equal to that of any other that needs the same draft weights.

        Equal keys on the same mesh mean the same arrays in the same places, so engines can share
        them. What only changes how a round drafts or verifies is set to one value for all.
        """
        return replace(
            self,
            method="sd" if self.method == "tree" else self.method,
            num_speculative_tokens=1,
            tree_width=None,
            tree_nodes=None,
            confidence_threshold=0.0,
            calibration=True,
            verifier=None,
            bit_stable=False,
            prompt_lookup=False,
            prompt_lookup_max=SpeculativeConfig.prompt_lookup_max,
            prompt_lookup_min=SpeculativeConfig.prompt_lookup_min,
            adapt=False,
        )

    @property
    def width(self) -> int:
        """Nodes drafted per level; 1 is a chain."""
        if self.tree_width is not None:
            return self.tree_width
        return 4 if self.method == "tree" else 1

    @property
    def stable_rows(self) -> int | None:
        """Tokens of every pass of the target if texts are to be bit-stable, else None.

        A power of two that holds a drafted chain and the token before it. Plain decoding takes as
        many, so it must be given the same `num_speculative_tokens`.

        Examples:
            >>> SpeculativeConfig(num_speculative_tokens=5, bit_stable=True).stable_rows
            8
        """
        if not self.bit_stable:
            return None
        return max(8, 1 << self.num_speculative_tokens.bit_length())

    @property
    def chosen_verifier(self) -> Verifier | Hashable:
        """The verifier; at temperature 0 the greedy one takes the place of a named one."""
        if self.verifier is not None:
            return self.verifier
        # A token that is proposed with certainty is accepted with its probability under the target,
        # either way; but coupled texts do not depend on the draft.
        chain = self.width == 1 and self.needs_draft
        return "rejection" if chain and not self.adapt else "coupled"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen: the distribution that speculation preserves.

    Attributes:
        temperature: 0 is greedy.
        top_k: Keep only the likeliest ids; 0 keeps all.
        top_p: After top_k, keep the likeliest ids up to this probability; 1 keeps all.
        seed: Determines the noise of a request, 0 <= seed < 2**32.
        max_new_tokens: Tokens to generate at most, a stop token included.
        stop: Strings that end a text. It is cut before the one that is completed first.
        min_p: Before top_k, keep the ids at least this many times as likely as the likeliest one;
            0 keeps all.
        logit_bias: What to add to the logits of some ids, from -100 to 100. A mapping, which is
            kept as sorted pairs.
        min_new_tokens: Tokens before which no stop token can come. Strings of `stop` still can.
        ignore_eos: Go on after the stop tokens of the checkpoint. Those of `stop_token_ids` count.
        stop_token_ids: Ids that end a text, besides those of the checkpoint.
        presence_penalty: Taken from the logits of tokens that the output contains, -2 to 2.
        frequency_penalty: Taken from a token's logit for each time that the output contains it,
            -2 to 2.
        repetition_penalty: Divides the positive logits of tokens that the prompt or the output
            contains, and multiplies the negative ones; 1 leaves them.
        logprobs: Report the log-probability of each new token, and of this many likeliest ones in
            its place, up to 20. They are of the target's own distribution, before any of the above
            changes it. None reports nothing.
        prompt_logprobs: Likewise of the prompt's tokens.
        bad_words: Texts that the output may not contain. Each is banned as the tokens that it has
            at the beginning of a text and after a blank: its last one cannot follow the others.
        bad_words_ids: Sequences of ids that the output may not contain.
        json_schema: The output is JSON that this schema allows: a mapping, or JSON text, which it
            is kept as. At most one of this and the next three fields is given.
        regex: The output matches this regular expression as a whole.
        choice: The output is one of these strings; () does not restrict it.
        tool_calls: The output calls tools as ToolGrammar.text of sampling/tool_grammar.py says.
        n: Texts to generate for each prompt, which differ in their seeds.

    Raises:
        EasySpecError: A value is out of range.

    Examples:
        >>> SamplingParams(temperature=0.8, top_p=0.95, seed=1).max_new_tokens
        128
        >>> SamplingParams(logit_bias={50: -100.0, 7: 2.5}).logit_bias
        ((7, 2.5), (50, -100.0))
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = ()
    min_new_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    tool_calls: str | None = None
    n: int = 1

    def __post_init__(self) -> None:
        # Float32 would hold larger ones, or logits divided by smaller ones, as infinity.
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e38:
            raise EasySpecError(
                f"`temperature` {self.temperature} must be 0 (greedy) or from 0.001 to 1e+38"
            )
        check_whole("top_k", self.top_k, 0, 2**31 - 1, " ids (0: all)")
        if not 0 < self.top_p <= 1:
            raise EasySpecError(
                f"`top_p` {self.top_p} must be a probability above 0, up to 1 (all)"
            )
        check_whole("seed", self.seed, 0, 2**32 - 1)
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        if isinstance(self.stop, str):
            raise EasySpecError("`stop` takes several strings: put one into a tuple")
        if not all(self.stop):
            raise EasySpecError("`stop` '' would end every text; give at least one character")
        if not 0 <= self.min_p <= 1:
            raise EasySpecError(f"`min_p` {self.min_p} must be a probability from 0 (all) to 1")
        check_whole(
            "min_new_tokens",
            self.min_new_tokens,
            0,
            self.max_new_tokens,
            ": the most is `max_new_tokens`",
        )
        for number, bias in self.biases.items():
            check_whole("logit_bias", number, 0, note=": an id of the vocabulary")
            if not -100 <= bias <= 100:
                raise EasySpecError(f"`logit_bias` {bias} of id {number} must be from -100 to 100")
        # Kept as sorted pairs, so that parameters are hashable and equal ones compare equal.
        object.__setattr__(self, "logit_bias", tuple(sorted(self.biases.items())))
        object.__setattr__(self, "stop_token_ids", tuple(dict.fromkeys(self.stop_token_ids)))
        for number in self.stop_token_ids:
            check_whole("stop_token_ids", number, 0, note=": an id of the vocabulary")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise EasySpecError(
                f"`stop_token_ids` lists {len(self.stop_token_ids)} ids; the most is "
                f"{MAX_STOP_TOKEN_IDS}"
            )

        for field in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, field) <= 2:
                raise EasySpecError(
                    f"`{field}` {getattr(self, field)} must be from -2 to 2 (0: none)"
                )
        # Logits divided by tiny numbers, or multiplied by huge ones, would overflow float32.
        if not 0.01 <= self.repetition_penalty <= 100:
            raise EasySpecError(
                f"`repetition_penalty` {self.repetition_penalty} must be from 0.01 to 100 (1: none)"
            )

        check_whole("n", self.n, 1)
        if self.n > 1 and self.temperature == 0:
            raise EasySpecError(f"`n` {self.n} texts would be equal at `temperature` 0")
        if isinstance(self.bad_words, str) or not all(map(str.strip, self.bad_words)):
            raise EasySpecError("`bad_words` takes several texts, each of more than blanks")
        object.__setattr__(self, "bad_words_ids", tuple(map(tuple, self.bad_words_ids)))
        if not all(self.bad_words_ids):
            raise EasySpecError("`bad_words_ids` holds a sequence of no ids")
        if len(self.bad_words_ids) > MAX_BAD_WORDS:
            raise EasySpecError(
                f"`bad_words` are {len(self.bad_words_ids)} sequences of tokens; the most is "
                f"{MAX_BAD_WORDS}"
            )
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                check_whole(field, getattr(self, field), 0, MAX_LOGPROBS)
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        if isinstance(self.choice, str) or not all(
            isinstance(one, str) and one for one in self.choice
        ):
            raise EasySpecError("`choice` takes several texts, each of at least one character")
        object.__setattr__(self, "choice", tuple(self.choice))
        if self.grammar is not None:
            _check_grammar(self.grammar)

    @property
    def biases(self) -> dict[int, float]:
        """The logit_bias of each id that has one."""
        return dict(self.logit_bias)

    @property
    def grammar(self) -> Grammar | None:
        """The texts that are allowed; None for all.

        Raises:
            EasySpecError: More than one field restricts them.
        """
        choice = json.dumps(self.choice, ensure_ascii=False) if self.choice else None
        given = {"json_schema": self.json_schema, "regex": self.regex, "choice": choice}
        given["tool_calls"] = self.tool_calls
        found = [Grammar(kind, text) for kind, text in given.items() if text is not None]  # pyright: ignore[reportArgumentType]
        if len(found) > 1:
            raise EasySpecError(f"`{found[0].kind}` and `{found[1].kind}` exclude each other")
        return found[0] if found else None

    def end_ids(self, eos_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the ids that end a text.

        Args:
            eos_ids: The checkpoint's stop tokens.

        Examples:
            >>> SamplingParams(stop_token_ids=(7,)).end_ids((2,))
            (2, 7)
            >>> SamplingParams(stop_token_ids=(7,), ignore_eos=True).end_ids((2,))
            (7,)
        """
        return (*(() if self.ignore_eos else eos_ids), *self.stop_token_ids)

    def check_ids(self, vocab_size: int) -> None:
        """Raise EasySpecError for an id that a vocabulary lacks.

        Args:
            vocab_size: Ids of the vocabulary.
        """
        named = {
            "logit_bias": tuple(self.biases),
            "stop_token_ids": self.stop_token_ids,
            "bad_words_ids": sum(self.bad_words_ids, ()),
        }
        for field, ids in named.items():
            for number in ids:
                if not 0 <= number < vocab_size:
                    raise EasySpecError(
                        f"`{field}` names id {number}, and the target has ids below {vocab_size}"
                    )


def _schema_text(schema: Any) -> str:
    """Return a JSON schema as text of one form, whether it is text already or not."""
    if isinstance(schema, str) and len(schema) > MAX_GRAMMAR:
        return schema  # _check_grammar() refuses it
    try:
        read = json.loads(schema) if isinstance(schema, str) else dict(schema)
        text = json.dumps(read, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise EasySpecError(f"`json_schema` is not JSON: {str(error)[:80]}") from None
    if not isinstance(read, dict):
        raise EasySpecError(f"`json_schema` {text[:40]} must be an object")
    return text


def _check_grammar(grammar: Grammar) -> None:
    """Raise EasySpecError for a grammar that is too long, or no Unicode."""
    try:
        size = len(grammar.text.encode())
    except UnicodeEncodeError:
        raise EasySpecError(f"`{grammar.kind}` is not valid Unicode") from None
    if size > MAX_GRAMMAR:
        raise EasySpecError(f"`{grammar.kind}` is longer than {MAX_GRAMMAR} bytes")


def resolve_dtype(requested: DType, platform: str, stored: str) -> str:
    """Choose the type to compute in.

    Args:
        requested: The user's choice. "auto" is the checkpoint's type, but float32 on a CPU, where
            XLA has no fast products of narrower types.
        platform: JAX's name of the devices' platform.
        stored: The checkpoint's type.

    Raises:
        EasySpecError: The type is not one of FLOAT_DTYPES.

    Examples:
        >>> resolve_dtype("auto", "gpu", "bfloat16")
        'bfloat16'
    """
    if requested != "auto":
        check_choice("dtype", requested, FLOAT_DTYPES)
        return requested
    if platform == "cpu":
        return "float32"
    if stored not in FLOAT_DTYPES:
        raise EasySpecError(f"the checkpoint's dtype {stored!r} is not supported; give `dtype`")
    return stored


def check_prefix_cache(prefix_cache: int, speculative: SpeculativeConfig) -> None:
    """Raise EasySpecError unless a store of prefixes has a size, and may be used."""
    check_whole("prefix_cache", prefix_cache, 0)
    if prefix_cache and speculative.bit_stable:
        raise EasySpecError(
            "`bit_stable` needs `prefix_cache` 0: passes of other sizes filled what is kept"
        )


def check_weights(weights: Weights | None, draft_weights: Weights | None) -> None:
    """Raise EasySpecError unless each is None or one of Weights."""
    for field, value in (("weights", weights), ("draft_weights", draft_weights)):
        if value is not None:
            check_choice(field, value, get_args(Weights))


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise EasySpecError unless a field's value is one of some choices."""
    if value not in choices:
        raise EasySpecError(f"`{field}` {value!r} is not one of {', '.join(choices)}")


def check_whole(
    field: str, value: Any, least: int, most: int | None = None, note: str = ""
) -> None:
    """Raise EasySpecError unless a field's value is a whole number within bounds.

    Args:
        field: The field's name.
        value: Its value, of any type.
        least: The smallest value allowed.
        most: The largest one, or None.
        note: What the message says after the bounds.

    Raises:
        EasySpecError: The value is not a whole number, or out of bounds.
    """
    if not isinstance(value, SupportsIndex):
        raise EasySpecError(f"`{field}` {value!r} must be a whole number")
    if value.__index__() < least or (most is not None and value.__index__() > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise EasySpecError(f"`{field}` {value} must be {limits}{note}")
