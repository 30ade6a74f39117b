"""Checkpoints: directories opened and checked, tensors read by byte range, configurations and families."""
