"""Questions and answers as Spec-Bench's JSON lines (https://github.com/hemingkx/Spec-Bench)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyspec_jax import EasySpecError
from easyspec_jax.engine.completion import Completion


@dataclass(frozen=True)
class Question:
    """The messages of a user, turn by turn."""

    question_id: int
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """The completions of a question's turns.

    Attributes:
        seconds: From each prompt to the end of its text.
    """

    question: Question
    turns: tuple[Completion, ...]
    seconds: tuple[float, ...]

    @property
    def text(self) -> list[str]:
        return [turn.text.strip() for turn in self.turns]

    def as_dict(self, model_id: str, time: float) -> dict[str, Any]:
        """Return a line of an answer file; accept lengths are tokens a round."""
        choice = {
            "index": 0,
            "turns": self.text,
            "decoding_steps": [len(turn.tokens_per_round) for turn in self.turns],
            "new_tokens": [len(turn.token_ids) for turn in self.turns],
            "wall_time": list(self.seconds),
            "accept_lengths": [tokens for turn in self.turns for tokens in turn.tokens_per_round],
        }
        return {
            "question_id": self.question.question_id,
            "category": self.question.category,
            "answer_id": f"{model_id}-{self.question.question_id}",
            "model_id": model_id,
            "choices": [choice],
            "tstamp": time,
        }


def read_questions(path: Path) -> list[Question]:
    """Read every line of a question file.

    Raises:
        EasySpecError: The file cannot be read, or a line (which the message names) is not a
            question.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EasySpecError(f"--questions {path} cannot be read: {error}") from None
    found = [
        _question(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise EasySpecError(f"--questions {path} has no questions")
    return found


def code_questions(prompts: Sequence[str]) -> list[Question]:
    """Turn beginnings of programs into questions, for a model without a chat template."""
    return [Question(number, "code", (prompt,)) for number, prompt in enumerate(prompts, 1)]


def _question(line: str, place: str) -> Question:
    try:
        fields = json.loads(line)
        question = Question(fields["question_id"], fields["category"], tuple(fields["turns"]))
        is_list = isinstance(fields["turns"], list)
    except (ValueError, TypeError, KeyError) as error:
        raise EasySpecError(f"{place} is not a question in Spec-Bench's form: {error!r}") from None
    are_texts = all(isinstance(turn, str) and turn for turn in question.turns)
    if not (is_list and question.turns and are_texts):
        raise EasySpecError(f'{place}: "turns" must be a list of texts')
    if not isinstance(question.category, str):
        raise EasySpecError(f'{place}: "category" must be a text')
    return question
