"""Rotary position embedding: the frequency of each pair of channels."""

import math

import numpy as np

from easyspec_jax.checkpoint.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair of channels, float32 [head_dim / 2], with Llama 3's scaling applied."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is not None:
        frequencies = _llama3_scaled(frequencies, config.rope_scaling)
    return frequencies.astype(np.float32)


def _llama3_scaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Slow low frequencies by the factor, keep high ones, blend linearly in between (Llama 3.1's model card)."""
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (rotations - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    keep = np.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)
