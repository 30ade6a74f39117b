"""Tools of a request: which the model is offered, and which calls its answer may have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from easyspec_jax.errors import EasySpecError
from easyspec_jax.sampling.tool_grammar import ToolGrammar


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
        EasySpecError: A tool is not a function, the choice is none of these, or calls that must
            follow schemas have none of objects, or two of one name.

    Examples:
        >>> tool = {"type": "function", "function": {"name": "now"}}
        >>> read_tools([tool], None, True).grammar is None
        True
        >>> read_tools([tool], "required", True).grammar
        '{"needs_call": true, "several": true, "arguments": {"now": {"type": "object"}}}'
    """
    functions = [(_name(tool), tool["function"]) for tool in tools]
    if choice == "none":
        return Tools([], None)
    if choice in (None, "auto"):
        if not any(function.get("strict") for _, function in functions):
            return Tools(tools, None)
        arguments = _arguments(functions, only_strict=True)
        return Tools(tools, ToolGrammar(arguments, needs_call=False, several=several).text)
    named = _named(choice)
    if choice != "required" and named is None:
        raise EasySpecError(
            f"tool_choice {str(choice)[:40]!r} is not supported; use 'auto', 'none', 'required' or "
            "{type: 'function', function: {name: ...}}"
        )
    called = [(name, function) for name, function in functions if named in (None, name)]
    if not called:
        raise EasySpecError(f"tool_choice {(named or choice)[:40]!r} needs a function of tools")
    arguments = _arguments(called, only_strict=False)
    grammar = ToolGrammar(arguments, needs_call=True, several=several and named is None)
    return Tools(tools, grammar.text)


def _arguments(
    functions: Sequence[tuple[str, Mapping[str, Any]]], only_strict: bool
) -> dict[str, Mapping[str, Any]]:
    """Return the schema of the arguments of each function by name.

    Args:
        functions: Names and functions.
        only_strict: Whether functions that are not strict take any arguments.
    """
    arguments: dict[str, Mapping[str, Any]] = {}
    for name, function in functions:
        parameters = function.get("parameters") or {}
        if only_strict and not function.get("strict"):
            parameters = {}
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            raise EasySpecError(f"tools: parameters of {name[:40]!r} must be a schema of an object")
        arguments[name] = {"type": "object", **parameters}
    if len(arguments) < len(functions):
        raise EasySpecError("tools has two functions of one name")
    return arguments


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
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise EasySpecError("tools must be a list of {type: 'function', function: {name: ...}}")
    return name
