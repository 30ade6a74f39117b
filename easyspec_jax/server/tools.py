"""Tools of a request: which the model is offered, and which calls its answer may have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from easyspec_jax.errors import EasySpecError
from easyspec_jax.sampling.tool_grammar import ToolGrammar

ANY: Mapping[str, Any] = {"type": "object"}
"""Schema of arguments that may be any."""


@dataclass(frozen=True)
class Tools:
    """What a request says of tools.

    Attributes:
        offered: Those that the model is shown.
        grammar: The calls that the answer may have, as SamplingParams.tool_calls; None if anything
            may be said.
    """

    offered: Sequence[Any]
    grammar: str | None


def read_tools(tools: Sequence[Any], choice: Any, several: bool) -> Tools:
    """Read `tools`, `tool_choice` and `parallel_tool_calls`.

    Args:
        tools: The tools.
        choice: "auto", "none", "required", or an object that names a function; None if not given.
        several: Whether an answer may call several tools.

    Raises:
        EasySpecError: A tool is not a function, or the choice is none of these.

    Examples:
        >>> tool = {"type": "function", "function": {"name": "now"}}
        >>> read_tools([tool], None, True).grammar is None
        True
        >>> read_tools([tool], "required", True).grammar
        '{"needs_call": true, "several": true, "arguments": {"now": {"type": "object"}}}'
    """
    functions = {_name(tool): tool["function"] for tool in tools}
    if len(functions) < len(tools):
        raise EasySpecError("tools has two functions of one name")
    if choice in (None, "auto"):
        return Tools(tools, _strict(functions, several))
    if choice == "none":
        return Tools([], None)
    named = _named(choice)
    if choice != "required" and named is None:
        raise EasySpecError(
            f"tool_choice {str(choice)[:40]!r} is not supported; use 'auto', 'none', 'required' or "
            "{type: 'function', function: {name: ...}}"
        )
    called = [name for name in functions if named in (None, name)]
    if not called:
        raise EasySpecError(f"tool_choice {(named or choice)[:40]!r} needs a function of tools")
    arguments = {name: _schema(functions[name]) for name in called}
    grammar = ToolGrammar(arguments, needs_call=True, several=several and named is None)
    return Tools(tools, grammar.text)


def _strict(functions: Mapping[str, Mapping[str, Any]], several: bool) -> str | None:
    """Return the grammar of answers that may call tools, if some function is strict."""
    if not any(function.get("strict") for function in functions.values()):
        return None
    arguments = {}
    for name, function in functions.items():
        arguments[name] = _schema(function) if function.get("strict") else ANY
    return ToolGrammar(arguments, needs_call=False, several=several).text


def _schema(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of a function's arguments."""
    return {**ANY, **(function.get("parameters") or {})}


def _named(choice: Any) -> str | None:
    """Return the function that a choice names."""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and choice.get("type") == "function" else None


def _name(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind is not None and kind != "function":
        raise EasySpecError(f"tools of type {str(kind)[:40]!r} are not supported; use 'function'")
    function = tool.get("function") if kind else None
    if not isinstance(function, dict):
        function = {}
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise EasySpecError("tools must be a list of {type: 'function', function: {name: ...}}")
    if parameters is not None and not (
        isinstance(parameters, dict) and parameters.get("type", "object") == "object"
    ):
        raise EasySpecError(f"tools: parameters of {name[:40]!r} must be a schema of an object")
    return name
