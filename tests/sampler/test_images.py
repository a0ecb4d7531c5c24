"""vLLM reads images: a real engine on the CPU, in the process and as a server. `make test-vllm` runs these."""

import json

import pytest
from sampler import environment
from sampler.environment import TORCHVISION, run_script


pytest.importorskip("vllm", reason="`make test-vllm` runs these in an environment with vLLM")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def base(request, tmp_path_factory):
    """Folder of a tiny model and its processor."""
    folder = tmp_path_factory.mktemp("images") / "base"
    run_script("train_on_images.py", "save", str(folder), request.param, path=TORCHVISION)
    return str(folder)


def train(base, folder, **job):
    result = run_script("train_on_images.py", base, str(folder), json.dumps(job), path=TORCHVISION)

    assert len(result["differences"]) == len(result["trained"]) == 4
    assert result["trained"] == result["sampled"]
    return result


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_engine_reads_images_with_the_trainers_weights(weights, base, tmp_path):
    result = train(base, tmp_path, weights=weights)

    assert 0 < max(result["differences"]) < 1e-3
    assert min(result["loads"]) == max(result["loads"]) > 40  # those of the vision tower too, in each call


@pytest.mark.slow
def test_server_reads_images_with_the_trainers_weights(base, tmp_path):
    settings = ["--dtype", "float32", "--max_model_len", "1024", "--enforce_eager", "true"]
    serve = "trl.scripts.vllm_serve", "--model", base, *settings
    with environment.server(tmp_path / "server.log", *serve, path=TORCHVISION) as (url, _):
        result = train(base, tmp_path, weights="full", url=url)

    assert 0 < max(result["differences"]) < 1e-3
