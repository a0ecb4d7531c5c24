"""Rollouts from a server that may fail: on one process, while all others wait for it."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from .adapter import AdapterSync
from .client import ServerError


def report_failures(generation: VLLMGeneration) -> None:
    """
    Have every process raise a [`ServerError`] from `generate` when the server of the rollouts fails.

    Only the main process talks to the server. Left alone, it would stop at the failure, and the others would wait for
    it in a collective operation for ever.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            In server mode. Its `generate` is replaced, and on the main process its client.
    """
    watched = None
    if generation.accelerator.is_main_process:
        watched = generation.vllm_client = _WatchedClient(generation.vllm_client)
        sync = generation.sync_weights
        if isinstance(sync, AdapterSync) and sync.load is not None:
            sync.load = partial(watched.load_adapter, sync.load)
    generate = generation.generate

    def generate_or_raise(*args: Any, **kwargs: Any) -> Any:
        output = generate(*args, **kwargs)
        (failure,) = broadcast_object_list([watched.failure if watched else None])
        if failure is not None:
            raise ServerError(failure)
        return output

    generation.generate = generate_or_raise


class _WatchedClient:
    """
    A client that keeps the first failure instead of raising it, and does nothing from then on.

    A server that was restarted counts as a failure, too: it has its first weights again.
    """

    def __init__(self, client: VLLMClient):
        self.failure: str | None = None
        self._client = client
        self._instance = self._current_instance()

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        self._check_instance()  # one that was restarted would wait for a transfer that nobody prepared
        self._attempt(self._client.update_named_params, metadata, named_params)
        for _ in named_params:  # the other processes are in the collective operations that gather them
            pass

    def load_adapter(self, load: Callable[[Path], None], folder: Path) -> None:
        self._check_instance()  # one that was restarted has its first base
        self._attempt(load, folder)

    def reset_prefix_cache(self) -> None:
        self._attempt(self._client.reset_prefix_cache)

    def image_features(self, images: Any) -> Any:
        # Nothing is generated after a failure, whatever the features are
        features = self._attempt(self._client.image_features, images)
        return [None] * len(images) if self.failure is not None else features

    def generate(self, **kwargs: Any) -> dict[str, Any]:
        output = self._attempt(self._client.generate, **kwargs)
        self._check_instance()
        nothing: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": None}
        return output if self.failure is None else nothing

    def _attempt(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.failure is not None:
            return None
        try:
            return call(*args, **kwargs)
        except Exception as error:  # of the connection, or whatever the client makes of an answer
            self.failure = f"The vLLM server at {self._client.base_url} failed: {error}"
            return None

    def _check_instance(self) -> None:
        if self._attempt(self._current_instance) != self._instance and self.failure is None:
            url = self._client.base_url
            self.failure = f"The vLLM server at {url} was restarted, and has its first weights again."

    def _current_instance(self) -> str | None:
        info = self._client.get_server_info()
        processes = info["parallel_config"]
        if processes["data_parallel_size"] > 1 or processes.get("_api_process_count", 1) > 1:
            return None  # one of several processes answers, each with an id of its own
        return info["instance_id"]
