"""How tokens are chosen."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options.checks import check_whole

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
        self._check_distribution()
        self._check_ends()
        self._check_ids()
        self._check_penalties()
        self._check_texts()
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                check_whole(field, getattr(self, field), 0, MAX_LOGPROBS)

    def _keep(self, field: str, value: Any) -> None:
        """Keep a value in one form: parameters are hashable, and equal ones compare equal."""
        object.__setattr__(self, field, value)

    def _check_distribution(self) -> None:
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
        check_whole("n", self.n, 1)
        if self.n > 1 and self.temperature == 0:
            raise EasySpecError(f"`n` {self.n} texts would be equal at `temperature` 0")
        if not 0 <= self.min_p <= 1:
            raise EasySpecError(f"`min_p` {self.min_p} must be a probability from 0 (all) to 1")

    def _check_ends(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole(
            "min_new_tokens",
            self.min_new_tokens,
            0,
            self.max_new_tokens,
            ": the most is `max_new_tokens`",
        )
        if isinstance(self.stop, str):
            raise EasySpecError("`stop` takes several strings: put one into a tuple")
        if not all(self.stop):
            raise EasySpecError("`stop` '' would end every text; give at least one character")

    def _check_ids(self) -> None:
        for number, bias in self.biases.items():
            check_whole("logit_bias", number, 0, note=": an id of the vocabulary")
            if not -100 <= bias <= 100:
                raise EasySpecError(f"`logit_bias` {bias} of id {number} must be from -100 to 100")
        self._keep("logit_bias", tuple(sorted(self.biases.items())))
        for number in self.stop_token_ids:
            check_whole("stop_token_ids", number, 0, note=": an id of the vocabulary")
        self._keep("stop_token_ids", tuple(dict.fromkeys(self.stop_token_ids)))
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise EasySpecError(
                f"`stop_token_ids` lists {len(self.stop_token_ids)} ids; the most is "
                f"{MAX_STOP_TOKEN_IDS}"
            )

    def _check_penalties(self) -> None:
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

    def _check_texts(self) -> None:
        if isinstance(self.bad_words, str) or not all(map(str.strip, self.bad_words)):
            raise EasySpecError("`bad_words` takes several texts, each of more than blanks")
        self._keep("bad_words_ids", tuple(map(tuple, self.bad_words_ids)))
        if not all(self.bad_words_ids):
            raise EasySpecError("`bad_words_ids` holds a sequence of no ids")
        if len(self.bad_words_ids) > MAX_BAD_WORDS:
            raise EasySpecError(
                f"`bad_words` are {len(self.bad_words_ids)} sequences of tokens; the most is "
                f"{MAX_BAD_WORDS}"
            )
        if self.json_schema is not None:
            self._keep("json_schema", _schema_text(self.json_schema))
        if isinstance(self.choice, str) or not all(
            isinstance(one, str) and one for one in self.choice
        ):
            raise EasySpecError("`choice` takes several texts, each of at least one character")
        self._keep("choice", tuple(self.choice))
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

    def limited(self, most: int) -> Self:
        """Return a copy that allows at most `most` new tokens.

        Args:
            most: Tokens that a text may have, at least 1.

        Examples:
            >>> few = SamplingParams(max_new_tokens=1 << 40, min_new_tokens=9).limited(5)
            >>> few.max_new_tokens, few.min_new_tokens
            (5, 5)
        """
        if self.max_new_tokens <= most:
            return self
        least = min(self.min_new_tokens, most)
        return replace(self, max_new_tokens=most, min_new_tokens=least)

    def check_ids(self, vocab_size: int) -> None:
        """Raise EasySpecError for an id that a vocabulary lacks.

        Args:
            vocab_size: Ids of the vocabulary.
        """
        named = {
            "logit_bias": tuple(self.biases),
            "stop_token_ids": self.stop_token_ids,
            "bad_words_ids": itertools.chain.from_iterable(self.bad_words_ids),
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
