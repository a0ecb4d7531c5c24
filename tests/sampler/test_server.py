"""vLLM as a server of its own: a real one on the CPU. `make test-vllm` runs these."""

import json
import os
import signal
from contextlib import ExitStack

import pytest
from sampler import environment
from sampler.environment import save_model

from trl_opsd.trainer.checkpoints import is_complete


pytest.importorskip("vllm", reason="`make test-vllm` runs these in an environment with vLLM")

CONTEXT = 512


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "base"
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def servers():
    with ExitStack() as running:
        yield running, []


@pytest.fixture
def server(base, servers):
    """Address and process of the server that all tests share. One that a test has killed is started again."""
    running, started = servers
    if started and started[-1][1].poll() is None:
        return started[-1]
    started.append(running.enter_context(serve(base, base.parent / f"server{len(started)}.log")))
    return started[-1]


def serve(base, log, *more):
    arguments = [
        "--model",
        str(base),
        "--dtype",
        "float32",
        "--max_model_len",
        str(CONTEXT),
        "--enforce_eager",
        "true",
        *more,
    ]
    return environment.server(log, "trl.scripts.vllm_serve", *arguments)


def train(base, folder, num_processes=1, **job):
    arguments = str(base), str(folder), json.dumps(job)
    return environment.run_script("train_on_server.py", *arguments, num_processes=num_processes)


def sampling_on(url):
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url}


def scoring_on(url):
    return {"teacher_server_base_url": url, "divergence_support": "teacher_top_k", "divergence_top_k": 5}


@pytest.mark.slow
def test_model_served_elsewhere_scores_like_the_same_model_here(base, server, tmp_path):
    result = train(base, tmp_path, settings=scoring_on(server[0]) | {"teacher": "external"})

    assert len(result["losses"]) == len(result["served"]) == 4
    assert max(result["served"]) < 1e-4
    assert "teacher_entropy" not in result["metrics"]


@pytest.mark.slow
def test_one_of_several_teachers_is_served(base, server, tmp_path):
    scoring = scoring_on(server[0])
    served = {"teacher": "external", "teacher_server_base_url": scoring.pop("teacher_server_base_url")}
    teachers = {"served": served, "own": {"teacher": "initial"}}
    result = train(base, tmp_path, settings=scoring | {"teacher": "several", "teachers": teachers})

    assert len(result["losses"]) == len(result["served"]) == 4
    assert max(result["served"]) < 1e-4
    assert {f"teachers/{name}/distillation_loss" for name in teachers} <= set(result["metrics"])


@pytest.mark.slow
@pytest.mark.parametrize("support", ["teacher_top_k", "sampled_token"])
def test_live_teacher_is_scored_with_the_current_weights(support, base, server, tmp_path):
    settings = sampling_on(server[0]) | scoring_on(server[0]) | {"teacher": "live", "divergence_support": support}
    result = train(base, tmp_path, num_processes=2, lora=8, settings=settings)

    assert result["world"] == 2
    assert max(result["sampler"]) < 1e-4  # with the weights of a step ago, above 1
    assert len(result["served"]) == 4
    assert max(result["served"]) < 1e-3


@pytest.mark.slow
def test_stalled_server_ends_the_run_with_a_checkpoint(base, server, tmp_path):
    url, process = server
    settings = sampling_on(url) | {"vllm_server_request_timeout": 20.0}
    try:
        stalled = train(base, tmp_path, lora=8, signal=[signal.SIGSTOP, process.pid], settings=settings)
    finally:
        os.killpg(process.pid, signal.SIGCONT)

    assert len(stalled["losses"]) == 2
    assert url in stalled["error"]
    assert str(tmp_path / "checkpoint-2") in stalled["error"]
    # The server answers what it was asked meanwhile first
    resumed = train(base, tmp_path, lora=8, resume=True, settings=sampling_on(url))
    assert "error" not in resumed
    assert resumed["losses"][:2] == stalled["losses"]
    assert len(resumed["losses"]) == 4
    assert max(resumed["sampler"]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        ({}, {"max_completion_length": CONTEXT}, f"context of {CONTEXT} tokens is too short for prompts of up to 17"),
        ({"hidden_size": 32}, {}, "its `hidden_size` is 64, not 32"),
    ],
    ids=["context", "model"],
)
def test_unfit_server_is_refused(overrides, settings, message, base, server, tmp_path):
    save_model(tmp_path / "policy", **overrides)
    result = train(tmp_path / "policy", tmp_path, settings=sampling_on(server[0]) | settings)
    assert message in result["refused"]


@pytest.mark.slow
def test_dead_server_ends_the_run_on_every_process(base, server, tmp_path):
    url, process = server
    job = {"signal": [signal.SIGKILL, process.pid], "settings": sampling_on(url)}
    killed = train(base, tmp_path, num_processes=2, **job)

    assert killed["world"] == 2
    assert len(killed["losses"]) == 2
    assert "Connection refused" in killed["error"]
    assert is_complete(tmp_path / "checkpoint-2")
    refused = train(base, tmp_path, settings=scoring_on(url) | {"teacher": "external", "vllm_server_timeout": 3.0})
    assert "within 3 seconds" in refused["refused"]


@pytest.mark.slow
def test_server_samples_alike_with_the_adapter_merged_or_alone(base, tmp_path):
    with serve(base, tmp_path / "server.log", "--enable-lora") as (url, _):
        settings = sampling_on(url) | {"generation_kwargs": {"seed": 3}}
        alone, merged = (
            train(base, tmp_path / how, lora=8, settings=settings | {"vllm_lora_sync": how})
            for how in ("adapter", "merged")
        )

    assert (alone["sent"], merged["sent"]) == ("its adapter alone", "all weights, its adapter merged")
    assert len(alone["completions"]) == 4
    assert alone["completions"] == merged["completions"]
    assert alone["losses"] == pytest.approx(merged["losses"], rel=1e-3)
    assert max(alone["sampler"] + merged["sampler"]) < 1e-4  # with the weights of a step ago, above 1
