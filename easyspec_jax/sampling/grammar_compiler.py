"""From texts of grammars to llguidance's matchers."""

import json
from typing import Any

from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.options import Grammar, GrammarKind
from easyspec_jax.sampling.grammar_trial import MEMORY, SECONDS, complaint
from easyspec_jax.sampling.tool_grammar import ToolGrammar, quoted
from easyspec_jax.tokenizer.tool_calls import BEGIN, END

_LIMITS: dict[str, Any] = {"max_lexer_states": 50_000, "verbose_errors": False}
"""Limits that differ from the defaults of llguidance."""

_JSON: Any = {"whitespace_pattern": r" |\r?\n[ \t]{0,32}"}
"""How JSON is written: a blank, or a new line and an indent, where JSON would allow any amount.

Models have been seen to go on with blanks for ever. A schema's own "x-guidance" comes first.
"""


def open_vocabulary(
    tokenizer: Any, vocab_size: int, stop_ids: tuple[int, ...], kind: GrammarKind
) -> Any:
    """Return llguidance's form of a tokenizer, which takes seconds to make.

    Args:
        tokenizer: The target's tokenizer.
        vocab_size: Ids that the target has.
        stop_ids: The checkpoint's stop tokens.
        kind: The field that needs it.

    Raises:
        EasySpecError: llguidance is missing; or the tokenizer has more ids than the target, or is
            of another kind than llguidance knows.
    """
    try:
        from llguidance.hf import from_tokenizer
    except ImportError:
        raise EasySpecError(
            f"`{kind}` needs llguidance; install it with pip install '.[grammar]'"
        ) from None
    ids = 1 + max(tokenizer.get_vocab().values())
    if ids > vocab_size:
        raise EasySpecError(
            f"`{kind}` needs a target that has all {ids} ids of the tokenizer, not {vocab_size}"
        )
    try:
        return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(stop_ids) or None)
    except Exception as error:  # whatever Rust says of files that are not ours
        raise EasySpecError(
            f"`{kind}` cannot be used with this tokenizer: {first_line(error)[:120]}"
        ) from None


def compiled(grammar: Grammar, vocabulary: Any, trial: bool = False) -> Any:
    """Return a matcher before any output.

    Args:
        grammar: The grammar.
        vocabulary: What open_vocabulary() returned.
        trial: Whether to compile it in a process of its own first. Any grammar that comes from
            elsewhere needs that once; see grammar_trial.py.

    Raises:
        EasySpecError: llguidance cannot use the grammar.
    """
    from llguidance import LLMatcher, LLParserLimits

    try:
        # The trial knows no tokens but bytes.
        text = _llguidance_text(grammar, tags_are_tokens=False)
        wrong = complaint(text, _LIMITS) if trial else ""
        if grammar.kind == "tool_calls" and _has_tags(vocabulary):
            text = _llguidance_text(grammar, tags_are_tokens=True)
    except ValueError as error:
        raise _refusal(grammar, str(error)) from None
    if wrong is None:
        raise EasySpecError(
            f"`{grammar.kind}` is too complex: it takes more than {SECONDS} seconds or "
            f"{MEMORY >> 30} GiB to read"
        )
    matcher = None
    if not wrong:
        limits = LLParserLimits(**_LIMITS)
        matcher = LLMatcher(vocabulary, text, log_level=0, limits=limits)
        matcher.compute_bitmask()
        wrong = matcher.get_error()
    if wrong:
        raise _refusal(grammar, wrong)
    return matcher


def _refusal(grammar: Grammar, wrong: str) -> EasySpecError:
    # Those of regular expressions show the place on several lines, and end with a reason.
    reason = " ".join(wrong.split()).rpartition("error: ")[2]
    if wrong.startswith("NoExtension"):
        reason = "it allows no text"
    return EasySpecError(f"`{grammar.kind}` cannot be used: {reason[:160]}")


def _has_tags(vocabulary: Any) -> bool:
    """Whether a vocabulary has a token for each tag around a call of a tool."""
    return all(len(vocabulary.tokenize_str(tag)) == 1 for tag in (BEGIN, END))


def _llguidance_text(grammar: Grammar, tags_are_tokens: bool) -> str:
    """Return a grammar in llguidance's own format."""
    from llguidance import LLMatcher

    if grammar.kind == "tool_calls":
        tools = ToolGrammar.read(grammar.text)
        return LLMatcher.grammar_from_lark(tools.lark(_JSON, tags_are_tokens))

    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.text, _JSON)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    # One terminal, which becomes a regular expression. Thousands of rules would break a limit.
    texts = [quoted(text) for text in json.loads(grammar.text)]
    return LLMatcher.grammar_from_lark(f"start: TEXT\nTEXT: {' | '.join(texts)}")
