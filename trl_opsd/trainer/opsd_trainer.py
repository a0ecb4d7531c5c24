from typing import ClassVar

from .opsd_config import OPSDConfig
from .trainer import SelfDistillationTrainer


class OPSDTrainer(SelfDistillationTrainer):
    """
    Trainer for On-Policy Self-Distillation (OPSD), from [Self-Distilled Reasoner: On-Policy Self-Distillation for
    Large Language Models](https://huggingface.co/papers/2601.18734).

    The teacher is the initial policy reading the reference solution. [`OPSDConfig`] holds the method; the arguments
    are those of [`SelfDistillationTrainer`].

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_opsd import OPSDConfig, OPSDTrainer

    >>> dataset = Dataset.from_list([{"prompt": "What is 2 + 3?", "solution": "Two and three make five, so 5."}])
    >>> trainer = OPSDTrainer("Qwen/Qwen3-1.7B", args=OPSDConfig("Qwen3-1.7B-OPSD"), train_dataset=dataset)
    >>> trainer.train()
    ```
    """

    _tag_names: ClassVar[list[str]] = ["trl", "trl-opsd", "opsd"]
    _name: ClassVar[str] = "OPSD"
    config_class: ClassVar[type[OPSDConfig]] = OPSDConfig
