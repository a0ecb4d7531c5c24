"""
What training steps really take, beside what was planned for them.

`python tests/plan/measuring.py` prints the table of docs/plan.md.
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, Qwen3MoeConfig

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer
from trl_opsd.bench.models import PRESETS, random_model, save_config
from trl_opsd.plan.hardware import parse_gpus
from trl_opsd.plan.memory import phases
from trl_opsd.plan.models import Model
from trl_opsd.plan.passes import Alive
from trl_opsd.plan.setting import Lengths, Setting
from trl_opsd.plan.sharding import named


PRESETS["measured"] = {**PRESETS["tiny"], "num_hidden_layers": 4}
PRESETS["untied"] = {**PRESETS["measured"], "tie_word_embeddings": False}
COMPLETION = 48


class Case(NamedTuple):
    """A run: fields of the configuration, and what it trains."""

    name: str
    args: dict | None = None
    lora: dict | None = None
    dtype: str = "float32"
    bf16: bool = False
    preset: str = "measured"
    num_experts: int = 0
    attention: str | None = None


LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CASES = [
    Case("all weights, fp32"),
    Case("the same, untied head", preset="untied"),
    Case("the same, gradient checkpointing", {"gradient_checkpointing": True}),
    Case("the same, two micro-batches", {"gradient_accumulation_steps": 2}),
    Case("the same, passes of 400 tokens", {"max_tokens_per_microbatch": 400}),
    Case("the same, moving average", {"teacher": "ema"}),
    Case("the same, live teacher", {"teacher": "live"}),
    Case("the same, 8 MiB for the loss", {"divergence_memory": 8}),
    Case("the same, attention `eager`", attention="eager"),
    Case("8 experts, 2 of a token", {"router_aux_loss_coef": 0.0}, num_experts=8),
    Case("all weights, fp32, autocast to bf16", bf16=True),
    Case("the same, gradient checkpointing", {"gradient_checkpointing": True}, bf16=True),
    Case("all weights, bf16", dtype="bfloat16", bf16=True),
    Case("the same, moving average", {"teacher": "ema"}, dtype="bfloat16", bf16=True),
    Case("LoRA, fp32", lora=LORA),
    Case("LoRA with dropout, fp32", lora=LORA | {"lora_dropout": 0.05}),
    Case("the same, gradient checkpointing", {"gradient_checkpointing": True}, lora=LORA),
    Case("LoRA on bf16, autocast", lora=LORA, dtype="bfloat16", bf16=True),
    Case("the same, periodic teacher", {"teacher": "periodic"}, lora=LORA, dtype="bfloat16", bf16=True),
]


def rows() -> Dataset:
    """Prompts and solutions of different lengths."""
    texts = [("the of and a " * (4 + 2 * number), "to in is for " * (8 + 4 * number)) for number in range(8)]
    return Dataset.from_list([{"prompt": prompt, "solution": solution} for prompt, solution in texts])


def make_trainer(case: Case, folder: Path, **given) -> SelfDistillationTrainer:
    """The trainer of a case, on a random model."""
    save_config(folder, case.preset)
    if case.num_experts:
        values = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen3_moe"}
        experts = {"num_experts": case.num_experts, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
        Qwen3MoeConfig.from_dict({**values, **experts}).save_pretrained(folder)
    model = random_model(folder, "cpu", case.dtype, seed=0)
    if case.attention is not None:
        model.set_attn_implementation(case.attention)
    args = SelfDistillationConfig(
        output_dir=str(folder / "run"),
        use_cpu=True,
        bf16=case.bf16,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=2,
        per_device_train_batch_size=4,
        max_completion_length=COMPLETION,
        generation_kwargs={"min_new_tokens": COMPLETION},
        divergence_kernel="eager",
        **{"gradient_checkpointing": False, "gradient_accumulation_steps": 1, **(case.args or {})},
    )
    lora = None if case.lora is None else LoraConfig(**case.lora)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = {"context_kwargs": {"template": "{prompt} {solution}"}}
    for name, value in context.items():
        setattr(args, name, value)
    return SelfDistillationTrainer(
        model, args=args, train_dataset=rows(), peft_config=lora, processing_class=tokenizer, **given
    )


def storages(tensors) -> int:
    """Bytes of tensors, shared memory once."""
    found = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(found.values())


class Measured:
    """
    What the second optimizer step of a trainer takes: `parts`, bytes by part and phase, and the lengths of its rows.

    Args:
        trainer ([`SelfDistillationTrainer`]):
            A trainer that has not been trained.
    """

    def __init__(self, trainer: SelfDistillationTrainer):
        self.trainer = trainer
        self.parts: dict[str, int] = {}
        self.lengths: Lengths | None = None
        self.alive = Alive()
        self.step = 0
        self.base = 0
        loss = trainer.loss
        self._around(loss.networks, "targets", self._targets)
        self._around(loss.networks, "states", self._states)
        self._around(trainer.accelerator, "backward", self._backward)
        self._around(trainer, "training_step", self._training_step)
        import trl_opsd.trainer.loss as module

        self.module, self.fused = module, module.fused_divergence
        module.fused_divergence = self._fused
        try:
            trainer.train()
        finally:
            module.fused_divergence = self.fused
        policy = trainer.accelerator.unwrap_model(trainer.model)
        teacher = getattr(trainer.teacher, "copy", None)
        copies = [] if teacher is None else [one for _, _, one in teacher.pairs()]
        averages = getattr(getattr(trainer.teacher, "rule", None), "_averages", {}).values()
        state = [
            value
            for state in trainer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.ndim
        ]
        own = {id(one) for one in copies}
        self.parts |= {
            "weights": storages([one for one in policy.parameters() if id(one) not in own]),
            "teacher": storages([*copies, *averages]),
            "optimizer": storages(state),
        }

    @staticmethod
    def _around(owner, name, function):
        before = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: function(before, *args, **kwargs))

    def _training_step(self, before, model, *args, **kwargs):
        self.step += 1
        if self.step <= self.trainer.args.gradient_accumulation_steps:
            return before(model, *args, **kwargs)
        state = self.trainer.optimizer.state.values()
        tensors = [value for one in state for value in one.values() if isinstance(value, torch.Tensor)]
        teacher = getattr(self.trainer.teacher, "copy", None)
        tensors += [] if teacher is None else [one for _, _, one in teacher.pairs()]
        tensors += [*self.trainer.model.parameters(), *self.trainer.model.buffers()]
        tensors += [one.grad for one in self.trainer.model.parameters() if one.grad is not None]
        if teacher is not None and hasattr(teacher, "_model"):
            tensors += teacher._model.buffers()
        with self.alive:
            self.alive.ignore(*tensors)
            result = before(model, *args, **kwargs)
        # Gradients of the policy alone
        self.parts["gradients"] = storages(
            [one.grad for one in self.trainer.model.parameters() if one.grad is not None]
        )
        return result

    def _most(self, name, size):
        self.parts[name] = max(size, self.parts.get(name, 0))

    def _watched(self):
        return self.step > self.trainer.args.gradient_accumulation_steps

    def _targets(self, before, model, rows):
        if not self._watched():
            return before(model, rows)
        prompt, teacher = (int(rows[f"{name}_mask"].sum(1).max()) for name in ("prompt", "teacher_prompt"))
        found = prompt, teacher, int(rows["completion_mask"].sum(1).max())
        self.lengths = Lengths(*map(max, zip(found, self.lengths or found, strict=True)))
        self.alive.restart()
        start = self.alive.now
        self.base = self.base or start
        result = before(model, rows)
        self._most("teacher: activations", self.alive.peak - start)
        self.teacher = self.alive.now - start
        return result

    def _states(self, before, model, *args, **kwargs):
        if not self._watched() or not torch.is_grad_enabled():
            return before(model, *args, **kwargs)
        self.alive.restart()
        start = self.alive.now
        result = before(model, *args, **kwargs)
        self._most("forward: activations", self.alive.peak - start + self.teacher)
        self._most("loss: activations", self.alive.now - start + self.teacher)
        return result

    def _fused(self, *args, **kwargs):
        if not self._watched():
            return self.fused(*args, **kwargs)
        self.alive.restart()
        start = self.alive.now
        result = self.fused(*args, **kwargs)
        left = self.alive.now - start
        self._most("loss: loss gradients", left)
        self._most("loss: logits blocks", self.alive.peak - start - left)
        return result

    def _backward(self, before, *args, **kwargs):
        if not self._watched():
            return before(*args, **kwargs)
        self.alive.restart()
        before(*args, **kwargs)
        self._most("backward: all", self.alive.peak - self.base)
        return None


def planned(case: Case, folder: Path, trainer: SelfDistillationTrainer, lengths: Lengths, **given) -> Setting:
    """What would have been planned for a case with such rows."""
    from transformers import AutoConfig

    lora = None if case.lora is None else LoraConfig(**case.lora)
    model = Model(AutoConfig.from_pretrained(folder), getattr(torch, case.dtype), lora, attention=case.attention)
    values = {"gpu": parse_gpus("1xCPU")[1], "num_gpus": 1, "sharding": named("single", 1), **given}
    return Setting(trainer.args, policy=model, lengths=lengths, **values)


def compare(case: Case, folder: Path) -> dict[str, tuple[int, int]]:
    """Planned and measured bytes, by part and phase."""
    trainer = make_trainer(case, folder)
    measured = Measured(trainer)
    setting = planned(case, folder, trainer, measured.lengths)
    plan = {phase.name: phase.parts for phase in phases(setting)}
    found = {name: plan["optimizer"].get(name, 0) for name in ("weights", "teacher", "optimizer", "gradients")}
    found |= {
        "teacher: activations": plan["teacher"]["activations"],
        "forward: activations": plan["forward"]["activations"],
        "loss: activations": plan["loss"]["activations"],
        "loss: logits blocks": plan["loss"]["logits blocks"],
        "loss: loss gradients": plan["loss"]["loss gradients"],
        "backward: all": sum(plan["backward"].get(name, 0) for name in ("activations", "loss gradients", "gradients")),
    }
    return {name: (found[name], measured.parts[name]) for name in found}


COLUMNS = {
    "teacher: activations": "teacher's pass",
    "forward: activations": "student's forward",
    "loss: activations": "saved for backward",
    "loss: logits blocks": "logits blocks",
    "loss: loss gradients": "fp32 gradients of the loss",
    "backward: all": "backward, with gradients",
}


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"| | weights, teacher, optimizer, gradients | {' | '.join(COLUMNS.values())} |")
    print("|---|" + "---|" * (1 + len(COLUMNS)))
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = compare(case, Path(folder))
        states = [found[name] for name in ("weights", "teacher", "optimizer", "gradients")]
        cells = ["equal" if all(plan == real for plan, real in states) else str(states)]
        for plan, real in (found[name] for name in COLUMNS):
            cells.append(f"{plan / 2**20:.1f} / {real / 2**20:.1f}, {plan / real:.2f}")
        print(f"| {case.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
