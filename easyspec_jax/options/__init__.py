"""Options of decoding: how to speculate, how to sample, on which platform and in which type.

Every value is checked when an option object is made. Messages name fields in backticks, which the
commands replace by their flags: `top_p` becomes --top-p.
"""

from easyspec_jax.options.checks import (
    check_choice,
    check_whole,
)
from easyspec_jax.options.sampling import (
    MAX_BAD_WORDS,
    MAX_GRAMMAR,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    Grammar,
    GrammarKind,
    SamplingParams,
)
from easyspec_jax.options.speculative import (
    MAX_LEVELS,
    MAX_LOOKUP,
    MAX_WIDTH,
    DraftTensorParallelSize,
    Method,
    SpeculativeConfig,
    Verifier,
    check_prefix_cache,
)
from easyspec_jax.options.types import (
    FLOAT_DTYPES,
    DType,
    KVDType,
    Platform,
    Weights,
    check_weights,
    resolve_dtype,
)

__all__ = [
    "FLOAT_DTYPES",
    "MAX_BAD_WORDS",
    "MAX_GRAMMAR",
    "MAX_LEVELS",
    "MAX_LOGPROBS",
    "MAX_LOOKUP",
    "MAX_STOP_TOKEN_IDS",
    "MAX_WIDTH",
    "DType",
    "DraftTensorParallelSize",
    "Grammar",
    "GrammarKind",
    "KVDType",
    "Method",
    "Platform",
    "SamplingParams",
    "SpeculativeConfig",
    "Verifier",
    "Weights",
    "check_choice",
    "check_prefix_cache",
    "check_weights",
    "check_whole",
    "resolve_dtype",
]
