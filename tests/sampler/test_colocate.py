"""vLLM beside the trainer, in its processes: a real engine on the CPU. `make test-vllm` runs these."""

import json

import pytest
from sampler.environment import run_script, save_model

from trl_opsd.eval.run_folder import read_samples


pytest.importorskip("vllm", reason="`make test-vllm` runs these in an environment with vLLM")

MEAN, MAX = "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"


def train(folder, weights, dtype, zero3=False, **settings):
    if not (folder / "base").exists():
        save_model(folder / "base", dtype)
    job = str(folder), weights, dtype, json.dumps(settings)
    result = run_script("train.py", *job, num_processes=2 if zero3 else 1, recipe="zero3" if zero3 else None)

    assert result["world"] == ([2, 3] if zero3 else [1, None])
    assert result["share"] == (pytest.approx(0.5, abs=0.02) if zero3 else 1.0)
    return result


def assert_same_weights(result):
    """The sampler's and the trainer's: with those of a step ago, the mean would be above 1."""
    assert len(result[MAX]) == 4
    assert 0 < max(result[MAX]) < 1e-3
    assert result["changed"] == []
    assert len(result["loads"]) >= 4
    assert min(result["loads"]) == max(result["loads"]) > 20  # all of them in each call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "zero3", "settings"),
    [
        ("lora", True, {}),
        ("full", False, {"teacher": "periodic", "teacher_update_steps": 2}),
        ("full", False, {"vllm_importance_sampling_correction": True}),
    ],
    ids=["lora-zero3", "full-periodic", "full-corrected"],
)
def test_sampler_has_the_trainers_weights(weights, zero3, settings, tmp_path):
    result = train(tmp_path, weights, "float32", zero3, **settings)

    assert_same_weights(result)
    for ratio in result["ratios"] if "vllm_importance_sampling_correction" in settings else []:
        assert ratio == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
def test_benchmarks_are_sampled_as_they_say_and_rollouts_as_before(tmp_path):
    result = train(
        tmp_path,
        "lora",
        "float32",
        teacher="ema",
        temperature=0.7,
        generation_kwargs={"seed": 3},
        evaluation={
            "benchmarks": ["playground_opsd"],
            "steps": 2,
            "limit": 6,
            "sampling": {"temperature": 0.0, "max_new_tokens": 24},
        },
    )

    assert_same_weights(result)
    rest = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    rollouts = {"temperature": 0.7, "max_tokens": 16, "seed": 3, **rest}
    benchmarks = {"temperature": 0.0, "max_tokens": 24, "seed": None, **rest}
    sampled = [call["sampling"] for call in result["calls"]]
    assert sampled == [benchmarks, rollouts, rollouts, benchmarks, rollouts, rollouts, benchmarks]
    first, last = result["calls"][0], result["calls"][-1]
    assert last["completions"] == result["expected"]
    assert last["completions"] != first["completions"]
    samples = read_samples(tmp_path / "run" / "eval" / "step-4" / "playground_opsd" / "samples.jsonl")
    assert [sample.num_tokens for sample in samples] == [len(ids) for ids in result["expected"]]


@pytest.mark.slow
def test_rollouts_follow_from_the_seed_in_a_resumed_run_too(tmp_path):
    same = {"shuffle_dataset": False, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path, "lora", "float32", **same, seed=1)
    resumed = train(tmp_path, "lora", "float32", **same, seed=1, resume=str(tmp_path / "run" / "checkpoint-2"))
    other = train(tmp_path, "lora", "float32", **same, seed=2, max_steps=1)

    assert len(whole["calls"]) == 4
    assert resumed["calls"] == whole["calls"][2:]
    assert resumed["loss"] == whole["loss"]
    assert other["calls"][0]["prompts"] == whole["calls"][0]["prompts"]
    assert other["calls"][0]["completions"] != whole["calls"][0]["completions"]


@pytest.mark.slow
def test_base_stays_bit_identical_in_bf16_over_300_syncs(tmp_path):
    result = train(tmp_path, "lora", "bfloat16")

    assert result["frozen"] > 10
    assert result["changed"] == []
    assert max(result[MEAN]) < 0.05
