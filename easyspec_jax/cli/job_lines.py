"""A line of a batch job: its id, its prompt and its sampling, or what is wrong with it.

Lines may use the fields of OpenAI's batch format instead of ours. A field that would change the
text but is not supported is an error. One that merely describes the line is ignored.
"""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from easyspec_jax.arithmetic import wrap_seed
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.options import SamplingParams
from easyspec_jax.tokenizer.conversation import Conversation, Prompt, conversation_of, with_system

SAMPLING = {
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "seed": (int,),
    "max_new_tokens": (int,),
    "stop": (str, list),
}
"""Fields of a line that say how to sample it, and the types of their values."""

_OTHER_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "custom_id": "id",
}

_DESCRIPTIVE = (
    "method", "url", "model", "metadata", "user", "stream", "stream_options", "store",
    "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
)  # fmt: skip
"""Fields of OpenAI's formats that change no text."""

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False, 0),
    "top_logprobs": (0,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "repetition_penalty": (1,), "min_p": (0,), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "tool_choice": ("auto",), "functions": ([],),
    "function_call": ("auto",), "stop_token_ids": ([],), "stop_sequences": ([],),
    "eos_token_id": (), "ignore_eos": (False,), "bad_words": ([],), "chat_template": (),
    "chat_template_kwargs": ({},), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "guided_json": (), "guided_regex": (), "guided_choice": (),
    "guided_grammar": (), "structured_outputs": (), "grammar": (), "json_schema": (),
    "max_output_tokens": (), "max_length": (), "min_tokens": (0,), "num_beams": (1,),
    "use_beam_search": (False,), "length_penalty": (1,), "no_repeat_ngram_size": (0,),
    "typical_p": (1,), "reasoning_effort": (), "system": (), "instructions": (),
    "prompt_token_ids": (), "input": (), "prefix": (), "logit_processors": ([],),
    "truncate_prompt_tokens": (),
}  # fmt: skip
"""Fields that are not supported, and the values with which they would have no effect."""

_USED = {"id", "prompt", "messages", "tools", "body", *SAMPLING, *_OTHER_NAMES}
_KNOWN = {*_USED, *_DESCRIPTIVE, *_WITHOUT_EFFECT}


@dataclass(frozen=True)
class Item:
    """A line of the input: its prompt, or what is wrong with it.

    Attributes:
        line: Its number, from 1.
        id: Its id; if the line has an error, any JSON value.
        prompt: The prompt to complete.
        sampling: How to sample it; None if the line has an error.
        error: What is wrong with the line.
        unused: Names of the fields that were ignored.
    """

    line: int
    id: Any = None
    prompt: Prompt = ""
    sampling: SamplingParams | None = None
    error: str | None = None
    unused: tuple[str, ...] = ()


def read_items(content: bytes, default: SamplingParams, system: str | None = None) -> list[Item]:
    """Read every line that is not blank. A bad line becomes an Item with an error.

    Args:
        content: JSON lines.
        default: Sampling of lines that do not give their own. Line n uses its seed + n - 1.
        system: System message of prompts that are text, and of conversations without one.
    """
    items: list[Item] = []
    seen: dict[Any, int] = {}
    for line, text in enumerate(content.split(b"\n"), 1):
        if not text.strip():
            continue
        item = _item(line, text, replace(default, seed=wrap_seed(default.seed + line - 1)), system)
        if item.error is None:
            # The first line with an id keeps it; later ones are errors.
            first = seen.setdefault(item.id, line)
            if first != line:
                item = Item(line, item.id, error=f"id {item.id!r} is that of line {first} too")
        items.append(item)
    return items


def _item(line: int, text: bytes, default: SamplingParams, system: str | None) -> Item:
    own_id = None
    try:
        fields = _object(line, text)
        given = fields.get("id")
        own_id = _writable(fields.get("custom_id") if given is None else given)
        return _parsed(line, fields, default, system)
    except EasySpecError as error:
        message = str(error)
    except Exception as error:  # a hostile line can raise anything, but costs only itself
        message = f"cannot be used ({type(error).__name__}: {first_line(error)[:80]})"
    return Item(line, own_id, error=" ".join(message.split()))


def _object(line: int, text: bytes) -> dict[str, Any]:
    try:
        # Some editors begin a file with a byte order mark, which is not JSON.
        fields = json.loads(text.decode("utf-8-sig" if line == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise EasySpecError(f"no JSON: {str(error)[:80]}") from None
    if not isinstance(fields, dict):
        raise EasySpecError("no JSON object")
    return fields


def _writable(value: Any) -> Any:
    """Return an id if it can be written back as JSON, else None."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return value


def _parsed(line: int, fields: dict[str, Any], default: SamplingParams, system: str | None) -> Item:
    fields, unused = _flat(fields)
    if not isinstance(fields.get("id"), (str, int)) or isinstance(fields["id"], bool):
        raise EasySpecError("id must be a string or a whole number")
    if ("prompt" in fields) == ("messages" in fields):
        raise EasySpecError("give either prompt or messages")
    if "messages" in fields:
        if not isinstance(fields["messages"], list) or not fields["messages"]:
            raise EasySpecError("messages must be a list of objects with a role and a content")
        prompt: Prompt = conversation_of(Conversation(fields["messages"], fields.get("tools", ())))
    elif isinstance(fields["prompt"], str):
        prompt = fields["prompt"]
    else:
        raise EasySpecError("prompt must be a string")
    if "tools" in fields and "prompt" in fields:
        raise EasySpecError("tools go with messages, not with a prompt")
    prompt = prompt if system is None else with_system(prompt, system)
    return Item(line, fields["id"], prompt, _sampling(fields, default), unused=unused)


def _flat(fields: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the fields under our names, without nulls, and the names of those that are ignored."""
    # A null means that the field is not given, as in OpenAI's API.
    given = {name: value for name, value in fields.items() if value is not None}
    body = given.pop("body", {})
    if not isinstance(body, dict):
        raise EasySpecError("body must be an object")
    flat: dict[str, Any] = {}
    for name, value in (*given.items(), *body.items()):
        if value is None:
            continue
        _check_field(name, value)
        ours = _OTHER_NAMES.get(name, name)
        # max_tokens and max_new_tokens may both be there, if they agree.
        if flat.setdefault(ours, value) != value and ours not in _DESCRIPTIVE:
            raise EasySpecError(
                f"{ours} is given twice, as {str(flat[ours])[:40]!r} and {str(value)[:40]!r}"
            )
    unused = tuple(name for name in flat if name not in _KNOWN)
    return flat, unused


def _check_field(name: str, value: Any) -> None:
    """Raise EasySpecError for a field that is misspelt or not supported."""
    if name in _WITHOUT_EFFECT and not any(value == plain for plain in _WITHOUT_EFFECT[name]):
        raise EasySpecError(f"{name} {str(value)[:40]!r} is not supported")
    if name in _KNOWN:
        return
    meant = difflib.get_close_matches(name[:40], sorted(_USED), 1, cutoff=0.8)
    if meant:
        raise EasySpecError(f"field {name[:40]!r} is unknown; did you mean {meant[0]!r}?")


def _sampling(fields: Mapping[str, Any], default: SamplingParams) -> SamplingParams:
    own = {name: fields[name] for name in SAMPLING if name in fields}
    for name, value in own.items():
        # bool is a subclass of int, so true would pass as the number 1.
        if isinstance(value, bool) or not isinstance(value, SAMPLING[name]):
            raise EasySpecError(f"{name} {str(value)[:40]!r} is of the wrong type")
    if "stop" in own:
        stop = [own["stop"]] if isinstance(own["stop"], str) else own["stop"]
        if not all(isinstance(text, str) for text in stop):
            raise EasySpecError("stop must be a string or a list of strings")
        own["stop"] = tuple(stop)
    for name in own.keys() & {"temperature", "top_p"}:
        own[name] = _float(own[name])
    return replace(default, **own)


def _float(value: float) -> float:
    try:
        # JSON has whole numbers of any size, and float() raises for some.
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise EasySpecError("temperature and top_p must be numbers of ordinary size")
    return number
