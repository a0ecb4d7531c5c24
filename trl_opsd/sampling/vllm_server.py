"""Completions by a running vLLM server, `vllm serve`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import requests as http
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from .base import Completion, Request, Sampling
from .vllm import finished_completion


class VLLMServerBackend:
    """
    Keeps a number of requests under way. Requests that fail to connect or meet an error of the server are repeated,
    with growing pauses.

    Args:
        base_url (`str`):
            Address of the server, with or without `/v1`.
        model (`str`):
            Name the server has for the model, or the path it was loaded from.
        end_token_ids (`list[int]`):
            Tokens that end a completion.
        num_concurrent (`int`):
            Requests under way at once.
        num_retries (`int`, *optional*, defaults to `6`):
            How often a request is repeated.
        backoff (`float`, *optional*, defaults to `1.0`):
            Seconds that the pauses start from; each is twice the one before.

    Raises:
        ValueError: If the server cannot be reached, answers for another model, or loaded it from another folder than
            the one asked for.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        end_token_ids: list[int],
        num_concurrent: int,
        num_retries: int = 6,
        backoff: float = 1.0,
    ):
        self._url = base_url.rstrip("/").removesuffix("/v1") + "/v1"
        self._end_token_ids = end_token_ids
        self._num_concurrent = num_concurrent
        retry = Retry(
            num_retries,
            backoff_factor=backoff,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=None,
            raise_on_status=False,
        )
        self._session = http.Session()
        self._session.mount(self._url, HTTPAdapter(max_retries=retry, pool_maxsize=num_concurrent))
        served = self._ask("GET", "models")["data"]
        found = [entry for entry in served if model in (entry["id"], entry.get("root"))]
        if not found:
            names = ", ".join(entry["id"] for entry in served)
            raise ValueError(
                f"The server at {base_url} answers for {names}, not for {model}. Set `model_name_or_path` to the name "
                "it serves (and `tokenizer` to where its tokenizer is), or start it with that model."
            )
        self._model = found[0]["id"]
        self.root: str | None = found[0].get("root")
        """Where the server loaded the model from, as it says."""
        if self.root and Path(model).is_dir() and Path(model).resolve() != Path(self.root).resolve():
            raise ValueError(
                f"The server at {base_url} loaded what it calls {self._model} from {self.root}, not from the folder "
                f"{model}. Start it with that folder, or give its model a name that is no folder here."
            )
        # The entry of an adapter has no length: its base model's counts
        self.max_length: int | None = next(
            (entry["max_model_len"] for entry in [*found, *served] if entry.get("max_model_len")), None
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        waiting: SimpleQueue[int] = SimpleQueue()
        for index in range(len(requests)):
            waiting.put(index)
        finished: SimpleQueue[tuple[int, Completion | Exception]] = SimpleQueue()

        def work() -> None:
            while True:
                try:
                    index = waiting.get_nowait()
                except Empty:
                    return
                try:
                    finished.put((index, self._complete(requests[index], sampling)))
                except Exception as error:
                    finished.put((index, error))
                    return

        # Daemons, so that Ctrl-C need not wait for answers that take an hour
        for _ in range(min(self._num_concurrent, len(requests))):
            Thread(target=work, daemon=True).start()
        for _ in requests:
            index, result = finished.get()
            if isinstance(result, Exception):
                raise result
            yield index, result

    def _complete(self, request: Request, sampling: Sampling) -> Completion:
        answer = self._ask(
            "POST",
            "completions",
            {
                "model": self._model,
                "prompt": request.prompt_ids,
                "n": 1,
                "seed": request.seed,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "max_tokens": sampling.max_new_tokens,
                "stop_token_ids": self._end_token_ids,
                # What is left out, the server takes from the model's generation configuration
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "return_token_ids": True,
            },
        )
        choice = answer["choices"][0]
        if choice.get("token_ids") is None:
            raise ValueError(
                f"The server at {self._url} returns no token ids. Serve the model with vLLM 0.11 or newer."
            )
        completion = finished_completion(choice["token_ids"], choice["finish_reason"])
        if not completion.terminated and len(completion.token_ids) < sampling.max_new_tokens:
            raise ValueError(
                f"The server at {self._url} cut a completion off at {len(completion.token_ids)} tokens, and "
                f"`max_new_tokens` is {sampling.max_new_tokens}. Start it with `--generation-config vllm` and without "
                "`max_new_tokens` in `--override-generation-config`."
            )
        return completion

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            response = self._session.request(method, f"{self._url}/{path}", json=body, timeout=(10, None))
        except http.RequestException as error:
            raise ValueError(
                f"Cannot reach the server at {self._url}: {error}. Start it with `vllm serve`, or set `base_url`."
            ) from error
        if not response.ok:
            raise ValueError(f"The server at {self._url} refused `{path}` ({response.status_code}): {response.text}")
        return response.json()
