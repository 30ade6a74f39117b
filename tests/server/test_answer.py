"""Numbers of tokens in answers."""

from easyspec_jax.decode.stats import Stats
from easyspec_jax.engine.completion import Completion
from easyspec_jax.server.answer import usage


def test_a_prompt_and_what_was_cached_of_it_count_once():
    """Each of two prompts is answered twice, and the second answer finds most of it cached."""
    completions = [
        Completion("a", [1] * 60, [1] * 5, "b", "stop", Stats(cached_tokens=cached), [])
        for cached in (0, 50, 8, 50)
    ]
    assert usage(completions, n=2) == {
        "prompt_tokens": 120,
        "completion_tokens": 20,
        "total_tokens": 140,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
