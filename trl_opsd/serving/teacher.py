"""The teacher's log-probabilities from a vLLM server."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from trl.generation.vllm_client import VLLMClient

from .client import ServerError, context_length


_CONCURRENT = 64


class Scores(NamedTuple):
    """
    What a teacher gives to the tokens of B completions, padded on the right to T tokens with log-probability 0.

    Args:
        top_tokens (`torch.Tensor` of shape `(B, T, k)`):
            The k most probable tokens at each position, int32.
        top_log_probs (`torch.Tensor` of shape `(B, T, k)`):
            Theirs, in nats, fp32.
        log_probs (`torch.Tensor` of shape `(B, T)`):
            Those of the completions' own tokens.
    """

    top_tokens: torch.Tensor
    top_log_probs: torch.Tensor
    log_probs: torch.Tensor


class TeacherServer:
    """
    A vLLM server that scores completions after the teacher's prompts.

    Args:
        client ([`~trl.generation.vllm_client.VLLMClient`]):
            Client of the server.
        top_k (`int`):
            Number of tokens to ask for at each position.
        vocab_size (`int`):
            Number of the policy's logits.

    Raises:
        ValueError: If the server cannot report these log-probabilities.
    """

    def __init__(self, client: VLLMClient, top_k: int, vocab_size: int):
        self.name = client.model
        self.context_length = context_length(client) - 1  # one token is generated, and thrown away
        self._client = client
        self._top_k = top_k
        where = f"The vLLM server at {client.base_url} (`teacher_server_base_url`)"
        try:
            probe = self._ask([list(range(1, 9))], [1])
        except Exception as error:
            raise ValueError(
                f"{where} does not report the {top_k} most probable tokens of a prompt (`divergence_top_k`): {error} "
                "Restart it with `--max-logprobs -1`."
            ) from error
        if np.exp(probe["logprobs"][0]).sum(axis=1).max() > 1.001:
            raise ValueError(f"{where} reports logits. Restart it with `--logprobs-mode processed_logprobs`.")
        highest = np.max(probe["logprob_token_ids"])
        if highest >= vocab_size:
            raise ValueError(
                f"{where} serves '{self.name}', which predicts token {highest}, and the policy has {vocab_size}. "
                "Serve a model with the policy's vocabulary."
            )

    def score(self, prompts: Sequence[list[int] | None], completions: list[list[int]], width: int) -> Scores:
        """
        Score completions. Called on every process, each with its own.

        Args:
            prompts (`Sequence[list[int] | None]`):
                Token ids of B prompts. `None` leaves the row out: it gets log-probabilities of 0.
            completions (`list[list[int]]`):
                Token ids of B completions.
            width (`int`):
                T.

        Returns:
            [`Scores`]: on the CPU.

        Raises:
            ServerError: On every process, if the server fails on any.
        """
        failure = None
        asked = [row for row, prompt in enumerate(prompts) if prompt is not None and completions[row]]
        top_tokens = np.zeros((len(prompts), width, self._top_k), np.int32)
        top_log_probs = np.zeros((len(prompts), width, self._top_k), np.float32)
        log_probs = np.zeros((len(prompts), width), np.float32)
        try:
            # Not all at once: after a failure, the client still waits for the answers to all it was asked
            for start in range(0, len(asked), _CONCURRENT):
                rows = asked[start : start + _CONCURRENT]
                given = [cast(list[int], prompts[row]) for row in rows]
                sequences = [prompt + completions[row] for prompt, row in zip(given, rows, strict=True)]
                output = self._ask(sequences, [len(prompt) for prompt in given])
                for index, row in enumerate(rows):
                    part = slice(0, len(completions[row]))
                    top_tokens[row, part] = output["logprob_token_ids"][index]
                    top_log_probs[row, part] = output["logprobs"][index]
                    log_probs[row, part] = np.squeeze(output["actual_logprobs"][index], axis=1)
        except Exception as error:  # of the connection, or whatever the client makes of an answer
            failure = f"The teacher's vLLM server at {self._client.base_url} failed: {error}"
        failures = [message for message in gather_object([failure]) if message is not None]
        if failures:
            raise ServerError(failures[0])
        return Scores(*map(torch.from_numpy, (top_tokens, top_log_probs, log_probs)))

    def _ask(self, sequences: list[list[int]], prompt_lengths: list[int]) -> dict[str, list]:
        return self._client.get_sequence_logprobs(
            sequences, prompt_lengths, top_logprobs=self._top_k, chunk_size=1, max_concurrent_requests=_CONCURRENT
        )
