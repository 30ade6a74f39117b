"""Questions and answers are lines as Spec-Bench has them."""

import pytest

from easyspec_jax import EasySpecError
from experiments.lib.pair import DATA
from experiments.lib.questions import code_questions, read_questions


def test_our_own_questions_are_of_six_categories():
    questions = read_questions(DATA / "questions.jsonl")
    assert len({question.category for question in questions}) == 6
    assert len({question.question_id for question in questions}) == len(questions)


def test_code_is_asked_one_turn_at_a_time():
    assert [(q.question_id, q.turns) for q in code_questions(["a", "b"])] == [
        (1, ("a",)),
        (2, ("b",)),
    ]


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(EasySpecError, match=r"--questions .*absent\.jsonl cannot be read"):
        read_questions(tmp_path / "absent.jsonl")
