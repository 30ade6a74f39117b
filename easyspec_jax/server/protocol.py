"""OpenAI's requests as Python objects. Nothing here knows HTTP or the engine.

A request's fields are those of jobs (engine/requests.py) and a few of its own. A field that would
change the text but is not supported is refused by name.
"""

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from easyspec_jax.arithmetic import wrap_seed
from easyspec_jax.engine.requests import (
    GRAMMAR_FIELDS,
    GRAMMARS,
    OTHER_NAMES,
    check_type,
    conversation_in,
    known_fields,
    logprobs_in,
    sampling_in,
)
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams
from easyspec_jax.server.tools import read_tools
from easyspec_jax.tokenizer.conversation import Conversation

PromptOrIds = str | list[int] | Conversation
"""Text to continue, its token ids, or a conversation to answer."""

_OWN = (
    "prompt", "messages", "tools", "tool_choice", "parallel_tool_calls", "n", "stream",
    "stream_options", "easyspec", "logprobs", "top_logprobs", "add_special_tokens",
)  # fmt: skip
_CHOICES = 64  # most answers to one request
_STOPS = 16  # most stop strings


class RequestError(Exception):
    """A request that gets an error for an answer.

    Attributes:
        status: HTTP's number for it.
        message: One line.
        kind: OpenAI's `type`.
        param: The field that is wrong, if it is one.
        code: OpenAI's `code`.
        headers: Headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        # A message may quote the request, which may be long.
        self.status, self.message, self.kind = status, message[:500], kind
        self.param, self.code, self.headers = param, code, dict(headers or {})

    def as_dict(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        chat: Whether answers have the form of a chat.
        model: The model that it names, if it does.
        prompts: What to complete, each `n` times.
        sampling: How. Answer i draws its noise from seed + i.
        limited: Whether the request gives the most tokens itself.
        n: Answers to each prompt.
        stream: Whether to send answers as they grow.
        include_usage: Whether a stream ends with the numbers of tokens.
        trace: Whether to say which tokens were drafted, round by round.
        plain: Whether to decode without a draft, for comparison.
        names: Of each field that the request has, our name, and its own.
        tools: Whether the model is offered tools.
        parallel_tool_calls: Whether an answer may call several tools.
    """

    chat: bool
    model: str | None
    prompts: list[PromptOrIds]
    sampling: SamplingParams
    limited: bool
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    trace: bool = False
    plain: bool = False
    names: Mapping[str, str] = field(default_factory=dict, compare=False)
    tools: bool = False
    parallel_tool_calls: bool = True


def read_request(body: bytes, chat: bool) -> Asked:
    """Read the body of a request.

    Args:
        body: JSON.
        chat: Whether it is one for chat completions, else one for completions.

    Raises:
        RequestError: Anything is wrong with it.
    """
    fields = _object(body)
    try:
        return _asked(fields, chat)
    except EasySpecError as error:
        raise bad_request(error, _names(fields)) from None


def bad_request(error: EasySpecError, names: Mapping[str, str]) -> RequestError:
    """Turn an error of the library into one of the protocol, in terms of the request's fields.

    Args:
        error: The error.
        names: Of each field that the request has, our name, and its own.
    """

    def named(field: re.Match[str]) -> str:
        return names.get(field[1], field[1])

    message = " ".join(re.sub(r"`([a-z_]+)`", named, str(error)).split())
    first = re.match(r"(?:field ')?(\w+)", message)
    param = first[1] if first and first[1] in names.values() else None
    return RequestError(400, message, param=param)


def _names(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return what a request calls our fields. A grammar may be within an object."""
    names = {name: name for name in fields}
    names |= {ours: theirs for theirs, ours in OTHER_NAMES.items() if theirs in fields}
    if fields.get("logprobs") is True:
        names["logprobs"] = "top_logprobs"  # the field that has the number
    names["tool_calls"] = "tools"
    objects = [name for name in GRAMMARS if name in fields]
    for name in objects[:1]:
        names = dict.fromkeys(GRAMMAR_FIELDS, name) | names
    return names


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is no JSON: {str(error)[:80]}") from None
    if not isinstance(fields, dict):
        raise RequestError(400, "the body must be a JSON object")
    return fields


def _refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is no JSON")


def _asked(fields: dict[str, Any], chat: bool) -> Asked:
    if fields.get("best_of") == fields.get("n"):
        fields = {name: value for name, value in fields.items() if name != "best_of"}
    flat, _ = known_fields(fields.items(), _OWN)
    if type(flat.get("seed")) is int:
        flat["seed"] = wrap_seed(flat["seed"])  # OpenAI's have 64 bits and a sign
    if flat.get("top_k") == -1:
        flat["top_k"] = 0  # all, as vLLM spells it
    own = _Fields(flat)
    options = _Fields(own.get("stream_options", dict, {}))
    options.refuse_others("stream_options", ("include_usage", "include_obfuscation"))
    extra = _Fields(own.get("easyspec", dict, {}))
    extra.refuse_others("easyspec", ("trace", "plain"))
    stream = own.get("stream", bool, False)
    if "stream_options" in flat and not stream:
        raise EasySpecError("stream_options goes with stream")
    # A completion begins as the tokenizer begins a text, a conversation as its template does.
    if own.get("add_special_tokens", bool, not chat) == chat:
        raise EasySpecError(f"add_special_tokens {str(chat).lower()} is not supported")
    n = own.get("n", int, 1)
    several = own.get("parallel_tool_calls", bool, True)
    tools = read_tools(_Fields(flat).get("tools", list, []), flat.get("tool_choice"), several)
    prompts = _conversations(flat, tools.offered) if chat else _prompts(flat)
    if not 1 <= n * len(prompts) <= _CHOICES:
        raise EasySpecError(f"n must be at least 1, and at most {_CHOICES} answers in all")
    # OpenAI's own defaults. A seed is drawn where none is given, so that answers differ.
    default = SamplingParams(
        temperature=1.0, max_new_tokens=2**31 if chat else 16, seed=secrets.randbits(32)
    )
    sampling = replace(
        sampling_in(flat, default), logprobs=logprobs_in(flat, None), tool_calls=tools.grammar
    )
    if len(sampling.stop) > _STOPS:
        raise EasySpecError(f"stop may have {_STOPS} strings at most")
    return Asked(
        chat=chat,
        model=own.get("model", str, None),
        prompts=prompts,
        sampling=sampling,
        limited="max_new_tokens" in flat,
        n=n,
        stream=stream,
        include_usage=options.get("include_usage", bool, False),
        trace=extra.get("trace", bool, False),
        plain=extra.get("plain", bool, False),
        names=_names(fields),
        tools=bool(tools.offered),
        parallel_tool_calls=several,
    )


class _Fields:
    """Fields whose values must have a type."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def get(self, name: str, kind: type, default: Any) -> Any:
        value = self._fields.get(name)
        if value is None:
            return default
        check_type(name, value, kind)
        return value

    def refuse_others(self, name: str, known: Collection[str]) -> None:
        """Raise EasySpecError if there is a field of another name."""
        others = [field for field in self._fields if field not in known]
        if others:
            raise EasySpecError(f"{name} has no field {others[0][:40]!r}")


def _conversations(fields: Mapping[str, Any], tools: Sequence[Any]) -> list[PromptOrIds]:
    if "prompt" in fields or "messages" not in fields:
        raise EasySpecError("messages is needed, a list of objects with a role and a content")
    return [conversation_in({**fields, "tools": tools})]


def _prompts(fields: Mapping[str, Any]) -> list[PromptOrIds]:
    """Return the prompts of a completion: a text, a list of ids, or a list of such."""
    if "prompt" not in fields or "messages" in fields or "tools" in fields:
        raise EasySpecError("prompt is needed: a string, token ids, or a list of either")
    prompt = fields["prompt"]
    several = isinstance(prompt, list) and not _are_ids(prompt)
    prompts = prompt if several else [prompt]
    if not prompts or not all(isinstance(one, str) or _are_ids(one) for one in prompts):
        raise EasySpecError("prompt must be a string, token ids, or a list of either")
    return prompts


def _are_ids(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)


def seeded(asked: Asked, number: int) -> SamplingParams:
    """Return the sampling of one of a request's answers."""
    return replace(asked.sampling, seed=(asked.sampling.seed + number) % 2**32)
