"""Generates with vLLM in this process, and saves what. Started by test_eval_vllm.py."""

import json
import sys

from environment import save_result
from transformers import AutoTokenizer

from trl_opsd.sampling import Request, Sampling
from trl_opsd.sampling.loading import load_backend


def main(model: str, requests: list, samplings: list) -> list:
    init = {"max_model_len": 256, "enforce_eager": True}
    backend = load_backend("vllm", model, AutoTokenizer.from_pretrained(model), model_init_kwargs=init)
    assert backend.max_length == 256
    found = []
    for sampling in samplings:
        completions = dict(backend.generate([Request(**request) for request in requests], Sampling(**sampling)))
        found.append([vars(completions[index]) for index in range(len(requests))])
    # What a request gives must not depend on the others
    rest = [Request(**request) for request in requests[:2:-1]]
    rest_found = dict(backend.generate(rest, Sampling(**samplings[-1])))
    found.append([vars(rest_found[index]) for index in reversed(range(len(rest)))])
    return found


if __name__ == "__main__":
    save_result(main(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])))
