import io
from typing import get_args

import pytest
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer
from trl_opsd.objective import Divergence, Objective
from trl_opsd.objective.divergence import REWARDS
from trl_opsd.report import PromptPreviewCallback


@pytest.fixture
def preview(model, tokenizer, training_args):
    def show(row, main_process=True, peft_config=None, **fields):
        trainer = SelfDistillationTrainer(
            model,
            args=SelfDistillationConfig(**{**training_args, **fields}),
            train_dataset=Dataset.from_list([row] * 4),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.state.max_steps = 1234
        trainer.state.is_world_process_zero = main_process
        console = Console(file=io.StringIO(), width=100)
        PromptPreviewCallback(trainer, console).on_train_begin(trainer.args, trainer.state, trainer.control)
        return console.file.getvalue(), trainer

    return show


def messages(text):
    return [{"role": "user", "content": text}]


def test_prompts_are_shown_as_the_model_reads_them(preview):
    long_line = "word " * 60
    text = f"[bold]not markup[/bold] [/closing] \\boxed{{}}\x0c{long_line}"

    output, trainer = preview({"prompt": messages(text), "solution": "[i]4[/i]"})

    student_ids, teacher_ids = trainer.preview_prompts()
    shown = text.replace("\x0c", "\\x0c")
    assert f"<|im_start|>user\n{shown}<|im_end|>\n<|im_start|>assistant\n" in output
    assert "[i]4[/i]" in output
    assert f"Student prompt, {len(student_ids)} tokens" in output
    assert f"Teacher prompt, {len(teacher_ids)} tokens" in output


def test_plain_prompts(preview):
    output, _ = preview({"prompt": "2 + 2 =", "solution": "4"})

    assert "\n2 + 2 =\n" in output
    assert "<|im_start|>" not in output.split("Teacher prompt")[0]


def test_teacher_prompt_that_needs_the_rollouts(preview, tmp_path):
    output, _ = preview({"prompt": messages("2 + 2?")}, privileged_context=f"{__name__}.FromRollouts")

    assert "needs the student's rollouts" in output


class FromRollouts:
    columns = ()

    def teacher_messages(self, row, rollouts):
        return None if rollouts is None else row["prompt"]


def test_who_trains_whom(preview):
    output, trainer = preview(
        {"prompt": messages("2 + 2?"), "answer": "4", "completion": "4"},
        privileged_context="answer",
        context_kwargs={"column": "answer"},
        teacher="periodic",
        teacher_update_steps=7,
        divergence="jsd",
        jsd_weight=0.25,
        divergence_clip=0.05,
        distillation_temperature=0.75,
        completions="dataset",
        completions_kwargs={"lmbda": 0.75},
    )

    table = {
        name.strip(): value.strip()
        for _, name, value, _ in (line.split("│") for line in output.splitlines() if "│" in line)
    }
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert table == {
        "student": "Qwen3ForCausalLM",
        "trainable parameters": f"{count:,} of {count:,} (full)",
        "teacher": "periodic: a copy of the student, renewed every 7 optimizer steps",
        "privileged context": "answer (column='answer')",
        "loss": "divergence",
        "divergence": "JSD, weight 0.25, temperature 0.75",
        "clip": "0.05 per vocabulary entry",
        "rollouts per prompt": "1, up to 8 tokens; 25% of the sequences come from the dataset instead",
        "rollout engine": "transformers, temperature 1",
        "steps": "1,234, of 4 rollouts each",
    }


@pytest.mark.parametrize("teacher", SelfDistillationConfig.__dataclass_fields__["teacher"].metadata["choices"])
def test_every_teacher_is_described(preview, teacher, model_path):
    settings = {
        "external": {"teacher_model_name_or_path": model_path},
        "several": {"teachers": {"sums": {"teacher": "initial"}, "code": {"teacher": "live"}}},
    }
    row = {"prompt": messages("2 + 2?"), "solution": "4", "teacher": "sums"}

    output, _ = preview(row, teacher=teacher, **settings.get(teacher, {}))

    assert f"│ {teacher}: " in output


@pytest.mark.parametrize("divergence", get_args(Divergence))
def test_every_divergence_is_described(divergence):
    support = "student_top_k" if divergence in REWARDS else "full"
    assert Objective(divergence, support=support, temperature=0.5).description.endswith(", temperature 0.5")


def test_lora(preview):
    output, trainer = preview(
        {"prompt": messages("2 + 2?"), "solution": "4"},
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )

    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert f"│ {trainable:,} of " in output
    assert "(LoRA)" in output


def test_only_the_main_process_prints(preview):
    assert preview({"prompt": messages("2 + 2?"), "solution": "4"}, main_process=False)[0] == ""
