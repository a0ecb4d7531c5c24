"""Completions by vLLM in this process."""

from collections.abc import Iterator, Sequence
from typing import Any

from .base import Completion, Request, Sampling


class VLLMBackend:
    """
    Hands all requests to the engine, which schedules them, and takes each completion as it finishes.

    Args:
        llm ([`~vllm.LLM`]):
            Engine.
        end_token_ids (`list[int]`):
            Tokens that end a completion.
        lora_request ([`~vllm.lora.request.LoRARequest`], *optional*):
            Adapter.
    """

    def __init__(self, llm: Any, end_token_ids: list[int], lora_request: Any = None):
        self._llm = llm
        self._end_token_ids = end_token_ids
        self._lora_request = lora_request
        self.max_length: int | None = llm.llm_engine.model_config.max_model_len

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        from vllm import SamplingParams

        ids = self._llm.enqueue(
            [{"prompt_token_ids": request.prompt_ids} for request in requests],
            [
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    max_tokens=sampling.max_new_tokens,
                    seed=request.seed,
                    stop_token_ids=self._end_token_ids,
                    detokenize=False,
                )
                for request in requests
            ],
            lora_request=self._lora_request,
            use_tqdm=False,
        )
        # The engine tells requests apart by ids with a random ending, and reports them without
        positions = {request_id.partition("-")[0]: position for position, request_id in enumerate(ids)}
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    completion = output.outputs[0]
                    yield (
                        positions[output.request_id],
                        finished_completion(list(completion.token_ids), completion.finish_reason),
                    )


def finished_completion(token_ids: list[int], reason: str | None) -> Completion:
    """
    Turns what vLLM reports into a completion.

    Args:
        token_ids (`list[int]`):
            Generated tokens.
        reason (`str`, *optional*):
            Why it ended: `"stop"` or `"length"`.

    Returns:
        [`Completion`]:
            The completion.

    Raises:
        ValueError: If it ended for another reason, as when the engine is shut down.
    """
    if reason not in ("stop", "length"):
        raise ValueError(f"vLLM gave up a completion ({reason}). Run the same command again to go on.")
    return Completion(token_ids, terminated=reason == "stop")
