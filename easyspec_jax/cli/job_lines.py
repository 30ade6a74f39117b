"""A line of a batch job: its id, its prompt and its sampling, or what is wrong with it.

Lines may use the fields of OpenAI's batch format instead of ours. A field that would change the
text but is not supported is an error. One that merely describes the line is ignored.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from easyspec_jax.arithmetic import wrap_seed
from easyspec_jax.engine.requests import (
    OTHER_NAMES,
    check_type,
    conversation_in,
    known_fields,
    logprobs_in,
    sampling_in,
)
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.options import SamplingParams
from easyspec_jax.tokenizer.conversation import Prompt, with_system

_OWN = (
    "id", "prompt", "messages", "tools", "body", "n", "logprobs", "top_logprobs", "prompt_logprobs",
)  # fmt: skip
_NAMES = {**OTHER_NAMES, "custom_id": "id"}


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

    @property
    def texts(self) -> int:
        """How many texts to make."""
        return 1 if self.sampling is None else self.sampling.n


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
        prompt: Prompt = conversation_in(fields)
    elif isinstance(fields["prompt"], str):
        prompt = fields["prompt"]
    else:
        raise EasySpecError("prompt must be a string")
    if "tools" in fields and "prompt" in fields:
        raise EasySpecError("tools go with messages, not with a prompt")
    prompt = prompt if system is None else with_system(prompt, system)
    return Item(line, fields["id"], prompt, _sampling(fields, default), unused=unused)


def _sampling(fields: Mapping[str, Any], default: SamplingParams) -> SamplingParams:
    """Return the sampling of a line, and how many texts and log-probabilities it asks for."""
    own = {name: fields[name] for name in ("n", "prompt_logprobs") if name in fields}
    for name, value in own.items():
        check_type(name, value, int)
    # `n` goes with a temperature, so it is set once that is.
    sampling = sampling_in(fields, replace(default, n=1))
    logprobs = logprobs_in(fields, default.logprobs)
    return replace(sampling, **({"n": default.n, "logprobs": logprobs} | own))


def _flat(fields: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the fields under our names, without nulls, and the names of those that are ignored."""
    given = {name: value for name, value in fields.items() if value is not None}
    body = given.pop("body", {})
    if not isinstance(body, dict):
        raise EasySpecError("body must be an object")
    return known_fields((*given.items(), *body.items()), _OWN, _NAMES)
