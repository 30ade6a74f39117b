"""Every text is searched with every corpus, equally often."""

import json

from experiments.bench import bench_lookup


def test_every_pair_is_timed(tmp_path, capsys):
    out = tmp_path / "lookup.json"
    words = ["--texts", "64", "128", "--corpora", "256", "--repeats", "3", "--out", str(out)]
    assert bench_lookup.main(words) == 0
    rows = json.loads(out.read_text())["results"]
    cells = [(row["text"], row["corpus"], len(row["seconds"])) for row in rows]
    assert cells == [(64, 0, 3), (64, 256, 3), (128, 0, 3), (128, 256, 3)]
    assert all(seconds > 0 for row in rows for seconds in row["seconds"])
    assert "corpus of 256" in capsys.readouterr().out
