"""vLLM beside the trainer, in its processes: a real engine on the CPU. `make test-vllm` runs these."""

import json

import pytest
from sampler.environment import run_script, save_model
from tiny import make_tokenizer

from trl_opsd.eval.run_folder import read_samples


pytest.importorskip("vllm", reason="`make test-vllm` runs these in an environment with vLLM")

TOKENIZER = make_tokenizer()
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


def text_of(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


REFLECTION = {
    "privileged_context": "reflection",
    "context_kwargs": {"column": "solution", "max_new_tokens": 24, "temperature": 0.5},
}


def assert_reflects(result):
    """The engine reflects on the rollouts it has just sampled, as the context says, and the teacher reads that."""
    rollouts, reflections = result["calls"][::2], result["calls"][1::2]
    assert len(rollouts) == len(reflections) == len(result["batches"]) == 4
    for sampled, reflected, batch in zip(rollouts, reflections, result["batches"], strict=True):
        assert (sampled["sampling"]["temperature"], sampled["sampling"]["max_tokens"]) == (1.0, 16)
        assert (reflected["sampling"]["temperature"], reflected["sampling"]["max_tokens"]) == (0.5, 24)
        assert sampled["completions"] == batch["completions"]
        for attempt, question, reflection, read in zip(
            sampled["completions"],
            reflected["prompts"],
            reflected["completions"],
            batch["teacher_prompts"],
            strict=True,
        ):
            assert text_of(attempt) in text_of(question)
            assert text_of(reflection).strip() in text_of(read)
            assert len(reflection) <= 24


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "zero3", "settings"),
    [
        ("lora", True, {}),
        ("full", False, {"teacher": "periodic", "teacher_update_steps": 2, **REFLECTION}),
        ("full", False, {"vllm_importance_sampling_correction": True}),
    ],
    ids=["lora-zero3", "full-periodic", "full-corrected"],
)
def test_sampler_has_the_trainers_weights(weights, zero3, settings, tmp_path):
    result = train(tmp_path, weights, "float32", zero3, **settings)

    assert_same_weights(result)
    if "privileged_context" in settings:
        assert_reflects(result)
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
# On a CPU, layers of 4 bits compute in bf16 once they have been in evaluation mode, the engine in fp32
@pytest.mark.parametrize(("weights", "sync", "limit"), [("pissa", "adapter", 1e-3), ("4bit", "auto", 0.1)])
def test_adapter_alone_makes_the_policy_of_the_engines_base(weights, sync, limit, tmp_path):
    greedy = {"temperature": 0.0, "max_new_tokens": 24}
    evaluation = {"benchmarks": ["playground_opsd"], "steps": 4, "limit": 6, "sampling": greedy}
    result = train(tmp_path, weights, "float32", vllm_lora_sync=sync, evaluation=evaluation)

    assert result["sent"] == "its adapter alone"
    assert result["loads"] == []  # the base was sent before
    assert len(result[MAX]) == 4
    assert 0 < max(result[MAX]) < limit  # with the weights of a step ago, above 1
    assert result["changed"] == []
    assert weights == "4bit" or result["calls"][-1]["completions"] == result["expected"]
    assert result["calls"][-1]["completions"] != result["calls"][0]["completions"]


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
def test_engine_retries_and_its_probabilities_weigh_the_tokens(tmp_path):
    result = train(
        tmp_path,
        "full",
        "float32",
        reward="right_at_last",
        completions="hinted_retry",
        token_weights={"importance_clip": {}},
        max_completion_length=12,
    )

    assert_same_weights(result)
    calls, num_right = iter(result["calls"]), 0
    for batch in result["batches"]:
        sampled = next(calls)
        numbers = [int(text_of(prompt).split()[2]) for prompt in sampled["prompts"]]
        wrong = [row for row, number in enumerate(numbers) if number % 2 == 0]
        retried = next(calls) if wrong else {"prompts": [], "completions": []}
        expected = list(sampled["completions"])
        for row, prompt, retry in zip(wrong, retried["prompts"], retried["completions"], strict=True):
            assert f"{numbers[row]}+{7 * numbers[row]}={8 * numbers[row]}" in text_of(prompt)
            if numbers[row] % 4 == 2:
                expected[row], num_right = retry, num_right + 1
        assert batch["completions"] == expected
    assert next(calls, None) is None
    assert num_right == 4
    known = [weight for pass_ in result["weights"] for weight in pass_["known"]]
    assert 0 < max(abs(weight - 1) for weight in known) < 1e-3  # off by a step, above 1
    assert {weight for pass_ in result["weights"] for weight in pass_["unknown"]} == {1.0}


@pytest.mark.slow
def test_rewards_are_shaped_by_scores_of_what_the_engine_sampled(tmp_path):
    result = train(
        tmp_path,
        "lora",
        "float32",
        method="rlrt",
        reward="every_other",
        num_generations=4,
        per_device_train_batch_size=8,
        num_iterations=2,  # with one, the loss gives the scores
        max_steps=8,
    )

    assert len(result["batches"]) == 4
    assert len(result["scores"]) > 100
    assert 0 < max(result["scores"]) < 1e-3
    for call, batch in zip(result["calls"], result["batches"], strict=True):
        assert batch["completions"] == call["completions"]
        assert all(batch["has_context"])
        for row, (ids, read, advantages) in enumerate(
            zip(batch["completions"], batch["teacher_prompts"], batch["advantages"], strict=True)
        ):
            group, is_right = row - row % 4, row % 2 == 1
            shown = group + 3 if row == group + 1 else group + 1  # the first right one that is not its own
            assert text_of(batch["completions"][shown]) in text_of(read)
            assert (len(set(advantages[: len(ids)])) > 1) == (is_right and len(ids) > 1)


@pytest.mark.slow
def test_base_stays_bit_identical_in_bf16_over_300_syncs(tmp_path):
    result = train(tmp_path, "lora", "bfloat16")

    assert result["frozen"] > 10
    assert result["changed"] == []
    assert max(result[MEAN]) < 0.05
