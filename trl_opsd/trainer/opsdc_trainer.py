import textwrap
from typing import ClassVar

from .opsdc_config import OPSDCConfig
from .trainer import SelfDistillationTrainer


class OPSDCTrainer(SelfDistillationTrainer):
    """
    Trainer for On-Policy Self-Distillation for Reasoning Compression (OPSDC), from [CRISP: Compressed Reasoning via
    Iterative Self-Policy Distillation](https://huggingface.co/papers/2603.05433).

    The teacher is a periodically refreshed copy of the policy reading an instruction to be concise. [`OPSDCConfig`]
    holds the method; the arguments are those of [`SelfDistillationTrainer`]. The dataset needs a `prompt` column only.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_opsd import OPSDCConfig, OPSDCTrainer

    >>> dataset = Dataset.from_list([{"prompt": "What is 2 + 3?"}])
    >>> trainer = OPSDCTrainer("Qwen/Qwen3-8B", args=OPSDCConfig("Qwen3-8B-OPSDC"), train_dataset=dataset)
    >>> trainer.train()
    ```
    """

    _tag_names: ClassVar[list[str]] = ["trl", "trl-opsd", "opsdc"]
    _name: ClassVar[str] = "OPSDC"
    _paper: ClassVar[dict[str, str]] = {
        "title": "CRISP: Compressed Reasoning via Iterative Self-Policy Distillation",
        "id": "2603.05433",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{sang2026crisp,
                title        = {{CRISP: Compressed Reasoning via Iterative Self-Policy Distillation}},
                author       = {Hejian Sang and Yuanda Xu and Zhengze Zhou and Ran He and Zhipeng Wang and Jiachen
                Sun}, year         = 2026, eprint       = {arXiv:2603.05433},
            }"""),
    }
    config_class: ClassVar[type[OPSDCConfig]] = OPSDCConfig
