"""Fields of OpenAI's formats and what they mean here, for lines of jobs and for the server.

A field that would change the text but is not supported is an error. One that merely describes the
request is ignored. A new way of sampling needs an entry in SAMPLING.
"""

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams
from easyspec_jax.tokenizer.conversation import Conversation, conversation_of

SAMPLING = {
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "seed": (int,),
    "max_new_tokens": (int,),
    "stop": (str, list),
    "min_p": (int, float),
    "logit_bias": (dict,),
    "min_new_tokens": (int,),
    "ignore_eos": (bool,),
    "stop_token_ids": (list,),
    "presence_penalty": (int, float),
    "frequency_penalty": (int, float),
    "repetition_penalty": (int, float),
    "bad_words": (list,),
    "json_schema": (dict, str),
    "regex": (str,),
    "choice": (list,),
}
"""Fields that say how to sample, and the types of their values."""

OTHER_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
}
"""OpenAI's and vLLM's names of fields that we call differently."""

GRAMMARS = ("response_format", "structured_outputs")
"""OpenAI's and vLLM's objects around a grammar."""

DESCRIPTIVE = (
    "method", "url", "model", "metadata", "user", "stream", "stream_options", "store",
    "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
)  # fmt: skip
"""Fields of OpenAI's formats that change no text."""

GRAMMAR_FIELDS: dict[str, Any] = {"json_schema": None, "regex": None, "choice": []}
"""Our fields that a grammar can be in, and the values of none."""

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False, 0),
    "top_logprobs": (0,), "prompt_logprobs": (),
    "tool_choice": ("auto",), "functions": ([],),
    "function_call": ("auto",), "stop_sequences": ([],), "eos_token_id": (), "chat_template": (),
    "chat_template_kwargs": ({},), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "guided_grammar": (), "grammar": (),
    "max_output_tokens": (), "max_length": (), "num_beams": (1,), "use_beam_search": (False,),
    "length_penalty": (1,), "no_repeat_ngram_size": (0,),
    "typical_p": (1,), "top_a": (0,), "tfs_z": (1,), "mirostat": (0,), "dynatemp_range": (0,),
    "dry_multiplier": (0,), "xtc_probability": (0,), "reasoning_effort": (), "system": (),
    "instructions": (),
    "prompt_token_ids": (), "input": (), "prefix": (), "logit_processors": ([],),
    "logits_processors": ([],), "allowed_token_ids": (), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,),
    "guided_whitespace_pattern": (), "ebnf": (), "stop_regex": (), "n_predict": (),
    "truncate_prompt_tokens": (), "verbosity": ("medium",), "documents": ([],),
    "return_token_ids": (False,), "return_tokens_as_token_ids": (False,), "top_n_sigma": (),
    "do_sample": (True,), "modalities": (["text"],), "audio": (), "web_search_options": (),
    "structural_tag": (), "guided_json_object": (False,), "thinking_token_budget": (),
    "repetition_detection": (), "logit_processor": ([],),
}  # fmt: skip
"""Fields that are not supported, and the values with which they would have no effect."""

_MOST_UNKNOWN = 64
"""Most unknown fields of one object; each is compared with all known ones."""


def known_fields(
    given: Iterable[tuple[str, Any]], own: Collection[str], names: Mapping[str, str] = OTHER_NAMES
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the fields under our names, without nulls, and the names of those that are ignored.

    Args:
        given: Names and values; a name may come twice.
        own: Fields that the caller reads itself.
        names: Other names of fields, and ours.

    Raises:
        EasySpecError: A field is misspelt or not supported, or given twice with two values, or too
            many are unknown.

    Examples:
        >>> known_fields([("max_tokens", 7), ("seed", None), ("level", 3)], {"prompt"})
        ({'max_new_tokens': 7, 'level': 3}, ('level',))
    """
    used = {*own, *SAMPLING, *GRAMMARS, *names}
    known = {*used, *DESCRIPTIVE, *_WITHOUT_EFFECT}
    flat: dict[str, Any] = {}
    given = list(given)
    if sum(name not in known for name, _ in given) > _MOST_UNKNOWN:
        raise EasySpecError(f"there are more than {_MOST_UNKNOWN} unknown fields")
    for name, value in given:
        # A null means that the field is not given, as in OpenAI's API.
        if value is None:
            continue
        _check_field(name, value, used, known)
        ours = names.get(name, name)
        # max_tokens and max_new_tokens may both be there, if they agree.
        if flat.setdefault(ours, value) != value and ours not in DESCRIPTIVE:
            raise EasySpecError(
                f"{ours} is given twice, as {str(flat[ours])[:40]!r} and {str(value)[:40]!r}"
            )
    return flat, tuple(name for name in flat if name not in known)


def _check_field(name: str, value: Any, used: Collection[str], known: Collection[str]) -> None:
    """Raise EasySpecError for a field that is misspelt or not supported."""
    if name in used:
        return
    if name in _WITHOUT_EFFECT and not any(value == plain for plain in _WITHOUT_EFFECT[name]):
        raise EasySpecError(f"{name} {str(value)[:40]!r} is not supported")
    if name in known:
        return
    meant = difflib.get_close_matches(name[:40], sorted(used), 1, cutoff=0.8)
    if meant:
        raise EasySpecError(f"field {name[:40]!r} is unknown; did you mean {meant[0]!r}?")


def conversation_in(fields: Mapping[str, Any]) -> Conversation:
    """Return the conversation of `messages` and `tools`.

    Raises:
        EasySpecError: They are not a conversation.
    """
    if not isinstance(fields["messages"], list) or not fields["messages"]:
        raise EasySpecError("messages must be a list of objects with a role and a content")
    return conversation_of(Conversation(fields["messages"], fields.get("tools", ())))


def sampling_in(fields: Mapping[str, Any], default: SamplingParams) -> SamplingParams:
    """Return the sampling that some fields ask for.

    Args:
        fields: Those of known_fields().
        default: Values of fields that are not given.

    Raises:
        EasySpecError: A value is of the wrong type or out of range.

    Examples:
        >>> sampling_in({"stop": "end", "top_k": 5}, SamplingParams(seed=3)).stop
        ('end',)
    """
    own = {name: fields[name] for name in SAMPLING if name in fields} | grammar_in(fields)
    if not own.keys().isdisjoint(GRAMMAR_FIELDS):
        own = GRAMMAR_FIELDS | own  # it takes the place of the default's
    for name, value in own.items():
        if value is not None:
            check_type(name, value, *SAMPLING[name])
    if "stop" in own:
        stop = [own["stop"]] if isinstance(own["stop"], str) else own["stop"]
        if not all(isinstance(text, str) for text in stop):
            raise EasySpecError("stop must be a string or a list of strings")
        own["stop"] = tuple(stop)
    for name in ("bad_words", "choice"):
        if name in own:
            if not all(isinstance(text, str) for text in own[name]):
                raise EasySpecError(f"{name} must be a list of strings")
            own[name] = tuple(own[name])
    for name in own:
        if SAMPLING[name] == (int, float):
            own[name] = _float(name, own[name])
    if "logit_bias" in own:
        own["logit_bias"] = _biases(own["logit_bias"])
    if "stop_token_ids" in own:
        if any(isinstance(number, bool) for number in own["stop_token_ids"]):
            raise EasySpecError("stop_token_ids must be a list of whole numbers")
        own["stop_token_ids"] = tuple(own["stop_token_ids"])
    return replace(default, **own)


def grammar_in(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the grammar that some fields ask for, under our names; none or one, if all is well.

    Args:
        fields: Those of known_fields().

    Raises:
        EasySpecError: An object is none of these formats', two fields contradict each other, or
            there is nothing to choose from.

    Examples:
        >>> grammar_in({"response_format": {"type": "json_object"}})
        {'json_schema': {'type': 'object'}}
        >>> grammar_in({"structured_outputs": {"regex": "a+", "choice": None}})
        {'regex': 'a+'}
    """
    found = {name: fields[name] for name in GRAMMAR_FIELDS if name in fields}
    for name in GRAMMARS:
        if name in fields:
            check_type(name, fields[name], dict)
            given = {key: value for key, value in fields[name].items() if value is not None}
            read = _response_format if name == "response_format" else _structured_outputs
            for kind, value in read(given).items():
                if found.setdefault(kind, value) != value:
                    raise EasySpecError(f"{name} contradicts another {kind} of the same request")
    if found.get("choice") == []:
        raise EasySpecError("`choice` must have at least one text")
    return found


def _response_format(given: Mapping[str, Any]) -> dict[str, Any]:
    kind, own = given.get("type"), given.get("json_schema")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if kind != "json_schema" or not isinstance(own, dict) or own.get("schema") is None:
        raise EasySpecError(
            "response_format must have the type text, json_object, or json_schema and then an "
            "object json_schema that has the schema"
        )
    return {"json_schema": own["schema"]}


def _structured_outputs(given: Mapping[str, Any]) -> dict[str, Any]:
    ours = {"json": "json_schema", "regex": "regex", "choice": "choice"}
    if given.get("json_object") is True:
        given = {"json": {"type": "object"}, **given}
    found = {ours[name]: value for name, value in given.items() if name in ours}
    if given.keys() - ours.keys() - {"json_object"} or not found:
        raise EasySpecError("structured_outputs must have one of json, regex, choice, json_object")
    return found


def logprobs_in(fields: Mapping[str, Any], default: int | None) -> int | None:
    """Return how many likeliest tokens `logprobs` and `top_logprobs` ask for; None for none.

    In OpenAI's chats the first is a flag and the second the number; in completions the first is the
    number.

    Args:
        fields: Those of known_fields().
        default: The value if neither is given.

    Raises:
        EasySpecError: One is of the wrong type, or they contradict each other.

    Examples:
        >>> logprobs_in({"logprobs": True, "top_logprobs": 3}, None), logprobs_in({}, 2)
        (3, 2)
    """
    asked, best = fields.get("logprobs", default), fields.get("top_logprobs", 0)
    check_type("top_logprobs", best, int)
    if "logprobs" in fields:
        check_type("logprobs", asked, int, bool)
    if asked is True:
        return best
    if best:
        raise EasySpecError("top_logprobs needs logprobs true")
    return None if asked is False else asked


def _biases(given: Mapping[str, Any]) -> dict[int, float]:
    """Return the biases of ids, which JSON can only spell as strings."""
    biases = {}
    for number, bias in given.items():
        # Python refuses to read thousands of digits, and no id has more than ten.
        is_id = number.isdecimal() and len(number) <= 10
        if not is_id or isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise EasySpecError("logit_bias must be an object of ids and numbers")
        biases[int(number)] = _float("logit_bias", bias)
    return biases


def check_type(name: str, value: Any, *types: type) -> None:
    """Raise EasySpecError unless a field's value is of one of some types."""
    # bool is a subclass of int, so true would pass as the number 1.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise EasySpecError(f"{name} {str(value)[:40]!r} is of the wrong type")


def _float(name: str, value: float) -> float:
    try:
        # JSON has whole numbers of any size, and float() raises for some.
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise EasySpecError(f"{name} must be a number of ordinary size")
    return number
