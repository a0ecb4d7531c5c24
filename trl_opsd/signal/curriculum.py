"""Which prompts are drawn, by what became of them so far."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .batch import Batch
from .pass_rates import PassRates


class Curriculum(ABC):
    """
    Draws the prompts of each batch by weights that change with what has been seen. It remembers what it has drawn in
    an epoch, so that a resumed run, whose sampler begins with the first batch, draws the same.
    """

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._drawn: list[list[int]] = []

    @abstractmethod
    def see(self, batch: Batch) -> None:
        """Take in the rollouts of a batch. All processes call this at once, and have to agree afterwards."""

    @abstractmethod
    def weights(self, keys: Sequence[int]) -> torch.Tensor:
        """
        How likely prompts are drawn.

        Args:
            keys (`Sequence[int]`):
                Key of each row's prompt, see [`Batch`].

        Returns:
            `torch.Tensor` of shape `(number of rows,)`: weights, which need not sum to 1.
        """

    def draw(self, epoch: int, index: int, keys: Sequence[int], number: int) -> list[int]:
        """
        The rows of a batch, no row twice.

        Args:
            epoch (`int`):
                Number of the epoch, which decides the random numbers together with `index`.
            index (`int`):
                Number of the batch in the epoch.
            keys (`Sequence[int]`):
                Key of each row's prompt.
            number (`int`):
                How many rows to draw.
        """
        if epoch != self._epoch:
            self._epoch, self._drawn = epoch, []
        if index == len(self._drawn):
            generator = torch.Generator().manual_seed(hash((epoch, index)) % 2**63)
            numbers = torch.rand(len(keys), generator=generator, dtype=torch.float64)
            # The largest u^(1/w) are a draw without replacement by the weights w
            self._drawn.append((numbers.log() / self.weights(keys)).topk(number).indices.tolist())
        return self._drawn[index]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._drawn = state["epoch"], state["drawn"]


@dataclass
class ByPassRate(Curriculum):
    """
    Weights [4p(1 − p)]^exponent, but at least `floor`, with p a moving average of the share of correct rollouts of the
    prompt. 1 for prompts that have not been seen, as for those of which half is right.

    Args:
        exponent (`float`, *optional*, defaults to `0.5`):
            At 0, all prompts are equally likely.
        floor (`float`, *optional*, defaults to `0.05`):
            Least weight, so that no prompt is given up.
        share (`float`, *optional*, defaults to `0.5`):
            Share of the newest success rate in the average.

    Raises:
        ValueError: If a value is out of range.
    """

    exponent: float = 0.5
    floor: float = 0.05
    share: float = 0.5
    _rates: PassRates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__init__()
        if self.exponent < 0 or not 0.0 < self.floor <= 1.0:
            raise ValueError(
                "`exponent` of the pass_rate curriculum must not be negative and `floor` in (0, 1], got "
                f"{self.exponent} and {self.floor}."
            )
        self._rates = PassRates(self.share)

    def see(self, batch: Batch) -> None:
        new = [self._rates[key] is None for key in batch.prompt_keys.flatten().tolist()]
        self._rates.see(batch)
        batch.log("curriculum/new_prompt_rate", *batch.rewards.new_tensor([sum(new), len(new)]))

    def weights(self, keys: Sequence[int]) -> torch.Tensor:
        known = [self._rates[key] for key in keys]
        rates = torch.tensor([0.5 if rate is None else rate for rate in known], dtype=torch.float64)
        return (4 * rates * (1 - rates)).pow(self.exponent).clamp(min=self.floor)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rates": self._rates.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._rates.load_state_dict(state["rates"])


CURRICULA = {"pass_rate": ByPassRate}
