"""Layer-parallel speculative decoding on JAX."""
