"""Converts a Hugging Face directory or a GGUF file, once, into an Orbax checkpoint that opens straight into shards.

`python -m convert --help` shows the command; `stream.convert` is the same thing as a function.
"""

DTYPES = ("float32", "bfloat16", "float16")
"""What a checkpoint can be written as."""
