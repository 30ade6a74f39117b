"""Checkpoints: open and check directories, read tensors by byte range, describe model families."""
