"""Bad input ends in one clear error, before the model is loaded."""

import re
from types import SimpleNamespace

import pytest
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import make_model, make_tokenizer
from tiny_vlm import make_image
from trl import GRPOConfig

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.trainer.checks.world import check_world


MESSAGE = {"role": "user", "content": "What is 3 + 4?"}
ROW = {"prompt": [MESSAGE], "solution": "It is 7.", "answer": "7"}


@pytest.fixture
def refused(model_path, training_args, monkeypatch):
    def load_nothing(*args, **kwargs):
        raise AssertionError("the model was loaded before the input was checked")

    def check(rows, match, processing_class=None, trainer_kwargs=None, **settings):
        rows = [{**ROW, **row} for row in rows] if isinstance(rows, list) else rows
        dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
        args = OPSDConfig(**{**training_args, "per_device_train_batch_size": 1, **settings})
        monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", load_nothing)
        with pytest.raises(ValueError, match=match):
            OPSDTrainer(
                model=model_path,
                args=args,
                train_dataset=dataset,
                processing_class=processing_class,
                **(trainer_kwargs or {}),
            )

    return check


def test_missing_column(refused):
    rows = Dataset.from_list([{"prompt": [MESSAGE], "reference": "7", "level": 1}])
    refused(rows, "no column `solution`; its columns are `prompt`, `reference`, `level`")


def test_missing_prompt(refused):
    refused(Dataset.from_list([{"problem": "?", "solution": "!"}]), "no column `prompt`")


def test_empty_dataset(refused):
    refused(Dataset.from_dict({"prompt": [], "solution": []}), "train_dataset is empty")


@pytest.mark.parametrize(("value", "problem"), [("", "is empty"), ("  \n", "is empty"), (None, "is null")])
def test_solution_without_content(refused, value, problem):
    refused([{}, {"solution": value}], f"row 1: `solution` {problem}")


def test_solution_that_is_no_text(refused):
    both = {"solution": ["It is 7.", "Seven."], "completion": [{"role": "assistant", "content": "7"}]}
    refused([{**ROW, **both}], "row 0: `solution` is of type list", completions="dataset")


def test_prompt_that_ends_in_an_assistant_turn(refused):
    answer = {"role": "assistant", "content": "7"}
    refused([{}, {}, {"prompt": [MESSAGE, answer]}], "row 2: `prompt` ends in an assistant turn")


def test_template_with_an_unknown_placeholder(refused):
    refused(
        [{}],
        "no column `hint`; its columns are `prompt`, `solution`, `answer`",
        privileged_context="template",
        context_kwargs={"template": "{prompt} {hint}"},
    )


def test_teacher_prompt_over_budget(refused):
    refused(
        [{}, {"solution": "It is 7. " * 100}],
        r"Row 1 of `train_dataset`: .* more than the budget of 700. It is never truncated",
        max_teacher_prompt_length=700,
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"max_completion_length": 4000, "max_teacher_prompt_length": 97},
            r"leaves 96 beside a completion of 4000 .* too little for `max_te",
        ),
        (
            {"max_completion_length": 5000},
            r"leaves 0 beside a completion of 5000 .*any prompt.*or leave it unset",
        ),
    ],
)
def test_context_too_short_for_prompt_and_completion(refused, settings, match):
    refused([{}], match, **settings)


def test_completions_without_a_limit(refused):
    match = r"`max_completion_length=None` sets no limit.*20 tokens.*context of 4096"
    refused([{}], match, max_completion_length=None)


@pytest.mark.parametrize(("top_p", "announced"), [(0.9, True), (1.0, False)])
def test_importance_of_truncated_sampling(refused, monkeypatch, recwarn, top_p, announced):
    monkeypatch.setattr("trl_opsd.trainer.preparation.check_vllm_installed", lambda: None)
    settings = {"use_vllm": True, "top_p": top_p, "top_k": 0, "token_weights": {"importance_clip": {}}}
    refused([{"solution": ""}], "is empty", **settings)
    assert ["is not corrected" in str(warning.message) for warning in recwarn].count(True) == announced


def test_tokenizer_without_anything_to_pad_with(refused):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    refused([{}], "neither a pad token nor an eos token", processing_class=tokenizer)


@pytest.mark.parametrize("role", ["pad_token", "eos_token"])
def test_special_token_without_an_embedding(refused, role):
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({role: "[NEW]"})
    match = rf"'\[NEW\]' is token {size} of the tokenizer, .* `model.resize_token_embeddings\({size + 1}\)`"
    refused([{}], match, processing_class=tokenizer)


def test_token_of_a_prompt_without_an_embedding(refused):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["[THINK]"])
    refused([{}, {"solution": "[THINK] 7"}], r"Row 1 of `train_dataset`: '\[THINK\]' is", processing_class=tokenizer)
    tokenizer.chat_template = "[THINK]" + tokenizer.chat_template
    refused([{}], r"'\[THINK\]' is token", processing_class=tokenizer)


def test_conversational_prompts_without_a_chat_template(refused):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    refused([{}], "the tokenizer has no chat template", processing_class=tokenizer)


def test_fewer_rows_than_a_batch_draws(refused):
    refused([{}, {}], "has 2 rows, fewer than the 4 prompts", gradient_accumulation_steps=4)


def test_unknown_context(refused):
    refused([{}], "`privileged_context='hints'` is none of", privileged_context="hints")


def test_images(refused):
    refused([{"image": "cat.png"}], "has the column 'image', and the model reads text alone .`model_type` 'qwen3'.")


def test_eval_dataset_is_checked_too(refused):
    empty = Dataset.from_list([ROW, {**ROW, "solution": ""}])
    refused([{}], "eval_dataset, row 1: `solution` is empty", trainer_kwargs={"eval_dataset": empty})


def test_prompt_tuning(refused):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    refused([{}], "virtual tokens in front of the prompt", trainer_kwargs={"peft_config": config})


def test_off_policy_with_tools(refused):
    def now() -> str:
        """Tell the time."""
        return "noon"

    refused(
        [{"completion": "7"}],
        "`completions='dataset'` replaces rollouts .* drop `tools`",
        completions="dataset",
        trainer_kwargs={"tools": [now]},
    )


def test_grpo_config(model_path, training_args):
    with pytest.raises(ValueError, match="OPSDTrainer needs a `OPSDConfig` as `args`, got GRPOConfig"):
        OPSDTrainer(
            model=model_path,
            args=GRPOConfig(**training_args, num_generations=4),
            train_dataset=Dataset.from_list([ROW]),
        )


def test_streamed_row_without_content_names_its_index(model, tokenizer, training_args):
    rows = Dataset.from_list([ROW, ROW, {**ROW, "solution": ""}, ROW]).to_iterable_dataset()
    trainer = OPSDTrainer(
        model=model,
        args=OPSDConfig(**{**training_args, "shuffle_dataset": False}),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match="row 2: `solution` is empty"):
        trainer.train()


def test_external_teacher_with_another_vocabulary(refused, tmp_path):
    make_tokenizer(bos_token="<s>").save_pretrained(tmp_path)
    refused(
        [{}],
        r"has another vocabulary than the policy: .* Choose a teacher with the policy's tokenizer",
        teacher="external",
        teacher_model_name_or_path=str(tmp_path),
    )


def test_external_teacher_of_fewer_tokens_than_the_tokenizer_has(refused, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = make_model(tokenizer)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path)
    refused(
        [{}],
        r"logits over 100 tokens and the policy over 106.*resize_token_embeddings\(106\)",
        teacher="external",
        teacher_model_name_or_path=str(tmp_path),
    )


@pytest.mark.parametrize(
    ("kind", "plugin", "teacher", "message"),
    [
        ("fsdp", {"fsdp_version": 1, "reshard_after_forward": True}, "live", "Set `fsdp_version: 2`"),
        ("fsdp", {"fsdp_version": 2, "reshard_after_forward": False}, "ema", "`fsdp_reshard_after_forward: false`"),
        ("ddp", {}, "live", "asks for FSDP, but accelerate runs `MULTI_CPU` on 2 processes"),
        ("zero", {"offload_param": {"device": "nvme"}}, "initial", "ZeRO-3 keeps on NVMe"),
        ("zero", {"zero_quantized_nontrainable_weights": True}, "ema", "keeps weights that no gradient trains"),
        ("fp8", {}, "ema", "Set `mixed_precision: bf16`"),
        ("zero", {"stage": 2}, "offloaded", "DeepSpeed and FSDP2 manage the teacher's weights themselves"),
        ("lora", {}, "offloaded", "has no effect on `teacher='initial'` of a LoRA adapter"),
    ],
)
def test_sharding_that_cannot_work(kind, plugin, teacher, message, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(kind == "ddp").lower())
    state = SimpleNamespace(
        fsdp_plugin=SimpleNamespace(**plugin) if kind == "fsdp" else None,
        deepspeed_plugin=SimpleNamespace(deepspeed_config={"zero_optimization": plugin}) if kind == "zero" else None,
        distributed_type=SimpleNamespace(value="MULTI_CPU"),
    )
    accelerator = SimpleNamespace(state=state, num_processes=2, mixed_precision="fp8" if kind == "fp8" else "no")
    policy = make_model(make_tokenizer())
    settings = {"teacher_offload": True} if teacher == "offloaded" else {"teacher": teacher}
    with pytest.raises(ValueError, match=re.escape(message)):
        check_world(
            OPSDConfig(str(tmp_path), use_cpu=True, **settings),
            accelerator,
            get_peft_model(policy, LoraConfig()) if kind == "lora" else policy,
        )


@pytest.mark.parametrize(
    ("images", "teacher_images", "message"),
    [
        ([1, 0, 2], [0, 0, 0], "The student reads images in row 0 of the data and none in row 1"),
        ([0, 0, 0], [0, 1, 1], "The teacher reads images in row 1 of the data and none in row 0"),
        ([1, 1, 2], [0, 1, 1], None),
        ([0, 0, 0], [1, 1, 2], None),
    ],
)
def test_rows_without_images_under_deepspeed(images, teacher_images, message, tmp_path):
    rows = [
        {**ROW, "images": [make_image(1)] * number, "teacher_images": [make_image(2)] * its}
        for number, its in zip(images, teacher_images, strict=True)
    ]
    zero2 = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}})
    state = SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=zero2)
    accelerator = SimpleNamespace(state=state, num_processes=2, mixed_precision="no")
    given = OPSDConfig(str(tmp_path), use_cpu=True), accelerator, make_model(make_tokenizer()), Dataset.from_list(rows)
    if message is None:
        check_world(*given)
    else:
        with pytest.raises(ValueError, match=message):
            check_world(*given)
