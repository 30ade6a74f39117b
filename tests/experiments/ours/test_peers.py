"""Engines take turns and their texts are compared; an engine that cannot run says why."""

import json

import numpy as np
import pytest

from experiments.ours.peer_engines import Missing, Peer, open_peers
from experiments.ours.peers import PLAIN, alternate, main, rows_of
from tests.support.models import save_model

PROMPTS = [[5, 6], [7, 8]]
QUESTIONS = [
    {"question_id": 1, "category": "qa", "turns": ["a fox"]},
    {"question_id": 2, "category": "qa", "turns": ["and a dog"]},
]


class Fake:
    """Continues every prompt by one text, advancing its own clock by that many seconds."""

    def __init__(self, name, text, seconds, log):
        self.name, self.text, self.seconds, self.log = name, text, seconds, log

    def __call__(self, prompt):
        self.log.append((self.name, tuple(prompt), self.seconds))
        return self.text


def alternated(repeats=2):
    log = []
    ways = {"a": Fake("a", [1, 2, 3, 4], 2.0, log), "b": Fake("b", [1, 2, 9, 4], 1.0, log)}
    measured = alternate(ways, PROMPTS, repeats, clock=lambda: sum(seconds for *_, seconds in log))
    return measured, log


def test_ways_take_turns_and_the_first_time_is_not_timed():
    measured, log = alternated()
    assert [name for name, *_ in log] == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert all(prompt == (5, 6) for _, prompt, _ in log[:2])
    assert measured["a"].seconds == [[2.0, 2.0]] * 2
    assert measured["b"].seconds == [[1.0, 1.0]] * 2


def test_texts_are_compared_with_the_first_way():
    measured, _ = alternated()
    logits = np.arange(10, dtype=np.float32)
    first, second = rows_of(measured, PROMPTS, lambda ids: logits)
    assert (first["over_plain"], first["identical"], first["divergences"]) == ([1.0, 1.0], 1.0, [])
    assert second["tokens_per_second"] == [4.0, 4.0] and second["over_plain"] == [2.0, 2.0]
    assert second["identical"] == 0.5
    assert second["divergences"] == [
        {"prompt": number, "place": 2, "logit_gap": 6.0} for number in range(2)
    ]


def test_absent_engines_say_why():
    peer = Peer(lambda prompt: [], "1.0")

    def absent(task):
        raise Missing("not installed")

    assert open_peers(None, {"here": lambda task: {"way": peer}, "there": absent}) == (  # pyright: ignore[reportArgumentType]
        {"way": peer},
        {"there": "not installed"},
    )


def test_transformers_completes_the_same_texts(tmp_path):
    pytest.importorskip("matplotlib")
    save_model(tmp_path / "model", "llama3")
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    model, out = str(tmp_path / "model"), tmp_path / "peers.json"
    assert (
        main(
            [
                "--target",
                model,
                "--draft",
                model,
                "--questions",
                str(tmp_path / "questions.jsonl"),
                "--platform",
                "cpu",
                "--lp-size",
                "3",
                "--num-speculative-tokens",
                "2",
                "--max-new-tokens",
                "8",
                "--repeats",
                "1",
                "--engines",
                "transformers",
                "vLLM",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    rows = {row["name"]: row for row in json.loads(out.read_text())["results"]}
    for name in (PLAIN, "sd", "easyspec, N = 3", "transformers", "transformers, assisted"):
        assert rows[name]["identical"] == 1 and rows[name]["divergences"] == []
    assert "llama.cpp" not in rows
    assert rows["vLLM"]["missing"] == "compared on GPUs alone"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_draft_file_needs_a_target_file(tmp_path, capsys):
    (tmp_path / "draft.gguf").touch()
    assert main(["--gguf-draft", str(tmp_path / "draft.gguf")]) == 2
    assert "--gguf-draft drafts for the file of --gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--gguf", "absent.gguf"], "--gguf absent.gguf is not a file"),
        (["--gguf-draft", "absent.gguf"], "--gguf-draft absent.gguf is not a file"),
        (["--engines", "sglang"], "invalid choice: 'sglang'"),
        (["--out", "absent/peers.json"], "--out absent/peers.json must be a .json file"),
    ],
)
def test_bad_arguments_are_one_line(arguments, complaint, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
