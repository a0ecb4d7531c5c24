"""Vision-language models: student and teacher read images, and the loss is that of a plain loop."""

from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from plain_loop import Method, Row, loss_and_gradient, plain, probabilities
from rich.console import Console
from tiny import away_from
from tiny_vlm import FAMILIES, make_image, make_vlm
from transformers import AutoProcessor, LlavaNextProcessor, TrainerControl, TrainerState
from trl import GRPOTrainer

from trl_opsd import OPSDConfig, OPSDTrainer, SelfDistillationTrainer, score
from trl_opsd.methods.rlsd import RLSDConfig
from trl_opsd.report import PromptPreviewCallback
from trl_opsd.serving import longest_prompt


COMPLETIONS = [[40, 12, 77, 3], [9, 81, 33, 54, 20, 66, 3], [25, 3], [17, 92, 45, 60, 31]]
REWARDS = [0.0, 1.0, 2.0, 5.0]
ADVANTAGES = [-0.5, 0.5, -1.5, 1.5]  # groups of two
SOLUTIONS = ["It is a cat.", "A dog, as the second one shows."]

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


def make_rows(first=1):
    """One image and none of the teacher's own; two images of other sizes in their places, and one that it has."""
    one = {
        "prompt": [{"role": "user", "content": "What is this?"}],
        "images": [make_image(first, (20, 28))],
        "teacher_images": [],
    }
    text, place = {"type": "text", "text": "And"}, {"type": "image"}
    other = {
        "prompt": [{"role": "user", "content": [text, place, {"type": "text", "text": "or"}, place]}],
        "images": [make_image(2, (30, 14)), make_image(3, (14, 14))],
        "teacher_images": [make_image(4, (16, 24))],
    }
    return [{**row, "solution": solution} for row, solution in zip((one, other), SOLUTIONS, strict=True)]


def rollout(prompts, trainer):
    return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": COMPLETIONS, "logprobs": None}


def reward(completions, **kwargs):
    return REWARDS


@pytest.fixture
def make_trainer(training_args, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def make(family, config_class=OPSDConfig, dataset=None, model=None, peft_config=None, **settings):
        own_model, processor = make_vlm(family)
        with_reward = config_class is RLSDConfig or settings.get("policy_loss_coef")
        trainer = SelfDistillationTrainer(
            model=own_model if model is None else model,
            reward_funcs=reward if with_reward else None,
            args=config_class(**{**training_args, "chat_template_kwargs": None, **settings}),
            train_dataset=dataset if dataset is not None else Dataset.from_list(make_rows()[:1] * 4),
            processing_class=processor,
            rollout_func=rollout,
            peft_config=peft_config,
        )
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


def read_by_hand(trainer, messages):
    """Token ids and what else the processor makes of messages with images."""
    made = trainer.processing_class.apply_chat_template(
        [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    rest = {name: value for name, value in made.items() if name not in ("input_ids", "attention_mask")}
    return made["input_ids"][0].tolist(), rest


def plain_rows(trainer, rows, **given):
    """The rollouts, with prompts whose images are put in their places here."""
    image = [[{"type": "image", "image": its} for its in row["images"]] for row in rows]
    made = []
    for index, (row, images) in enumerate(zip(rows, image, strict=True)):
        text = "What is this?" if len(images) == 1 else "Andor"
        privileged = trainer.context.teacher_messages({**row, "prompt": [{"role": "user", "content": text}]}, None)
        ((role, content),) = [(message["role"], message["content"]) for message in privileged]
        if len(images) == 1:
            parts = [images[0], {"type": "text", "text": text}]
            before, after = content.split(text)
            teacher = [{"type": "text", "text": before}, *parts, {"type": "text", "text": after}]
        else:
            parts = [{"type": "text", "text": "And"}, images[0], {"type": "text", "text": "or"}, images[1]]
            before, after = content.split(text)
            own = [{"type": "image", "image": its} for its in row["teacher_images"]]
            teacher = [{"type": "text", "text": before}, *parts, *own, {"type": "text", "text": after}]
        prompt, its = read_by_hand(trainer, [{"role": "user", "content": parts}])
        teacher_prompt, teachers = read_by_hand(trainer, [{"role": role, "content": teacher}])
        values = {name: value[index] for name, value in given.items()}
        completion = COMPLETIONS[index]
        made.append(Row(prompt, teacher_prompt, completion, images=its, teacher_images=teachers, **values))
    return made


def assert_equals_plain(loss, model, expected, rel=1e-4):
    expected_loss, expected_gradient = expected
    if loss.requires_grad:
        loss.backward()  # of the last pass: the others' gradients are there
    largest = max(value.abs().max() for value in expected_gradient.values()).item()
    assert largest > 1e-4
    assert any("vis" in name and value.abs().max() > 1e-6 for name, value in expected_gradient.items())
    assert loss.item() == pytest.approx(expected_loss, rel=rel)
    for name, parameter in model.named_parameters():
        value = expected_gradient.get(name)
        if value is None:  # layers whose output is not read
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad.double(), value, rtol=1e-3, atol=2e-5 * largest, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    @pytest.mark.parametrize(
        "settings", [{}, {"max_tokens_per_microbatch": 100}, {"pad_to_multiple_of": 16}], ids=["", "cut", "padded"]
    )
    def test_opsd(self, make_trainer, family, settings):
        trainer = make_trainer(family, **settings)
        teacher = away_from(trainer.model)
        rows = [row for row in make_rows() for _ in range(2)]
        batch = trainer._generate_and_score_completions(rows)
        method = Method("forward_kl", clip=0.05, temperature=1.1)
        expected = loss_and_gradient(trainer.model, teacher, plain_rows(trainer, rows), method)
        assert_equals_plain(trainer._compute_loss(trainer.model, batch), trainer.model, expected)

    def test_opsd_of_an_adapter(self, make_trainer, family):
        trainer = make_trainer(family, peft_config=LoraConfig(r=2, target_modules="all-linear"))
        teacher, _ = make_vlm(family)
        generator = torch.Generator().manual_seed(1)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
        rows = [row for row in make_rows() for _ in range(2)]
        batch = trainer._generate_and_score_completions(rows)
        method = Method("forward_kl", clip=0.05, temperature=1.1)
        loss, gradient = loss_and_gradient(trainer.model, teacher, plain_rows(trainer, rows), method)
        learns = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        expected = loss, {name: value for name, value in gradient.items() if name in learns}
        assert_equals_plain(trainer._compute_loss(trainer.model, batch), trainer.model, expected)

    def test_rlsd(self, make_trainer, family):
        trainer = make_trainer(family, RLSDConfig, num_generations=2, scale_rewards="none")
        teacher = away_from(trainer.model)
        rows = [row for row in make_rows() for _ in range(2)]
        made = plain_rows(trainer, rows)
        advantages = []
        for row, advantage in zip(made, ADVANTAGES, strict=True):
            token_ids = torch.tensor(row.completion)[:, None]
            p_s = probabilities(plain(trainer.model), row.prompt, row.completion, 1.0, row.images)
            p_t = probabilities(plain(teacher), row.teacher_prompt, row.completion, 1.0, row.teacher_images)
            ratio = (p_t / p_s).gather(1, token_ids)[:, 0]
            ratio = ratio.clamp(0.8, 1.2) if advantage > 0 else (1 / ratio).clamp(0.8, 1.2)
            advantages.append((advantage * (0.5 + 0.5 * ratio)).tolist())
        method = Method(divergence_coef=0.0, policy_loss_coef=1.0, loss_type="dapo", epsilon_high=0.28)
        expected = loss_and_gradient(trainer.model, teacher, plain_rows(trainer, rows, advantage=advantages), method)
        batch = trainer._generate_and_score_completions(rows)
        assert_equals_plain(trainer._compute_loss(trainer.model, batch), trainer.model, expected, rel=1e-3)

    def test_images_matter_to_who_reads_them(self, make_trainer, family):
        trainer = make_trainer(family)
        away_from(trainer.model)
        rows = make_rows()
        first = score(trainer, rows, COMPLETIONS[:2]).scores
        other_image = score(trainer, [make_rows(first=9)[0], rows[1]], COMPLETIONS[:2]).scores
        own = {**rows[1], "teacher_images": [make_image(8, (16, 24))]}
        other_of_teacher = score(trainer, [rows[0], own], COMPLETIONS[:2]).scores

        def differ(scores, name):
            return [not torch.equal(a, b) for a, b in zip(getattr(first, name), getattr(scores, name), strict=True)]

        assert differ(other_image, "student_log_prob") == [True, False]
        assert differ(other_image, "teacher_log_prob") == [True, False]
        assert differ(other_of_teacher, "student_log_prob") == [False, False]
        assert differ(other_of_teacher, "teacher_log_prob") == [False, True]


def steps_of(trainer, rows):
    """Loss and gradient of a batch."""
    batch = trainer._generate_and_score_completions(rows)
    trainer._compute_loss(trainer.model, batch).backward()
    return {name: value.grad.clone() for name, value in trainer.model.named_parameters() if value.grad is not None}


class TestPolicyTerm:
    def test_own_pass_reads_the_same(self, make_trainer):
        """GRPOTrainer's own forward pass, and the one it shares with the divergence."""
        rows, gradients = [row for row in make_rows() for _ in range(2)], []
        for shares in (True, False):
            trainer = make_trainer("qwen3_vl", policy_loss_coef=1.0, num_generations=2)
            trainer.grpo_loss.shares_pass = shares
            gradients.append(steps_of(trainer, rows))
        assert gradients[0].keys() == gradients[1].keys()
        for name, value in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], value, rtol=1e-3, atol=1e-5)

    def test_reference_policy_reads_the_images(self, make_trainer, tmp_path):
        make_vlm("llava_next")[0].save_pretrained(tmp_path / "base")
        settings = {"policy_loss_coef": 1.0, "num_generations": 2, "beta": 0.1}
        trainer = make_trainer("llava_next", model=str(tmp_path / "base"), **settings)
        reference = away_from(trainer.model)
        rows = [row for row in make_rows() for _ in range(2)]
        found = trainer._generate_and_score_completions(rows)["ref_per_token_logps"]
        for row, log_probs in zip(plain_rows(trainer, rows), found, strict=True):
            expected = probabilities(plain(reference), row.prompt, row.completion, 1.1, row.images).log()
            expected = expected.gather(1, torch.tensor(row.completion)[:, None])[:, 0]
            torch.testing.assert_close(log_probs[: len(expected)].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_rows_without_images_among_others(make_trainer, family):
    trainer = make_trainer(family)
    teacher = away_from(trainer.model)
    rows = [*make_rows(), *make_rows()]
    for index in (0, 2):
        rows[index] = {**rows[index], "images": []}
    batch = trainer._generate_and_score_completions(rows)
    some = [index for index, images in enumerate(batch["images"]) if images]
    assert some == [1, 3]
    loss = trainer._compute_loss(trainer.model, batch).item()
    text = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}]}]
    privileged = trainer.context.teacher_messages(
        {**rows[0], "prompt": [{"role": "user", "content": "What is this?"}]}, None
    )
    asked = [{**privileged[0], "content": [{"type": "text", "text": privileged[0]["content"]}]}]
    plain_ones = plain_rows(trainer, make_rows() * 2)
    for index in (0, 2):
        plain_ones[index].prompt, plain_ones[index].images = read_by_hand(trainer, text)
        plain_ones[index].teacher_prompt, plain_ones[index].teacher_images = read_by_hand(trainer, asked)
    expected, _ = loss_and_gradient(trainer.model, teacher, plain_ones, Method(clip=0.05, temperature=1.1))
    assert loss == pytest.approx(expected, rel=1e-4)


def test_only_the_teacher_sees_a_figure(make_trainer):
    row = {"prompt": [{"role": "user", "content": "What?"}], "solution": "A cat.", "teacher_images": [make_image(1)]}
    trainer = make_trainer("gemma3", dataset=Dataset.from_list([row] * 4))
    batch = trainer._generate_and_score_completions([row] * 4)
    assert "images" not in batch
    assert [set(images) for images in batch["teacher_images"]] == [{"pixel_values"}] * 4


def test_an_engines_context_has_to_take_the_images(make_trainer):
    rows = make_rows()[1:]
    trainer = make_trainer("qwen2_5_vl", dataset=Dataset.from_list(rows * 4))
    [row] = plain_rows(trainer, rows)
    assert row.prompt.count(trainer.model.config.image_token_id) > 10
    assert longest_prompt(trainer.train_dataset, trainer.tokenize_prompts, trainer.accelerator) == len(row.prompt)


def test_what_is_off_with_images_is_said(make_trainer, monkeypatch):
    said = []
    monkeypatch.setattr("trl_opsd.trainer.loss.logger.warning_once", said.append)
    trainer = make_trainer("qwen2_5_vl", num_generations=2)
    [message] = said
    assert "reads more than text, so rows are padded" in message
    assert "reads a prompt for each of its rollouts" in message
    assert not trainer.loss.networks.can_share_prompts


def train(trainer_class, processor, model, training_args, dataset, **settings):
    peft_config = settings.pop("peft_config", None)
    args = OPSDConfig(**{**training_args, "chat_template_kwargs": None, **settings})
    trainer = trainer_class(
        model=model, args=args, train_dataset=dataset, processing_class=processor, peft_config=peft_config
    )
    trainer.train()
    return trainer


class TestRuns:
    def test_lora_samples_trains_and_saves_with_its_processor(self, training_args, tmp_path):
        model, processor = make_vlm("llava_next")
        model.save_pretrained(tmp_path / "base")
        processor.save_pretrained(tmp_path / "base")
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=True)
        trainer = train(
            OPSDTrainer,
            None,
            str(tmp_path / "base"),
            training_args,
            Dataset.from_list(make_rows()[:1] * 4),
            peft_config=lora,
            save_strategy="steps",
            save_steps=1,
        )
        assert isinstance(trainer.processing_class, LlavaNextProcessor)
        trainer.save_model(str(tmp_path / "saved"))
        for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-1"):
            assert isinstance(AutoProcessor.from_pretrained(folder), LlavaNextProcessor)

    def test_rows_of_a_group_and_a_resumed_run(self, training_args, tmp_path):
        """Rollouts that are left over are saved with their images."""
        data = Dataset.from_list(make_rows()[:1] * 8)
        settings = {
            "per_device_train_batch_size": 2,
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": 2,
        }
        model, processor = make_vlm("llava_next")
        whole = train(OPSDTrainer, processor, model, training_args, data, **settings)
        model, processor = make_vlm("llava_next")
        args = OPSDConfig(**{**training_args, "chat_template_kwargs": None, **settings})
        resumed = OPSDTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_stream(self, training_args):
        model, processor = make_vlm("gemma3")
        stream = Dataset.from_list(make_rows()[:1] * 8).to_iterable_dataset()
        assert train(OPSDTrainer, processor, model, training_args, stream).state.global_step == 2

    def test_preview_shows_images_as_marks(self, training_args):
        model, processor = make_vlm("qwen2_5_vl")
        args = OPSDConfig(**{**training_args, "chat_template_kwargs": None})
        trainer = OPSDTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(make_rows()[:1] * 4), processing_class=processor
        )
        console = Console(record=True, width=200)
        state = TrainerState(is_world_process_zero=True, max_steps=2)
        PromptPreviewCallback(trainer, console).on_train_begin(args, state, TrainerControl())
        shown = console.export_text()
        assert shown.count("[image, 8 tokens]") == 2
        assert "image_pad" not in shown


def test_images_that_tools_return(training_args, monkeypatch):
    """They stand in the completion, after those of the prompt, for student and teacher."""
    model, processor = make_vlm("qwen3_vl")
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3_vl.jinja"
    processor.chat_template = template.read_text()
    shown = [make_image(7, (16, 24))]

    def look() -> list:
        """
        Look again.

        Returns:
            What is seen.
        """
        return [{"type": "image", "image": shown[0]}, {"type": "text", "text": "seen"}]

    settings = {"max_completion_length": 400, "chat_template_kwargs": None, "temperature": 1.0}
    trainer = OPSDTrainer(
        model=model,
        args=OPSDConfig(**{**training_args, **settings}),
        train_dataset=Dataset.from_list(make_rows()[:1] * 4),
        processing_class=processor,
        tools=[look],
    )
    trainer.current_gradient_accumulation_steps = 1
    call, answer = (
        processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ('<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>', "A cat.<|im_end|>")
    )
    turns = []

    def generate(self, prompt_ids, *asked):
        turns.append(prompt_ids)
        return [answer if len(turns) % 2 == 0 else call for _ in prompt_ids], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)
    rows = make_rows()
    losses = []
    for seed in (7, 8):
        shown[0] = make_image(seed, (16, 24))
        batch = trainer._generate_and_score_completions(rows)
        tool_image = processor.image_processor(images=[shown[0]], return_tensors="pt")["pixel_values"]
        for name, numbers in (("images", [2, 3]), ("teacher_images", [2, 4])):
            assert [len(images["image_grid_thw"]) for images in batch[name]] == numbers
            assert all(torch.equal(images["pixel_values"][-len(tool_image) :], tool_image) for images in batch[name])
        assert (batch["completion_ids"] == model.config.image_token_id).sum(dim=1).tolist() == [
            len(tool_image) // 4
        ] * 2
        losses.append(trainer._compute_loss(model, batch).item())
    assert losses[0] != losses[1]
