"""Prompts to measure acceptance on where the user gives none."""

CODE = (
    "def read_lines(path, encoding='utf-8'):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os, sys, argparse\n\ndef main(argv=None):\n",
    "class TestList(unittest.TestCase):\n    def test_append(self):\n",
)
"""For the bundled pair, which completes Python."""

QUESTIONS = (
    "Why is the sky blue?",
    "Write a Python function that counts the vowels in a string.",
    "A train covers 180 km in two hours and a quarter. How fast is it? Think step by step.",
    "Give me five tips for sleeping well.",
)
