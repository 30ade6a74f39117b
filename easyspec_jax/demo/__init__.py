"""The bundled demo pair: a target and a draft that complete Python code.

README.md in this directory is the model card.
"""

from pathlib import Path

TARGET = Path(__file__).parent / "target"
DRAFT = Path(__file__).parent / "draft"

PROMPT = '''\
def read_config(filename):
    """Read a configuration file and return a dictionary."""
    with open(filename) as'''
"""The prompt to complete when the user gives none."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' and not loop.first %}\n{% endif %}{{ message.content }}"
    "{% endfor %}"
)
"""A chat template for the pair, which was not trained to chat: answers continue what was typed."""
