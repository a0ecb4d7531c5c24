"""A probe that samples with vLLM: a real engine on the CPU, beside transformers. `make test-vllm` runs this."""

import json

import pytest
import yaml
from sampler.environment import SETTINGS, run_script, save_model

from trl_opsd.probe.measure import read_records


pytest.importorskip("vllm", reason="`make test-vllm` runs these in an environment with vLLM")

ARMS = ["student", "teacher", "none", "other_solution", "shuffled_solution"]


@pytest.mark.slow
def test_every_arm_is_sampled_by_the_engine(tmp_path):
    save_model(tmp_path / "base")
    rows = [
        {"prompt": f"{n}+{n}=", "solution": f"Take {n} and {n}.\nThen they are {2 * n}.", "answer": str(2 * n)}
        for n in range(10)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = SETTINGS | {"model_name_or_path": str(tmp_path / "base"), "dataset_name": str(tmp_path / "rows.jsonl")}
    # As good as greedy, and the least that vLLM takes
    settings |= {"temperature": 0.01, "distillation_temperature": 1.0}
    settings |= {"vllm_mode": "colocate", "vllm_max_model_length": 1024, "vllm_gpu_memory_utilization": 0.1}
    (tmp_path / "opsd.yaml").write_text(yaml.safe_dump(settings))

    def probe(name, *flags):
        where = "--probe_dir", str(tmp_path / name)
        calls = run_script("probe.py", str(tmp_path / "opsd.yaml"), *where, *flags)
        records = {
            (record["row"], record["arm"]): record for record in read_records(tmp_path / name / "records.jsonl")
        }
        return calls, records, json.loads((tmp_path / name / "probe.json").read_text())

    calls, records, result = probe("vllm", "--use_vllm", "true")
    _, expected, _ = probe("transformers")
    assert set(result["arms"]) == set(ARMS)
    assert result["settings"]["use_vllm"] is True
    # All rows of an arm in one call
    assert [len(call["prompts"]) for call in calls] == [10] * 5
    assert {call["sampling"]["max_tokens"] for call in calls} == {16}
    written = {key: record["completions"][0]["token_ids"] for key, record in records.items()}
    for arm, call in zip(ARMS, calls, strict=True):
        assert [written[row, arm] for row in range(10)] == call["completions"]
    same = [written[key] == record["completions"][0]["token_ids"] for key, record in expected.items()]
    assert sum(same) > 0.9 * len(same)
    for key in written:
        if (
            key[1] != "student"
            and written[key[0], "student"] == expected[key[0], "student"]["completions"][0]["token_ids"]
        ):
            found, other = (its[key]["scores"][0]["divergence"] for its in (records, expected))
            assert found == pytest.approx(other, rel=1e-2, abs=1e-4)
