"""Annotations of rollouts by a model on a server."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from .client import ServerError, limit_requests


class ServerAnnotator:
    """
    A model behind a server that speaks OpenAI's protocol, such as vLLM's, asked for the annotation of each rollout.

    Args:
        base_url (`str`):
            Address of the server, without `/v1`.
        model (`str`, *optional*):
            Name of the model there. `None` takes the first that it serves.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Most tokens of an answer.
        temperature (`float`, *optional*, defaults to `0.0`):
            Temperature it is sampled at.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds an answer may take. One that takes longer is asked for once more; then the run ends after a
            checkpoint.
        concurrent (`int`, *optional*, defaults to `16`):
            Most rollouts that a process asks about at once.
        request (`dict[str, Any]`, *optional*):
            Further fields of each request, such as `{"chat_template_kwargs": {"enable_thinking": False}}`.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        timeout: float = 120.0,
        concurrent: int = 16,
        request: dict[str, Any] | None = None,
    ):
        if max_new_tokens < 1 or concurrent < 1 or timeout <= 0 or temperature < 0:
            raise ValueError(
                "`max_new_tokens` and `concurrent` of the server's `annotator_kwargs` must be at least 1, `timeout` "
                f"positive and `temperature` at least 0, got {max_new_tokens}, {concurrent}, {timeout} and "
                f"{temperature}."
            )
        self._base_url, self._model, self._concurrent = base_url.rstrip("/"), model, concurrent
        self._timeout = timeout
        self._request = {"max_tokens": max_new_tokens, "temperature": temperature, **(request or {})}
        self._session = requests.Session()
        limit_requests(self._session, timeout)

    def check_run(self) -> None:
        """Refuse a server that does not answer, or does not serve the model."""
        try:
            answer = requests.get(f"{self._base_url}/v1/models", timeout=min(30.0, self._timeout))
            answer.raise_for_status()
            served = [one["id"] for one in answer.json()["data"]]
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"No annotator answers at {self._base_url} ({error}). Start the server, or correct `base_url` of "
                "`annotator_kwargs`, which is its address without `/v1`."
            ) from error
        if self._model is None and served:
            self._model = served[0]
        if self._model not in served:
            raise ValueError(
                f"The server at {self._base_url} serves {served}, and not the annotator's `model={self._model!r}`. "
                "Correct `annotator_kwargs`."
            )

    def __call__(self, asked: Sequence[tuple[Any, Any, list[dict[str, Any]]]]) -> list[str]:
        """
        Ask for annotations.

        Args:
            asked (`Sequence[tuple[Any, Any, list[dict[str, Any]]]]`):
                Of each rollout, messages that ask for it, in the last place.

        Raises:
            ServerError: If the server fails, also after retries.
        """
        with ThreadPoolExecutor(self._concurrent) as pool:
            return list(pool.map(self._answer, [messages for *_, messages in asked]))

    def _answer(self, messages: list[dict[str, Any]]) -> str:
        where = f"The annotator at {self._base_url}"
        body = {"model": self._model, "messages": messages, **self._request}
        try:
            answer = self._session.post(f"{self._base_url}/v1/chat/completions", json=body)
        except requests.RequestException as error:
            raise ServerError(f"{where} does not answer: {error}.") from error
        if answer.status_code != 200:
            raise ServerError(f"{where} answers with status {answer.status_code}: {answer.text[:200]}")
        try:
            content = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ServerError(f"{where} answers with something else than a completion: {answer.text[:200]}") from error
        return content or ""
