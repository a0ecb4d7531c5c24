"""Probes a tiny model with an engine in this process, and saves what vLLM was asked. Run by test_probe.py."""

import sys
from functools import partial

from environment import save_result
from train import record_calls
from trl.generation import vllm_generation

from trl_opsd.cli import main


def probe(config: str, *flags: str) -> list[dict]:
    calls: list[dict] = []
    engine = partial(vllm_generation.LLM, dtype="float32", enforce_eager=True)

    def recorded(*args, **kwargs):
        llm = engine(*args, **kwargs)
        calls.append(record_calls(llm))
        return llm

    vllm_generation.LLM = recorded
    assert main(["probe", "--config", config, *flags]) == 0
    return calls[0] if calls else []


if __name__ == "__main__":
    save_result(probe(*sys.argv[1:]))
