"""The backends of an evaluation beside each other: vLLM in process, vLLM as a server, transformers."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from sampler import environment
from sampler.environment import run_script
from tiny import make_model, make_tokenizer

from trl_opsd.sampling import Request, Sampling
from trl_opsd.sampling.transformers import TransformersBackend
from trl_opsd.sampling.vllm_server import VLLMServerBackend


pytest.importorskip("vllm", reason="`make test-vllm` runs these in an environment with vLLM")

TOKENIZER = make_tokenizer()
END = TOKENIZER.eos_token_id
# vLLM's attention on the CPU needs heads of at least 32
MODEL = make_model(TOKENIZER, hidden_size=64, head_dim=32, intermediate_size=64)
# What the model's own configuration recommends must change nothing
MODEL.generation_config.update(repetition_penalty=3.0, top_k=2, temperature=0.1, do_sample=True)
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=32)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, top_k=30, max_new_tokens=32)
REQUESTS = [
    Request(TOKENIZER("7" * (1 + 9 * (n % 4)) + f"+{n}=", add_special_tokens=False)["input_ids"], seed=n)
    for n in range(24)
]


def token_ids(backend, sampling):
    completions = dict(backend.generate(REQUESTS, sampling))
    return [asdict(completions[index]) for index in range(len(REQUESTS))]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "model"
    MODEL.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def greedy_by_transformers():
    return token_ids(TransformersBackend(MODEL, [END], batch_size=5), GREEDY)


@pytest.fixture(scope="module")
def in_process(model_path):
    requests = json.dumps([asdict(request) for request in REQUESTS])
    samplings = json.dumps([asdict(GREEDY), asdict(SAMPLED)])
    return run_script("evaluate.py", model_path, requests, samplings)


@pytest.fixture(scope="module")
def server(model_path):
    options = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--served-model-name", "tiny"]
    command = ["vllm.entrypoints.cli.main", "serve", model_path, *options]
    with environment.server(Path(model_path).with_name("server.log"), *command) as (url, _):
        yield url


@pytest.mark.slow
def test_vllm_and_transformers_agree_on_greedy_outputs(greedy_by_transformers, in_process):
    assert in_process[0] == greedy_by_transformers
    # Both ways to end occur
    assert {completion["terminated"] for completion in in_process[0] + in_process[1]} == {True, False}


@pytest.mark.slow
def test_a_sample_of_vllm_depends_on_its_own_request_alone(in_process):
    _, sampled, again_without_the_first = in_process

    assert again_without_the_first == sampled[3:]
    assert len({tuple(completion["token_ids"]) for completion in sampled}) > 20


@pytest.mark.slow
def test_a_server_gives_what_vllm_gives_in_process(server, model_path, in_process):
    client = VLLMServerBackend(server, model_path, [END], num_concurrent=6)

    assert client.max_length == 256
    assert token_ids(client, GREEDY) == in_process[0]
    assert token_ids(client, SAMPLED) == in_process[1]
    with pytest.raises(ValueError, match="answers for tiny, not for other"):
        VLLMServerBackend(server, "other", [END], num_concurrent=1)
