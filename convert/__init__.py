"""Conversion of Hugging Face directories and GGUF files into Orbax checkpoints, and back.

A model is converted once; the result opens straight into the shards of any mesh. Any checkpoint can
also be exported as a Hugging Face directory. `python -m convert --help` describes the command;
`stream.convert` is the function.
"""
