"""Sets of XLA's options that may make a round faster, and the round compiled with them."""

from collections.abc import Callable, Mapping
from typing import Any

from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import State

Options = Mapping[str, str | bool | int]
"""Options of XLA, by name, as `compile(compiler_options=...)` takes them."""

_KERNELS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"

CANDIDATES: dict[str, dict[str, Options]] = {
    "gpu": {
        # A command buffer (a CUDA graph) launches many kernels at once. Draft steps are a loop,
        # which by default ends one.
        "no command buffers": {"xla_gpu_enable_command_buffer": ""},
        "command buffers, loops too": {
            "xla_gpu_enable_command_buffer": f"{_KERNELS},WHILE,CONDITIONAL",
            "xla_gpu_graph_min_graph_size": 1,
        },
        "command buffers, loops unrolled": {
            "xla_gpu_enable_command_buffer": f"{_KERNELS},WHILE,CONDITIONAL",
            "xla_gpu_graph_min_graph_size": 1,
            "xla_gpu_command_buffer_unroll_loops": True,
        },
        "command buffers, concurrent": {
            "xla_gpu_enable_command_buffer": f"{_KERNELS},WHILE,CONDITIONAL",
            "xla_gpu_graph_min_graph_size": 1,
            "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
        },
        "cuBLAS alone": {"xla_gpu_enable_triton_gemm": False},
        "Triton for all products": {
            "xla_gpu_triton_gemm_any": True,
            "xla_gpu_cublas_fallback": False,
        },
        "no autotuning": {"xla_gpu_autotune_level": 0},
        "cuBLASLt": {"xla_gpu_enable_cublaslt": True},
        "latency hiding": {"xla_gpu_enable_latency_hiding_scheduler": True},
    },
    "cpu": {"wide vectors": {"xla_cpu_prefer_vector_width": 512}},
}
"""By JAX's name of the platform and a name for people. XLA refuses names that it does not know."""


def candidates(platform: str) -> Mapping[str, Options]:
    """Return the sets of options to try on a platform, by name; the default is not among them."""
    return CANDIDATES.get(platform, {})


def compiled_round(programs: Programs, state: State, options: Options) -> Callable[[State], State]:
    """Compile the round for states of one shape with options of XLA's.

    Args:
        programs: Programs of the pair.
        state: A state of that shape, which is not run.
        options: The options.

    Returns:
        A step for a Case.

    Raises:
        jax.errors.JaxRuntimeError: XLA does not take these options.
    """
    jitted: Any = programs.compiled.round  # declared as a mere callable
    compiled = jitted.lower(programs.leaves, state).compile(compiler_options=dict(options))
    return lambda state: compiled(programs.leaves, state)[0]
