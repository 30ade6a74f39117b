"""Fused GPU kernels, in Pallas and lowered by Triton: arrays in, arrays out.

Each has a plain counterpart in `easyspec_jax.model`, which defines the result and serves the shapes
that a kernel does not support. Pallas' interpreter runs them on a CPU, for tests.
"""
