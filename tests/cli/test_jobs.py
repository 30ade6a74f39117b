"""Batch jobs: every line once, whatever happened before; refilled rows are what they are alone."""

import io
import json
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.cli.jobs import check_results, open_results, read_job, run_job
from easyspec_jax.decode import refill
from easyspec_jax.decode.loop import Batch
from easyspec_jax.decode.programs import Programs
from easyspec_jax.generate import main
from easyspec_jax.options import Method
from tests.support.models import add_refit, save_model

PLAIN = SamplingParams(max_new_tokens=10)
POISON = "~"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target, and a copy that has no embedding for one letter but NaNs."""
    directory, poisoned = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("poisoned")
    save_model(directory, "llama3", vocab_size=260, eos_token_id=3)
    model = save_model(poisoned, "llama3", vocab_size=260, eos_token_id=3)
    tokenizer = open_model(directory, speculative=SpeculativeConfig(method="vanilla")).tokenizer
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer(POISON).input_ids[-1]] = np.nan
    model.save_pretrained(poisoned)
    return directory, poisoned


def engine_of(target, draft, method: Method = "easyspec", refit="none"):
    speculative = SpeculativeConfig(method=method, num_speculative_tokens=3, lp_size=3, refit=refit)
    return open_model(target, draft, speculative=speculative)


@pytest.fixture(scope="module")
def engine(models):
    return engine_of(models[0], models[0])


def check_refilled_rows(models, method: Method = "easyspec", refit="none"):
    """More texts than rows, each with its own length and sampling; one prompt exceeds a chunk."""
    engine = engine_of(models[0], models[0], method, refit)
    wanted = [
        ("x" * size, SamplingParams(temperature=0.5 + size / 100, seed=size, max_new_tokens=limit))
        for size, limit in ((1, 3), (150, 9), (20, 30), (7, 1), (40, 12), (3, 20))
    ]
    rows = (engine.row(*pair) for pair in wanted)
    found = dict(engine.complete_each(rows, 2))
    assert sorted(found) == list(range(6))
    for number, (prompt, sampling) in enumerate(wanted):
        (alone,) = engine.generate([prompt], sampling)
        assert (found[number].token_ids, found[number].finish_reason) == (
            alone.token_ids,
            alone.finish_reason,
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "vanilla",
        pytest.param("sd", marks=pytest.mark.exhaustive),
        pytest.param("tree", marks=pytest.mark.exhaustive),
        "easyspec",
    ],
)
def test_refilled_rows_are_what_they_are_alone(models, method):
    check_refilled_rows(models, method)


@pytest.mark.exhaustive
def test_refilled_rows_are_what_they_are_alone_with_a_refit(models, tmp_path):
    check_refilled_rows(models, refit=add_refit(models[0], 3, tmp_path, noise=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["target", "draft"])
def test_a_poisoned_model_ends_its_row_and_is_named(models, engine, which):
    sick = engine_of(models[which == "target"], models[which == "draft"])
    prompts = [
        "first",
        "x" * 137 + POISON,
        "third",
        "fourth",
    ]  # nobody's prefill reaches as far
    # One row at a time too: what a poisoned text leaves in the caches must not reach the next.
    for batch_size in (1, 2):
        found = dict(
            sick.complete_each((sick.row(prompt, PLAIN) for prompt in prompts), batch_size)
        )
        assert found[1].finish_reason == "error"
        assert found[1].error is not None
        assert f"the {which} {models[1]} " in found[1].error
        assert len(found[1].token_ids) == (which == "draft")  # prefill's is the target's own
        for number in (0, 2, 3):
            (alone,) = engine.generate([prompts[number]], PLAIN)
            assert found[number].token_ids == alone.token_ids


@pytest.mark.slow
def test_a_row_entered_with_its_old_caches_would_be_found(models, engine, monkeypatch):
    monkeypatch.setattr(
        refill, "jnp", SimpleNamespace(**vars(jnp) | {"where": lambda first, fresh, old: old})
    )
    with pytest.raises(AssertionError):
        test_a_poisoned_model_ends_its_row_and_is_named(models, engine, "target")


def test_a_report_of_the_text_before_would_be_found(models, monkeypatch):
    """Planted: the row is another text's, but what is unread of the last one counts as its own."""

    def step(self):
        for unread in self._unread:
            unread.texts[:] = self._text[unread.rows]
        return right(self)

    right = Batch.step
    monkeypatch.setattr(Batch, "step", step)
    with pytest.raises((AssertionError, IndexError)):  # other tokens, or the end before the first
        check_refilled_rows(models)


@pytest.mark.slow
def test_a_row_entered_with_the_noise_of_another_would_be_found(models, monkeypatch):
    right = Programs.enter_target
    monkeypatch.setattr(
        Programs,
        "enter_target",
        lambda self, state, row, prompt, limit, sampling, start: right(
            self, state, row, prompt, limit, SamplingParams(temperature=sampling.temperature), start
        ),
    )
    with pytest.raises(AssertionError):
        check_refilled_rows(models)


LINES = [
    {"id": "a", "prompt": "one"},
    {"id": 2, "messages": [{"role": "user", "content": "no template"}]},
    {"id": "c", "prompt": "three", "temperature": 0.8, "max_new_tokens": 4},
    {"id": "a", "prompt": "again"},
    {"id": "e", "prompt": "five", "seed": 7, "stop": ["q"], "top_p": 0.9, "temperature": 1},
    {"id": "f", "prompt": ""},
]


@pytest.fixture
def job(tmp_path):
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(
        "\n".join([*map(json.dumps, LINES), "{torn", "", json.dumps({"id": "i", "prompt": "nine"})])
    )
    return prompts, tmp_path / "out.jsonl"


def records(content: bytes) -> list:
    """In order of lines, without timings."""
    found = [json.loads(line) for line in content.splitlines()]
    for record in found:
        for name in ("prefill_seconds", "decode_seconds", "tokens_per_second"):
            record.get("stats", {}).pop(name, None)
    return sorted(found, key=lambda record: record["line"])


@pytest.mark.slow
def test_a_job_goes_on_from_wherever_it_was_cut(engine, job):
    prompts, out = job
    assert run_job(engine, read_job(prompts, PLAIN), out, batch_size=2) == (8, 4)
    whole = out.read_bytes()
    expected = records(whole)
    assert [record["line"] for record in expected] == [1, 2, 3, 4, 5, 6, 7, 9]
    assert [record["line"] for record in expected if "error" in record] == [2, 4, 6, 7]
    for cut in [*range(0, len(whole), 97), len(whole) - 1, len(whole)]:
        out.write_bytes(whole[:cut])
        assert run_job(engine, read_job(prompts, PLAIN), out, batch_size=2) == (8, 4)
        assert records(out.read_bytes()) == expected
        kept = whole[: whole[:cut].rfind(b"\n") + 1]
        assert out.read_bytes().startswith(kept)


@pytest.mark.slow
def test_a_job_prefills_what_its_lines_share_once(models, tmp_path):
    """With the same texts, and it may go on with another store."""
    prompts, shared = tmp_path / "in.jsonl", "the same beginning of every line, "
    lines = [{"id": end, "prompt": shared + end} for end in ("one", "two", "three", "four")]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    command = ["--target", str(models[0]), "--method", "vanilla", "--max-new-tokens", "9"]
    command += ["--prompts", str(prompts), "--batch-size", "2"]
    found = []
    for size in ("0", "16MiB"):
        out = tmp_path / f"{size}.jsonl"
        assert main([*command, "--out", str(out), "--prefix-cache", size]) == 0
        found.append(records(out.read_bytes()))
    texts = [[record["token_ids"] for record in records] for records in found]
    assert texts[0] == texts[1]
    cached = [[record["stats"]["cached_tokens"] for record in records] for records in found]
    assert cached[0] == [0] * 4
    assert cached[1][0] == 0 and min(cached[1][1:]) >= len(shared)
    # Cut after the first line, it goes on without a store.
    out.write_bytes(out.read_bytes().splitlines(keepends=True)[0])
    assert main([*command, "--out", str(out)]) == 0
    assert [record["token_ids"] for record in records(out.read_bytes())] == texts[0]


def test_another_jobs_output_is_refused(engine, job):
    prompts, out = job
    out.write_bytes(b"somebody's\n")
    with pytest.raises(EasySpecError, match=r"is not empty and has no out\.jsonl\.job"):
        run_job(engine, read_job(prompts, PLAIN), out)
    out.unlink()
    with open_results(out, {}):
        pass
    out.write_bytes(b"somebody's\n")
    with (
        pytest.raises(EasySpecError, match="does not begin with a job's record"),
        open_results(out, {}),
    ):
        pass
    assert out.read_bytes() == b"somebody's\n"
    out.write_bytes(b"")
    with (
        open_results(out, {}),
        pytest.raises(EasySpecError, match="another run"),
        open_results(out, {}),
    ):
        pass
    with (
        pytest.raises(EasySpecError, match="other prompts or settings"),
        open_results(out, {"other": 1}),
    ):
        pass


def test_files_that_cannot_be_used_are_named(engine, job, tmp_path):
    prompts, _ = job
    with pytest.raises(EasySpecError, match=r"--prompts .*absent cannot be read: No such file"):
        read_job(tmp_path / "absent", PLAIN)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(EasySpecError, match=r"--prompts .*empty holds no prompt"):
        read_job(tmp_path / "empty", PLAIN)
    with pytest.raises(EasySpecError, match=r"--out .*out\.jsonl cannot be written: No such file"):
        run_job(engine, read_job(prompts, PLAIN), tmp_path / "absent" / "out.jsonl")


def test_a_poisoned_model_ends_the_command_with_one_line(models, capsys):
    sick = str(models[1])
    assert (
        main(
            [
                "--target",
                sick,
                "--method",
                "vanilla",
                "--prompt",
                "bad" + POISON,
                "--max-new-tokens",
                "2",
            ]
        )
        == 2
    )
    complaint = capsys.readouterr().err
    assert complaint.count("error: ") == 1 and f"the target {sick} " in complaint


def test_several_processes_run_no_job(capsys):
    assert main(["--prompts", "in.jsonl", "--out", "out.jsonl", "--distributed"]) == 2
    assert "--distributed runs no jobs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--prompts", "in.jsonl"], "--prompts FILE and --out FILE go together"),
        (["--out", "out.jsonl"], "--prompts FILE and --out FILE go together"),
        (
            ["--prompts", "in.jsonl", "--out", "out.jsonl", "--json"],
            "a job prints no texts: leave out --json or --prompts",
        ),
        (
            ["--prompts", "in.jsonl", "--out", "out.jsonl", "--batch-size", "0"],
            "--batch-size 0 must be at least 1",
        ),
        (["--chat", "--system", ""], "--system '' is empty; leave it out"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(flags, complaint, capsys):
    assert main(flags) == 2
    assert capsys.readouterr().err.splitlines() == [f"easyspec_jax.generate: error: {complaint}"]


HOSTILE: list[str] = [
    '{"id": ID, "messages": [{"role": "user", "content": "hi", "weight": {"a": [1, null]}}], '
    '"tools": "f"}',
    '{"id": ID, "messages": [{"role": "assistant", "content": null}]}',
    '{"id": ID, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    '{"id": ID, "messages": [[["user"]]]}',
    '{"id": ID, "messages": [{"role": "user", "content": "x", "n": NaN}, 5]}',
    '{"id": ID, "prompt": "a\\ud800b"}',
    '{"id": ID, "prompt": ""}',
    '{"id": ID, "prompt": ["a", "b"]}',
    '{"id": ID, "prompt": {"text": "a"}}',
    '{"id": ID, "prompt": "a", "stop": ["", "b"]}',
    '{"id": ID, "prompt": "a", "stop": {"a": 1}}',
    '{"id": ID, "prompt": "a", "seed": 1e3}',
    '{"id": ID, "prompt": "a", "temperature": NaN}',
    '{"id": ID, "prompt": "a", "temperature": 1' + "0" * 400 + "}",
    '{"id": ID, "prompt": "a", "top_p": -Infinity}',
    '{"id": ID, "prompt": "a", "top_k": 99999999999}',
    '{"id": ID, "prompt": "a", "max_tokens": 0}',
    '{"id": ID, "prompt": "a", "max_tokens": true}',
    '{"id": ID, "prompt": "a", "stop_token_ids": [[1]]}',
    '{"id": ID, "prompt": "a", "logprobs": true}',
    '{"id": ID, "prompt": "a", "body": [1]}',
    '{"id": ID, "prompt": "a", "messages": [{"role": "user", "content": "b"}]}',
    '{"id": ID, "prompt": "' + "long " * 9000 + '"}',
    '{"id": ID, "messages": [{"role": "fail", "content": "b"}]}',
    '{"id": ID, "messages": [{"role": "user", "content": "b", "deep": '
    + "[" * 500
    + "]" * 500
    + "}]}",
    '{"id": ID}',
]
"""Lines that ask for what cannot be, or in which nothing is of the type that one expects."""


def test_no_line_ends_a_job(models, tmp_path, capsys):
    """200 lines, every fourth hostile: a record for each under its id, and exit 1, twice."""
    directory = tmp_path / "model"
    shutil.copytree(models[0], directory)
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'fail' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}"
        "{% if m.deep %}{{ m.deep | tojson }}{% endif %}{% endfor %}"
    )
    lines = []
    for number in range(1, 201):
        hostile = HOSTILE[number // 4 % len(HOSTILE)].replace("ID", str(number))
        lines.append(
            hostile if number % 4 == 0 else json.dumps({"id": number, "prompt": f"line {number}"})
        )
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    flags = [
        "--target",
        str(directory),
        "--method",
        "vanilla",
        "--max-new-tokens",
        "3",
        "--batch-size",
        "8",
    ]
    command = [
        *flags,
        "--prompts",
        str(tmp_path / "in.jsonl"),
        "--out",
        str(tmp_path / "out.jsonl"),
    ]
    for _ in range(2):
        assert main(command) == 1
        found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert sorted((record["line"], record["id"]) for record in found) == [
            (n, n) for n in range(1, 201)
        ]
        # One line asks for a deep value, which is strange but no error.
        assert sum("error" in record for record in found if record["line"] % 4 == 0) >= 48
        assert not any("error" in record for record in found if record["line"] % 4)
    assert "200 lines" in capsys.readouterr().err


def test_a_line_that_would_not_fit_costs_only_itself(engine, tmp_path, monkeypatch):
    """Whatever is free later: other programs come and go."""
    answers = iter([16 << 20, *[1000] * 99])
    monkeypatch.setattr(engine, "free_memory", lambda: next(answers))
    lines = [
        {"id": n, "prompt": "a", "max_new_tokens": limit} for n, limit in enumerate((4, 1000, 4))
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out.jsonl"
    assert run_job(engine, read_job(tmp_path / "in.jsonl", PLAIN), out, batch_size=8) == (3, 1)
    errors = {record["id"]: record.get("error", "") for record in records(out.read_bytes())}
    assert "memory" in errors[1] and not errors[0] and not errors[2]


def test_closed_standard_input_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(EasySpecError, match="--prompts - cannot be read: Bad file descriptor"):
        read_job("-", PLAIN)


def test_outputs_are_looked_at_before_a_model_is_opened(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "easyspec_jax.cli.generate.open_engine", lambda *arguments: pytest.fail("it was opened")
    )
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"id": 1, "prompt": "a"}))
    out.write_text("something else\n")
    for path, complaint in (
        (out, "is not empty and has no out.jsonl.job that describes a job; choose another --out"),
        (tmp_path / "absent" / "out.jsonl", "cannot be written: No such file"),
        (tmp_path, "is a directory"),
    ):
        assert main(["--prompts", str(prompts), "--out", str(path)]) == 2
        assert complaint in capsys.readouterr().err
    assert main(["--prompts", str(tmp_path / "absent"), "--out", str(tmp_path / "new")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    with open_results(tmp_path / "new", {}), pytest.raises(EasySpecError, match="another run"):
        check_results(tmp_path / "new", {})


def test_another_schema_in_the_same_file_is_another_job(tmp_path, monkeypatch, capsys):
    class Opened(Exception):
        pass

    def opened(*arguments):
        raise Opened

    monkeypatch.setattr("easyspec_jax.cli.generate.open_engine", opened)
    prompts, out, schema = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "schema.json"))
    prompts.write_text(json.dumps({"id": 1, "prompt": "a"}))
    command = ["--prompts", str(prompts), "--out", str(out), "--json-schema", str(schema)]
    described = []
    monkeypatch.setattr(
        "easyspec_jax.cli.jobs.check_results", lambda _, settings: described.append(settings)
    )
    for kind in ("string", "string", "number"):
        schema.write_text(json.dumps({"type": kind}))
        with pytest.raises(Opened):
            main(command)
    assert described[0] == described[1] != described[2]


def test_a_job_out_of_standard_input(engine, tmp_path, monkeypatch):
    content = json.dumps({"id": 1, "prompt": "a"}).encode()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert run_job(engine, read_job("-", PLAIN), tmp_path / "out.jsonl") == (1, 0)


def test_fields_that_are_not_used_are_named_once(engine, tmp_path):
    lines = [{"id": n, "prompt": "a", "category": "x", f"own_{n}": 1} for n in range(7)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    notes: list[str] = []
    run_job(
        engine, read_job(tmp_path / "in.jsonl", PLAIN), tmp_path / "out.jsonl", note=notes.append
    )
    assert notes == ["fields that are not used: 'category', 'own_0', 'own_1', 'own_2', 'own_3', …"]


def test_whatever_a_line_provokes_is_its_own_error(engine, tmp_path, monkeypatch):
    """A fault of a library that nobody thought of."""
    encode = engine.row

    def fragile(prompt, *arguments, **options):
        if prompt == "b":
            raise ZeroDivisionError("by nothing")
        return encode(prompt, *arguments, **options)

    monkeypatch.setattr(engine, "row", fragile)
    lines = [{"id": n, "prompt": prompt} for n, prompt in enumerate("abc")]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run_job(engine, read_job(tmp_path / "in.jsonl", PLAIN), tmp_path / "out.jsonl") == (3, 1)
    (error,) = [
        record for record in records((tmp_path / "out.jsonl").read_bytes()) if "error" in record
    ]
    assert error["id"] == 1
    assert error["error"].startswith("line 2: cannot be used (ZeroDivisionError: ")


def test_a_line_with_several_texts_has_one_record(engine, tmp_path):
    """The first of them is that of a line without n; lines of other options share its programs."""
    line = {"prompt": "a", "temperature": 0.9, "seed": 3, "max_new_tokens": 6}
    lines = [
        {"id": 0, **line},
        {"id": 1, **line, "n": 3},
        {"id": 2, **line, "logit_bias": {"50": 100}},
        {"id": 3, **line, "logit_bias": {"99999": 1}},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    job, out = read_job(tmp_path / "in.jsonl", PLAIN), tmp_path / "out.jsonl"
    assert run_job(engine, job, out, batch_size=2) == (4, 1)
    found = {record["id"]: record for record in records(out.read_bytes())}
    texts = [sample["token_ids"] for sample in found[1]["samples"]]
    assert len(texts) == 3
    assert texts[0] == found[0]["token_ids"]
    assert len(set(map(tuple, texts))) > 1
    assert found[2]["token_ids"] == [50] * 6
    assert "`logit_bias` names id 99999" in found[3]["error"]
