"""How often each prompt has been answered right."""

from typing import Any

from .batch import Batch


class PassRates:
    """
    For each prompt, a moving average of the share of its rollouts that are correct. The same on every process.

    Args:
        share (`float`):
            Share of the newest in the average, in (0, 1]. The first one counts as it is.

    Raises:
        ValueError: If `share` is out of range.
    """

    def __init__(self, share: float):
        if not 0.0 < share <= 1.0:
            raise ValueError(f"The share of the newest pass rate must be in (0, 1], got {share}.")
        self.share = share
        self._rates: dict[int, float] = {}

    def __getitem__(self, key: int) -> float | None:
        """Of a prompt, by its key; `None` if it has not been seen with rewards."""
        return self._rates.get(key)

    def see(self, batch: Batch) -> None:
        """Take in the success rates of a batch. All processes call this at once. Evaluations count for nothing."""
        if not batch.is_training:
            return
        keys, rates = (batch.gather(values).flatten().tolist() for values in (batch.prompt_keys, batch.success_rate))
        for key, rate in dict(zip(keys, rates, strict=True)).items():
            if rate == rate:  # not NaN: there were rewards
                before = self._rates.get(key, rate)
                self._rates[key] = before + self.share * (rate - before)

    def state_dict(self) -> dict[str, Any]:
        return {str(key): rate for key, rate in self._rates.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rates = {int(key): rate for key, rate in state.items()}
