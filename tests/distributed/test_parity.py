"""Two processes train as one does, however the model is sharded: same losses, same weights, same teacher."""

import subprocess

import pytest
import torch
from distributed.launch import ENVIRONMENT, TIMEOUT, command, job, launch, with_deepspeed
from distributed.resume import BETWEEN, assert_resumed, pair


STEPS = 8
JOBS = [
    job("opsd", "lora", max_steps=STEPS, loss_type="dapo"),
    job("opsd", "full", max_steps=STEPS, teacher="ema", teacher_update_rate=0.2),
    job("opsdc", "full", max_steps=STEPS, teacher_update_steps=3),
    job("opsdc", "lora", max_steps=STEPS, teacher_update_steps=3),
]
EMA, INITIAL = {"teacher": "ema", "teacher_update_rate": 0.2}, {"teacher": "initial"}
# Two rollouts of a prompt share its teacher prompt. In some steps, one process would need one pass for its two rows,
# and the other two passes.
BUDGET = job(
    "opsd",
    "full",
    name="budget",
    rows=8,
    shuffle=False,
    gradient_accumulation_steps=2,
    max_steps=4,
    num_generations=2,
    max_tokens_per_microbatch=896,
)
ACCUMULATION = job(
    "opsd",
    "full",
    name="accumulation",
    shuffle=False,
    gradient_accumulation_steps=2,
    steps_per_generation=4,
    gradient_checkpointing=True,
    max_steps=4,
)
# Most prompts of the second half are too long for their teacher, so that a process may have no row with a context
MASKED = {
    "max_steps": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 2,
    "max_tokens_per_microbatch": 896,
    "max_teacher_prompt_length": 444,
    "overlong_teacher_prompt": "skip",
}
COMPOSED = [
    job("opsd", "full", name="masked", rows=8, shuffle=False, **MASKED),
    job("opsd", "full", name="composed-masked", rows=8, shuffle=False, policy_loss_coef=0.5, **MASKED),
    job("opsd", "lora", name="composed", max_steps=4, num_generations=2, policy_loss_coef=0.5, beta=0.1),
]
# Without padding. In some steps, one process would need one pass for its two rows, and the other two passes.
PACKED = job(
    "opsd",
    "lora",
    name="packed",
    rows=8,
    shuffle=False,
    packed=True,
    gradient_accumulation_steps=2,
    max_steps=4,
    num_generations=2,
    max_tokens_per_microbatch=896,
)
CHECKPOINTING = job("opsd", "lora", name="checkpointing", max_steps=4, gradient_checkpointing=True)
# The rollouts of a prompt lie on both processes
PEERS = job(
    "opsd",
    "full",
    name="peers",
    max_steps=4,
    num_generations=4,
    policy_loss_coef=0.5,
    privileged_context="peers",
    context_kwargs={"wrong": 1},
)
PLANS = job(
    "opsd",
    "lora",
    name="plans",
    max_steps=4,
    privileged_context="plan",
    context_kwargs={"max_new_tokens": 12, "temperature": 0.0},
)
# Of two processes, one has all the wrong rollouts
RETRIES = job("opsd", "full", name="retries", max_steps=4, completions="hinted_retry", top_k=1)
# Each of two processes has the rows of one teacher
SEVERAL = [
    job("opsd", "full", name="several", max_steps=4, teacher="several", teachers={"maths": EMA, "code": INITIAL}),
    job(
        "opsd",
        "lora",
        name="several-lora",
        max_steps=4,
        max_tokens_per_microbatch=500,
        teacher="several",
        teachers={"maths": EMA, "code": INITIAL, "chat": {"teacher": "live"}},
    ),
]
# In some steps, one process has no images: with DDP alone. With the others, every row has some
IMAGES = job("opsd", "full", name="images", images="some", max_steps=4, max_tokens_per_microbatch=500)
ALL_IMAGES = job("opsd", "lora", name="all-images", images="all", max_steps=4, max_tokens_per_microbatch=500)
VARIANTS = [
    RETRIES,
    ALL_IMAGES,
    *SEVERAL,
    BUDGET,
    PEERS,
    PLANS,
    PACKED,
    ACCUMULATION,
    CHECKPOINTING,
    *COMPOSED,
    job(
        "opsd",
        "full",
        name="benchmarks",
        max_steps=4,
        per_device_eval_batch_size=2,
        evaluation={
            "benchmarks": ["playground_opsdc"],
            "steps": 2,
            "limit": 5,
            "sampling": {"temperature": 0.0, "max_new_tokens": 12},
        },
    ),
    job("opsd", "full", name="iterations", max_steps=4, num_iterations=2, teacher="ema", teacher_update_rate=0.2),
]
GREEDY = {"max_new_tokens": 8, "temperature": 0.0}
# For want of answers, rollouts agree by their length
LENGTHS = {"answer_of": "builtins.len", "same_answer": "operator.eq"}
NEAREST = {"completions_kwargs": {"temperature": 0.0, "num_candidates": 1}}
# In every step, one process has no row with a context, or nothing to try again
METHODS = [
    job("rlrt", "full", max_steps=4, rows=8, num_generations=4),
    # The paper's scale would blow up rounding
    job(
        "rlcsd",
        "full",
        max_steps=4,
        rows=8,
        num_generations=4,
        teacher_update_steps=2,
        advantage_kwargs={"scale": 1.0},
    ),
    job(
        "trace",
        "full",
        max_steps=4,
        rows=8,
        num_generations=4,
        warmup_steps=0,
        context_kwargs={"annotator": "methods.stand_ins.decisive", "most_of_it": 0.5},
        schedules={
            "divergence_coef": {"start": 0.5, "end": 0.0, "num_steps": 3},
            "advantage.share": {"start": 0.0, "end": 1.0, "num_steps": 3},
        },
    ),
    job(
        "resd",
        "full",
        max_steps=4,
        warmup_steps=0,
        teacher_update_rate=0.2,
        context_kwargs={"max_new_tokens": 8, "temperature": 0.0},
    ),
    job("sdpo", "full", max_steps=4, rows=8, num_generations=4, warmup_steps=0),
    job("sc_sdpo", "full", max_steps=4, rows=8, num_generations=4, warmup_steps=0),
    job("ssopd", "full", max_steps=4, rows=8, num_generations=4),
    job("mopd", "full", max_steps=4, rows=8, num_generations=4, warmup_steps=0),
    job(
        "antisd",
        "full",
        max_steps=4,
        rows=8,
        num_generations=4,
        schedules={"advantage.strength": {"kind": "hysteresis", "value": 0.5, "warmup_steps": 1}},
    ),
    job(
        "antisd_code",
        "full",
        max_steps=4,
        rows=8,
        num_generations=4,
        advantage_kwargs={"warmup_steps": 1, "most_perplexity": 1e6},
    ),
    # Half of the problems have a success, and come again
    job(
        "rlrt",
        "full",
        name="curriculum",
        max_steps=4,
        rows=8,
        num_generations=4,
        curriculum="pass_rate",
        shuffle_dataset=True,
    ),
    job("sort", "full", max_steps=4, num_generations=4, max_completion_length=24, top_k=1, context_kwargs=GREEDY),
    job("cipo", "full", max_steps=4, num_generations=2),
    job("drift", "full", max_steps=4, rows=8, num_generations=4, warmup_steps=0),
    job("drift_code", "full", max_steps=4, rows=8, num_generations=4, warmup_steps=0),
    job("u_opsd", "full", max_steps=4, num_generations=4, context_kwargs=LENGTHS),
    job("rlsd", "full", max_steps=4, rows=8, num_generations=4),
    job("purified_opsd", "full", max_steps=4),
    job("sdft", "full", max_steps=4),
    job("pbsd", "full", rows=6, max_steps=4, top_k=1),  # with a pair on both processes
    job(
        "vpd",
        "full",
        rows=8,
        num_generations=4,
        token_weights={"trl_opsd.methods.vpd.EStep": {"every": 2}},
        max_steps=4,
    ),
    job("brts", "full", rows=6, max_steps=4, top_k=1, teacher="initial", privileged_context="solution", **NEAREST),
    job("correct_only", "full", max_steps=4, context_kwargs={"max_new_tokens": 8}),
    job("star", "full", max_steps=4, top_k=1),
    job("cl_egrsd", "full", max_steps=4, advantage_kwargs={"lookahead": 3, "warmup_steps": 1}),
    job("msd", "full", max_steps=4, context_kwargs={"template": "{prompt} {solution}"}),
    job("sdpg", "lora", max_steps=4, rows=8, num_generations=4, divergence_coef=0.5, beta=0.1, warmup_steps=0),
    job("rethinking_opd_code", "full", max_steps=4, num_generations=1),
    job("stable_opd", "lora", max_steps=4, rows=8, completions_kwargs={"column": "answer"}, beta=0.1, top_k=1),
    job("vopd", "full", max_steps=4),
]
OFFLOADED = job("opsd", "full", name="offloaded", max_steps=4, teacher_offload=True)
ZERO1 = [with_deepspeed(job, "zero1", zero_stage=1) for job in (JOBS[1], BUDGET, ACCUMULATION, CHECKPOINTING)]
# Offloading the optimizer turns SGD into Adam. This epsilon keeps its steps for gradients that are almost zero small
ADAM = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 0.01, "adam_epsilon": 0.01}
ON_CPU = [
    job("opsd", "full", name="adam-ema", teacher="ema", teacher_update_rate=0.2, **ADAM),
    job("opsdc", "full", name="adam-periodic", teacher_update_steps=2, **ADAM),
    job("opsd", "lora", name="adam-lora", gradient_checkpointing=True, **ADAM),
]
# An average in bf16 would not move at this rate
BF16 = job("opsd", "full", name="bf16", max_steps=2, teacher="ema", teacher_update_rate=0.01, bf16=True)
OFFLOAD = [
    with_deepspeed(job, "offload", offload_optimizer_device="cpu", offload_param_device="cpu") for job in ON_CPU
]
RESUMED = [*pair("full", "between-full", **BETWEEN), *pair("lora", "between-lora", **BETWEEN)]
SPLIT = [
    {**job, "name": f"split-{job['name']}", "settings": {**job["settings"], "gradient_accumulation_steps": 4}}
    for job in JOBS
]


@pytest.fixture(scope="session")
def one_process(tmp_path_factory):
    jobs = [*JOBS, *SPLIT, *VARIANTS, *METHODS, *ON_CPU, OFFLOADED, IMAGES]
    found = launch("single", jobs, tmp_path_factory.mktemp("parity") / "single")
    assert all(result["world"] == [1, "NO"] for result in found.values())
    return found


METRICS = ("loss", "distillation_loss", "likelihood_loss", "entropy", "num_generated_tokens", "context_rate")
METRICS += ("teacher_prompts/max_length", "completions/retry_rate", "completions/off_policy_rate", "preference/loss")
METRICS += ("replaced_distillation_loss", "completions/tier_2_rate", "e_step/loss")
METRICS += ("teachers/maths/distillation_loss", "teachers/code/distillation_loss", "teachers/code/token_rate")
# Whose micro-batches take more than one pass
CUT = ("budget", "packed", "masked", "composed-masked", "several-lora", "images", "all-images")


def assert_same(found, expected, metrics=METRICS):
    for name in metrics:
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    for side in ("student", "teacher", "merged"):
        assert found[side].keys() == expected[side].keys()
        for name, value in expected[side].items():
            torch.testing.assert_close(found[side][name], value, rtol=1e-5, atol=1e-5, msg=f"{side}: {name}")


# ZeRO's stage, the optimizer it runs, and whether parameters are offloaded
DEEPSPEED = {
    "zero1": [1, "SGD", False],
    "zero2": [2, "SGD", False],
    "zero3": [3, "SGD", False],
    "offload": [3, "DeepSpeedCPUAdam", True],
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("backend", "world", "jobs", "resumed"),
    [
        ("ddp", "MULTI_CPU", [*JOBS, *VARIANTS, *METHODS, OFFLOADED, IMAGES], RESUMED),
        ("zero2", "DEEPSPEED", [*JOBS, *VARIANTS, *ZERO1, BF16], []),
        ("zero3", "DEEPSPEED", [*JOBS, *VARIANTS, *METHODS, *OFFLOAD, BF16], []),
        ("fsdp2", "FSDP", [*JOBS, *VARIANTS, BF16], RESUMED),
    ],
    ids=["ddp", "zero2", "zero3", "fsdp2"],
)
def test_two_processes_equal_one(backend, world, jobs, resumed, one_process, tmp_path):
    found = launch(backend, [*jobs, *resumed], tmp_path / backend)

    share = pytest.approx(0.5, abs=0.02) if backend in ("zero3", "fsdp2") else 1.0
    share_updated = 1.0 if backend == "ddp" else pytest.approx(0.5, abs=0.02)
    for result in found.values():
        assert result["world"] == [2, world]
        for student, teacher, updated in result["shares"]:
            assert student == share
            assert teacher == share
            assert updated == share_updated
    for full_name in (run["name"] for run in jobs):
        *prefix, name = full_name.split(":")
        result = found[full_name]
        assert result["deepspeed"] == DEEPSPEED.get(prefix[0] if prefix else backend)
        first_rank, second_rank = result["num_passes"]
        assert first_rank == second_rank
        assert (max(first_rank) > 1) == (name in CUT)
        assert (result["num_units"] > 1) == (backend == "fsdp2")
        for key, value in result["average"].items():
            torch.testing.assert_close(result["teacher"][key].double(), value, rtol=0, atol=1e-6, msg=key)
        if name == "bf16":  # rounds differently on two processes
            assert result["average"]
            continue
        assert_same(result, one_process[name])
        assert result["benchmarks"] == one_process[name]["benchmarks"]
        if name in ("retries", "star-full"):
            assert result["completions/retry_rate"] == [0.5] * 4
            assert result["completions/off_policy_rate"] == [0.5] * 4
        assert len(result["benchmarks"]) == (3 if name == "benchmarks" else 0)
    for name in (run["name"] for run in resumed if run["resume"] is None):
        assert_resumed(found, name)


@pytest.mark.slow
@pytest.mark.distributed
def test_micro_batches_equal_one_batch(one_process):
    for name in (run["name"] for run in JOBS):
        split = one_process[f"split-{name}"]
        assert len(split["num_passes"][0]) == 4 * STEPS
        assert_same(split, one_process[name])


@pytest.mark.distributed
def test_processes_that_accelerate_does_not_start_are_missed(tmp_path):
    run = command("MULTI_CPU", JOBS[:1], tmp_path)
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode != 0
    assert "was asked for several processes (`num_processes`) and started one" in done.stderr
