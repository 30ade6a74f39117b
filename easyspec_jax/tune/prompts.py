"""What acceptance is measured on where the user gives no prompts."""

CODE = (
    "def read_lines(path, encoding=",
    "class Stack:\n    def __init__(self",
    "import os, sys, argparse\n\ndef main(",
    "def test_equal(self):\n        self.assert",
    "    for key, value in sorted(",
    "try:\n    import json\nexcept ImportError",
)
"""For the bundled pair, which completes Python."""

QUESTIONS = (
    "Why is the sky blue?",
    "Write a Python function that counts the vowels in a string.",
    "A train covers 180 km in two hours and a quarter. How fast is it? Think step by step.",
    "Give me three tips for sleeping well.",
    "Summarise the story of Little Red Riding Hood in a few sentences.",
    "Translate into Spanish: the library opens at nine in the morning.",
)
