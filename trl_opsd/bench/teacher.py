"""
The contenders of `trl-opsd bench teacher`: the teacher's backbone scores rollouts that share one prompt.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..scoring import can_share_prompts, completion_states
from .channel import CannotRun, Channel
from .measure import PeakMemory, release_memory, synchronize
from .models import random_model


@dataclass(frozen=True)
class TeacherCase:
    """
    What is scored.

    Args:
        model (`str`): Id or folder of the model.
        random_weights (`bool`): Whether the folder has no weights, and they are made on the device.
        device (`str`): `"cpu"` or `"cuda"`.
        num_rollouts (`int`): Rollouts of the one prompt.
        teacher_prompt_tokens (`int`): Length of the teacher's prompt.
        max_new_tokens (`int`): Length of the rollouts.
        dtype (`str`): Dtype of the weights.
        seed (`int`): Seed of the tokens.
    """

    model: str
    random_weights: bool
    device: str
    num_rollouts: int
    teacher_prompt_tokens: int
    max_new_tokens: int
    dtype: str
    seed: int


class Teacher:
    """
    A contender that yields the hidden states of the rollouts.

    Args:
        name (`str`):
            `"shared-prompt"` or `"whole-sequences"`.
        case ([`TeacherCase`]):
            Case.
    """

    def __init__(self, name: str, case: TeacherCase):
        from transformers import AutoModelForCausalLM

        if case.random_weights:
            model = random_model(case.model, case.device, case.dtype, case.seed)
        else:
            model = AutoModelForCausalLM.from_pretrained(case.model, dtype=case.dtype).to(case.device).eval()
        if name == "shared-prompt" and not can_share_prompts(model):
            raise CannotRun("this model keeps more of a prompt than keys and values")
        self._model, self._shares, self._case = model, name == "shared-prompt", case
        generator = torch.Generator().manual_seed(case.seed)
        size = (case.num_rollouts, case.max_new_tokens)
        prompt = torch.randint(model.config.vocab_size, (1, case.teacher_prompt_tokens), generator=generator)
        rollouts = torch.randint(model.config.vocab_size, size, generator=generator)
        self._input_ids = torch.cat([prompt.expand(case.num_rollouts, -1), rollouts], dim=1).to(case.device)
        self._mask = torch.ones_like(self._input_ids)

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        """Hidden states of shape `(number of rollouts, tokens of a rollout, H)`, as the trainer computes them."""
        shape = self._case.num_rollouts, self._case.max_new_tokens
        selected = torch.ones(shape, dtype=torch.bool, device=self._mask.device)
        groups = torch.zeros(self._case.num_rollouts, dtype=torch.int64) if self._shares else None
        states = completion_states(self._model, self._input_ids, self._mask, selected, groups)
        return states.view(*shape, -1)


def serve(name: str, settings: dict[str, Any], channel: Channel) -> None:
    """
    Runs a contender until there are no more commands.

    Args:
        name (`str`):
            Name of the contender.
        settings (`dict[str, Any]`):
            Fields of [`TeacherCase`].
        channel ([`Channel`]):
            Where commands come from and answers go.
    """
    case = TeacherCase(**settings)
    device = torch.device(case.device)
    contender = Teacher(name, case)
    channel.send({"threads": torch.get_num_threads()})
    while (command := channel.receive()) is not None:
        if command == "memory":
            peak = PeakMemory(device)
            contender.run()
            synchronize(device)
            channel.send({"peak_extra_bytes": max(0, peak.stop())})
            continue
        synchronize(device)
        started = time.perf_counter()
        contender.run()
        synchronize(device)
        channel.send({"seconds": time.perf_counter() - started})
        release_memory(torch.device("cpu"))
