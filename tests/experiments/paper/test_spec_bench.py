"""Questions and answers have Spec-Bench's form, and the summary is what the answers say."""

import json

import numpy as np
import pytest

from experiments import draw
from experiments.paper.spec_bench import OVERALL, main
from tests.support.models import save_model

QUESTIONS = [
    {"question_id": 7, "category": "qa", "turns": ["a fox", "and a dog"]},
    {
        "question_id": 9,
        "category": "rag",
        "turns": ["a much shorter fox"],
        "reference": ["ignored"],
    },
]


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """The directory of answers to two questions, by a tiny model that drafts for itself."""
    pytest.importorskip("matplotlib")
    directory = tmp_path_factory.mktemp("spec_bench")
    save_model(directory / "model", "smollm2")
    (directory / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    model = str(directory / "model")
    assert (
        main(
            [
                "--target",
                model,
                "--draft",
                model,
                "--questions",
                str(directory / "questions.jsonl"),
                "--lp-size",
                "2",
                "--max-new-tokens",
                "12",
                "--answers",
                str(directory / "answers.jsonl"),
                "--out",
                str(directory / "spec_bench.json"),
            ]
        )
        == 0
    )
    return directory


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_have_the_form_of_spec_bench(answered):
    ours, plain = lines(answered / "answers.jsonl"), lines(answered / "answers-plain.jsonl")
    for question, one, other in zip(QUESTIONS, ours, plain, strict=True):
        assert list(one) == [
            "question_id",
            "category",
            "answer_id",
            "model_id",
            "choices",
            "tstamp",
        ]
        assert (one["question_id"], one["category"]) == (
            question["question_id"],
            question["category"],
        )
        (choice,), (plainly,) = one["choices"], other["choices"]
        assert choice["turns"] == plainly["turns"] and len(choice["turns"]) == len(
            question["turns"]
        )
        assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])
        assert len(choice["accept_lengths"]) < len(plainly["accept_lengths"])
        assert set(plainly["accept_lengths"]) == {1}
        for answer in (choice, plainly):  # a turn's first token belongs to no step
            assert sum(answer["new_tokens"]) == sum(answer["accept_lengths"]) + len(answer["turns"])
            assert min(answer["wall_time"]) > 0


def test_the_table_is_what_the_answers_say(answered):
    rows = json.loads((answered / "spec_bench.json").read_text())["results"]
    assert [row["category"] for row in rows] == ["qa", "rag", OVERALL]
    choices = [line["choices"][0] for line in lines(answered / "answers.jsonl")]
    speeds = [sum(choice["new_tokens"]) / sum(choice["wall_time"]) for choice in choices]
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([*speeds, np.mean(speeds)])
    assert rows[-1]["same"] == rows[-1]["questions"] == 2
    assert rows[-1]["largest_logit_gap"] is None
    accepted = np.mean([length for choice in choices for length in choice["accept_lengths"]])
    assert (
        rows[-1]["mean_acceptance_length"] >= accepted
    )  # which leaves out what lies past the limit


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{}", "line 1 is not a question"),
        ('\n{"question_id": 1, "category": "qa", "turns": []}', 'line 2: "turns" must be'),
        ('{"question_id": 1, "category": 3, "turns": ["a"]}', 'line 1: "category" must be'),
        ("nothing", "line 1 is not a question"),
        ("[]", "line 1 is not a question"),
        ("", "has no questions"),
    ],
)
def test_bad_questions_are_one_line(content, complaint, tmp_path, capsys):
    (tmp_path / "questions.jsonl").write_text(content)
    assert (
        main(
            ["--questions", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "out.json")]
        )
        == 2
    )
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1


def test_answers_need_a_place(tmp_path, capsys):
    assert (
        main(["--out", str(tmp_path / "out.json"), "--answers", str(tmp_path / "answers.json")])
        == 2
    )
    assert "must be a .jsonl file" in capsys.readouterr().err


def test_the_same_figures_are_the_same_picture(answered):
    out, again = answered / "spec_bench.json", answered / "again.png"
    assert draw.main([str(out), "--out", str(again)]) == 0
    assert again.read_bytes() == out.with_suffix(".png").read_bytes()
