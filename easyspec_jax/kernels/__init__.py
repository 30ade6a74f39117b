"""Fused GPU kernels, in Pallas and lowered by Triton: arrays in, arrays out.

Each has a plain counterpart in `easyspec_jax.model`, which defines the result, and a `supports`
function that says which shapes it takes. Pallas' interpreter runs them on a CPU, for tests.
"""
