"""The order of rows where a curriculum draws them."""

from collections.abc import Callable, Iterator
from typing import Any, cast

from trl.trainer.utils import RepeatSampler

from ..signal import Curriculum, Signals
from .signals import prompt_key


class DrawnRows(RepeatSampler):
    """
    GRPOTrainer's sampler, in which a curriculum says which prompts come next. An epoch has as many batches as before,
    in which some rows come more than once and others not at all.

    Args:
        sampler ([`~trl.trainer.utils.RepeatSampler`]):
            GRPOTrainer's, whose generator is seeded for each epoch.
        signals ([`Signals`]):
            Have the curriculum, with its coefficients of the step.
        tokenize (`Callable`):
            From prompts to token ids.
    """

    def __init__(
        self,
        sampler: RepeatSampler,
        signals: Signals,
        tokenize: Callable[[list[Any]], list[list[int]]],
    ):
        super().__init__(sampler.data_source, sampler.mini_repeat_count, sampler.batch_size, sampler.repeat_count)
        self.generator = sampler.generator
        self._signals = signals
        prompts: Any = sampler.data_source
        batches = (prompts[start : start + 1000]["prompt"] for start in range(0, self.num_samples, 1000))
        self._keys = [prompt_key(list(ids)) for some in batches for ids in tokenize(some)]

    def __iter__(self) -> Iterator[int]:
        epoch = self.generator.initial_seed()
        for index in range(self.num_samples // self.batch_size):
            curriculum = cast(Curriculum, self._signals.curriculum)
            rows = curriculum.draw(epoch, index, self._keys, self.batch_size)
            for _ in range(self.repeat_count):
                for row in rows:
                    yield from [row] * self.mini_repeat_count
