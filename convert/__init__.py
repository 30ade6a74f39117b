"""Converts a Hugging Face directory or a GGUF file, once, into an Orbax checkpoint that opens straight into shards.

The way back leads to a Hugging Face directory.
`python -m convert --help` shows the command; `stream.convert` is the same thing as a function.
"""
