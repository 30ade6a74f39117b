"""The engine: a pair of models opened and checked, and prompts turned into completions."""
