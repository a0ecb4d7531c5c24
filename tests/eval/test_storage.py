import json
from dataclasses import asdict

import pytest
from eval.made import make_sample

from trl_opsd.eval.storage import read_samples


def test_read(tmp_path):
    samples = [make_sample("a", completion="one\u2028two\nthree"), make_sample("b", correct=None)]
    lines = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    (tmp_path / "samples.jsonl").write_text(lines, encoding="utf-8")
    assert read_samples(tmp_path / "samples.jsonl") == samples


def test_torn_last_line(tmp_path, caplog):
    line = json.dumps(asdict(make_sample()))
    (tmp_path / "samples.jsonl").write_text(f"{line}\n{line[:30]}")
    assert read_samples(tmp_path / "samples.jsonl") == [make_sample()]
    assert "1 line, the last, was cut off" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: missing or unknown fields answer"),
        (json.dumps({**asdict(make_sample()), "score": 1}), "line 2: missing or unknown fields score"),
    ],
)
def test_bad_line(tmp_path, line, message):
    good = json.dumps(asdict(make_sample()))
    (tmp_path / "samples.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=message):
        read_samples(tmp_path / "samples.jsonl")
