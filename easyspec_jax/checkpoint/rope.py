"""Frequencies of the rotary position embedding (RoPE)."""

import math

import numpy as np

from easyspec_jax.checkpoint.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Return the rotation of each pair of channels, in radians per position.

    Llama 3's scaling is applied if the configuration asks for it.

    Returns:
        float32 [head_dim / 2], from fast to slow.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is not None:
        frequencies = _llama3_scaled(frequencies, config.rope_scaling)
    return frequencies.astype(np.float32)


def _llama3_scaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Slow down the low frequencies by the factor (the model card of Llama 3.1)."""
    # `rotations` counts full turns within the original context. Below low_freq_factor turns a
    # frequency is divided by the factor, above high_freq_factor it is kept, and between the two
    # the results are blended linearly.
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    band = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((rotations - scaling.low_freq_factor) / band, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)
