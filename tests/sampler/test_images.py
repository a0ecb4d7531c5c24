"""vLLM reads images: a real engine on the CPU, in the process and as a server. `make test-vllm` runs these."""

import json

import pytest
from sampler import environment
from sampler.environment import TORCHVISION, run_script


pytest.importorskip("vllm", reason="`make test-vllm` runs these in an environment with vLLM")

SENT = {"lora": "all weights, its adapter merged", "full": "all weights", "alone": "its adapter alone"}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def base(request, tmp_path_factory):
    """Folder of a tiny model and its processor."""
    folder = tmp_path_factory.mktemp("images") / "base"
    run_script("train_on_images.py", "save", str(folder), request.param, path=TORCHVISION)
    return str(folder)


def train(base, folder, num_processes=1, **job):
    arguments = base, str(folder), json.dumps(job)
    result = run_script("train_on_images.py", *arguments, num_processes=num_processes, path=TORCHVISION)

    assert result["world"] == num_processes
    assert len(result["differences"]) == 4
    assert len(result["trained"]) == 4 * num_processes
    assert result["trained"] == result["sampled"]
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "num_processes"), [("lora", 1), ("full", 2), ("alone", 1)])
def test_engine_reads_images_with_the_trainers_weights(weights, num_processes, base, tmp_path):
    result = train(base, tmp_path, num_processes, weights=weights)

    assert 0 < max(result["differences"]) < 1e-3
    assert result["sent"] == SENT[weights]
    if weights != "alone":
        assert min(result["loads"]) == max(result["loads"]) > 40  # those of the vision tower too, in each call


@pytest.mark.slow
def test_server_reads_images_with_the_trainers_weights(base, tmp_path):
    settings = ["--dtype", "float32", "--max_model_len", "1024", "--enforce_eager", "true"]
    serve = "trl.scripts.vllm_serve", "--model", base, *settings
    with environment.server(tmp_path / "server.log", *serve, path=TORCHVISION) as (url, _):
        result = train(base, tmp_path, weights="full", url=url)

    assert 0 < max(result["differences"]) < 1e-3
