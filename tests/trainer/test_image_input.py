"""Images that cannot be read are refused before a model is loaded, naming the column or the row."""

import json
from shutil import copytree

import pytest
from datasets import Dataset
from tiny_vlm import make_image, make_vlm

from trl_opsd import OPSDConfig, OPSDTrainer


MESSAGE = {"role": "user", "content": "What is this?"}
ROW = {"prompt": [MESSAGE], "solution": "A cat."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a tiny vision-language model and its processor."""
    path = tmp_path_factory.mktemp("tiny-llava-next")
    for part in make_vlm("llava_next"):
        part.save_pretrained(path)
    return str(path)


@pytest.fixture
def refused(folder, training_args, monkeypatch):
    def load_nothing(*args, **kwargs):
        raise AssertionError("the model was loaded before the input was checked")

    def check(rows, match, model=folder, processing_class=None, reward_funcs=None, **settings):
        args = OPSDConfig(
            **{**training_args, "per_device_train_batch_size": 1, "chat_template_kwargs": None, **settings}
        )
        monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", load_nothing)
        with pytest.raises(ValueError, match=match):
            OPSDTrainer(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=Dataset.from_list([{**ROW, **row} for row in rows]),
                processing_class=processing_class,
            )

    return check


@pytest.mark.parametrize("column", ["image", "images", "teacher_images"])
def test_model_of_text(refused, model_path, column):
    images = make_image(1) if column == "image" else [make_image(1)]
    refused([{column: images}], f"has the column '{column}', and the model reads text alone", model=model_path)


def test_tokenizer(refused):
    tokenizer = make_vlm("llava_next")[1].tokenizer
    refused([{"image": make_image(1)}], "`processing_class` is a tokenizer", processing_class=tokenizer)


def test_no_chat_template(refused):
    processor = make_vlm("llava_next")[1]
    processor.chat_template = None
    refused(
        [{"image": make_image(1)}], "has images, but the processor has no chat template", processing_class=processor
    )
    refused([{}], "conversational prompts, but the processor has no chat template", processing_class=processor)


def test_over_budget(refused):
    """No image is cut: the row is named, with the tokens that stand for images."""
    rows = [{"image": make_image(1, (8, 8))}, {"image": make_image(1, (64, 64))}]
    refused(
        rows, r"Row 0 .*has \d+ tokens, \d+ of them for images, .* make images smaller", max_teacher_prompt_length=100
    )


def test_over_budget_is_skipped_if_asked(folder, training_args):
    rows = [{**ROW, "teacher_images": [make_image(1)] * number} for number in (0, 9, 0, 9)]
    settings = {"max_teacher_prompt_length": 500, "overlong_teacher_prompt": "skip", "chat_template_kwargs": None}
    args = OPSDConfig(**{**training_args, **settings})
    trainer = OPSDTrainer(model=folder, args=args, train_dataset=Dataset.from_list(rows))
    batch = trainer._generate_and_score_completions(rows)
    assert batch["has_context"].tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"image": make_image(1)}, {"image": None}], "train_dataset, row 1: `image` is null"),
        ([{"images": [make_image(1)]}, {"images": None}], "row 1: `images` is null.* has an empty list"),
        ([{"teacher_images": [make_image(1)]}, {"teacher_images": None}], "row 1: `teacher_images` is null"),
        ([{"image": make_image(1), "prompt": "What?"}], "row 0: `prompt` is plain text, and has images"),
        (
            [{"image": make_image(1), "prompt": [{"role": "user", "content": [{"type": "image"}] * 2}]}],
            "row 0: `prompt` has 2 places for images, and the row has 1",
        ),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}],
            "row 0: `prompt` has 1 places for images, and the row has 0",
        ),
        (
            [{"image": make_image(1), "prompt": [{"role": "user", "content": [{"type": "text", "text": "?"}]}]}],
            "row 0: `prompt` has no place for its 1 images",
        ),
    ],
)
def test_row_without_its_image(refused, rows, problem):
    refused(rows, problem)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"privileged_context": "reflection"}, "would be shown the text alone"),
        ({"completions": "teacher", "completions_kwargs": {"share": 0.5}}, "`completions='teacher'`"),
        (
            {
                "teacher": "external",
                "teacher_server_base_url": "http://localhost:1",
                "divergence_support": "teacher_top_k",
                "temperature": 1.0,
            },
            "is sent token ids",
        ),
    ],
)
def test_parts_that_read_text_alone(refused, monkeypatch, settings, problem):
    monkeypatch.setattr("trl_opsd.trainer.preparation.check_vllm_installed", lambda: None)
    refused([{"image": make_image(1)}], problem, reward_funcs=lambda completions, **kwargs: [0.0], **settings)


def test_external_teacher_of_another_kind(refused, folder, tmp_path):
    teacher = copytree(folder, tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    settings = {"teacher": "external", "teacher_model_name_or_path": str(teacher)}
    refused([{"image": make_image(1)}], "is of another kind .`model_type` 'llava'", **settings)
