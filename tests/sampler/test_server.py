"""vLLM as a server of its own: a real one on the CPU. `make test-vllm` runs these."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from sampler.environment import ENVIRONMENT, save_model

from trl_opsd.trainer.checkpoints import is_complete


pytest.importorskip("vllm", reason="`make test-vllm` runs these in an environment with vLLM")

CONTEXT = 512


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "base"
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(base):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (base.parent / "server.log").open("w")
    arguments = ["--model", str(base), "--port", str(port), "--dtype", "float32", "--max_model_len", str(CONTEXT)]
    command = [sys.executable, "-m", "trl.scripts.vllm_serve", *arguments, "--enforce_eager", "true"]
    process = psutil.Popen(command, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, Path(log.name).read_text()[-5000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield url, process
    finally:
        for child in [*process.children(recursive=True), process]:
            child.kill()


def train(base, folder, num_processes=1, **job):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if num_processes == 2 else []
    done = subprocess.run(
        [
            sys.executable,
            *launcher,
            str(Path(__file__).with_name("train_on_server.py")),
            *(str(base), str(folder), json.dumps(job)),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == num_processes
    return json.loads(lines[0].removeprefix("RESULT "))


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
@pytest.mark.parametrize("support", ["teacher_top_k", "sampled_token"])
def test_live_teacher_is_scored_with_the_current_weights(support, base, server, tmp_path):
    settings = sampling_on(server[0]) | scoring_on(server[0]) | {"teacher": "live", "divergence_support": support}
    result = train(base, tmp_path, num_processes=2, lora=True, settings=settings)

    assert result["world"] == 2
    assert max(result["sampler"]) < 1e-4  # with the weights of a step ago, above 1
    assert len(result["served"]) == 4
    assert max(result["served"]) < 1e-3


@pytest.mark.slow
def test_stalled_server_ends_the_run_with_a_checkpoint(base, server, tmp_path):
    url, process = server
    pids = [child.pid for child in [process, *process.children(recursive=True)]]
    settings = sampling_on(url) | {"vllm_server_request_timeout": 5.0}
    try:
        stalled = train(base, tmp_path, lora=True, signal=[signal.SIGSTOP, pids], settings=settings)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    assert len(stalled["losses"]) == 2
    assert url in stalled["error"]
    assert str(tmp_path / "checkpoint-2") in stalled["error"]
    resumed = train(base, tmp_path, lora=True, resume=True, settings=settings)
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
    pids = [child.pid for child in [process, *process.children(recursive=True)]]
    killed = train(base, tmp_path, num_processes=2, signal=[signal.SIGKILL, pids], settings=sampling_on(url))

    assert killed["world"] == 2
    assert len(killed["losses"]) == 2
    assert "Connection refused" in killed["error"]
    assert is_complete(tmp_path / "checkpoint-2")
    refused = train(base, tmp_path, settings=scoring_on(url) | {"teacher": "external", "vllm_server_timeout": 3.0})
    assert "within 3 seconds" in refused["refused"]
