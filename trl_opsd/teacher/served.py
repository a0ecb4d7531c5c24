from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..objective import TopLogProbs
from ..serving import Scores, TeacherServer
from .base import Read, Teacher, TokenTargets


class ServedTeacher(Teacher):
    """
    A model that only a vLLM server holds. It scores the rollouts as soon as they are sampled, so that a policy whose
    weights were sent there can be its own teacher.

    Args:
        server ([`~trl_opsd.serving.TeacherServer`]):
            The server.
        fingerprint (`str`, *optional*):
            See [`Teacher`].
    """

    knows_entropy = False

    def __init__(self, server: TeacherServer, fingerprint: str | None = None):
        self.server = server
        self.fingerprint = fingerprint
        whose = "the student's current weights" if fingerprint is None else f"{server.name}, never trained"
        self.description = f"{whose}, on a server"
        self.context_length = server.context_length

    def weights(self, policy: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def annotate(
        self,
        prompts: Sequence[list[int] | None],
        batch: dict[str, torch.Tensor],
        rows: Sequence[Mapping[str, Any]],
    ) -> dict[str, torch.Tensor]:
        """
        See [`Teacher.annotate`].

        Raises:
            ServerError: On every process, if the server fails on any.
        """
        ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
        completions = [row[selected].tolist() for row, selected in zip(ids, mask, strict=True)]
        scores = self.server.score(prompts, completions, ids.size(1))
        return {f"teacher_{name}": values.to(ids.device) for name, values in scores._asdict().items()}

    def targets(
        self, policy: nn.Module, rows: dict[str, Any], selected: torch.Tensor, read: Read
    ) -> list[TokenTargets]:
        top_tokens, top_log_probs, log_probs = (rows[f"teacher_{name}"][selected] for name in Scores._fields)
        said = TopLogProbs(top_tokens.long(), top_log_probs, rows["completion_ids"][selected], log_probs)
        return [TokenTargets(said, None)]
