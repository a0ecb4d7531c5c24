"""`trl-opsd inspect`, with a tiny model."""

import base64
import json
import re

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trl_opsd import SelfDistillationTrainer
from trl_opsd.cli import main
from trl_opsd.scripts.train import make_parser, run


def unknown(completions, **kwargs):
    """A reward function that applies to nothing."""
    return [None] * len(completions)


def of_one(completions, **kwargs):
    """Applies to every other completion."""
    return [None if index % 2 else 0.5 for index in range(len(completions))]


@pytest.fixture
def inspected(tmp_path, model_path, device):
    """What a page of the command shows, of a model or a run."""
    rows = [{"prompt": f"{n}+{n}=", "solution": f"Two times {n} are {2 * n}."} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": model_path,
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "use_cpu": device.type == "cpu",
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_completion_length": 6,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "divergence": "forward_kl",
        "distillation_temperature": 1.0,
        "temperature": 1.0,
    }
    recipe = tmp_path / "opsd.yaml"
    recipe.write_text(yaml.safe_dump(settings))

    def inspect(what=model_path, *args, status=0):
        page = tmp_path / "page.html"
        assert main(["inspect", str(what), "--config", str(recipe), "--output", str(page), *args]) == status
        [data] = re.findall(r'<script type="application/json" id="inspected">(.*?)</script>', page.read_text())
        return json.loads(data)

    inspect.recipe, inspect.folder = recipe, tmp_path
    return inspect


def ids(page, column):
    places = np.frombuffer(base64.b64decode(column), dtype="<u2" if page["bytes_per_place"] == 2 else "<u4")
    return [page["ids"][place] for place in places]


def log_probs(model, prompt, completion):
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion)), completion]


def assert_is_said_by(page, student, teacher):
    """Both sides' log-probabilities are those of two models, by a plain forward."""
    for its in page["rollouts"]:
        completion = ids(page, its["completion"])
        for side, model in (("student", student), ("teacher", teacher)):
            found = np.frombuffer(base64.b64decode(its["values"][f"{side}_log_prob"]), dtype="<f4")
            expected = log_probs(model, ids(page, its[f"{side}_prompt"]), completion)
            torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


def test_a_model(inspected, model_path, tokenizer, capsys):
    page = inspected(model_path, "--rollouts", "4")
    assert re.search(r"^Page: .*page\.html$", capsys.readouterr().out, re.MULTILINE)
    # Rows from all over the data set, the same ones each time
    assert [its["facts"]["row"] for its in page["rollouts"]] == [1, 4, 7, 10]
    for its in page["rollouts"]:
        row = its["facts"]["row"]
        assert tokenizer.decode(ids(page, its["student_prompt"])) == f"{row}+{row}="
        assert f"Two times {row} are {2 * row}." in tokenizer.decode(ids(page, its["teacher_prompt"]))
        is_cut_off = ids(page, its["completion"])[-1] != tokenizer.eos_token_id
        assert its["facts"].get("truncated") == ("yes" if is_cut_off else None)
        assert "reward" not in its["facts"]
    model = AutoModelForCausalLM.from_pretrained(model_path)
    assert_is_said_by(page, model, model)
    assert len(inspected(model_path, "--rollouts", "50")["rollouts"]) == 12


@pytest.mark.parametrize("lora", [False, True])
def test_a_run(inspected, model_path, lora):
    flags = ["--use_peft", "--lora_r", "4"] if lora else []
    config = ["--config", str(inspected.recipe), "--save_strategy", "steps", "--save_steps", "1", *flags]
    run(*make_parser("opsd").parse_args_and_config(config))
    out, base = inspected.folder / "out", AutoModelForCausalLM.from_pretrained(model_path)
    for what, checkpoint in ((out, "checkpoint-2"), (out / "checkpoint-1", "checkpoint-1")):
        page = inspected(what, "--rollouts", "2", *flags)
        if lora:
            student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), out / checkpoint)
        else:
            student = AutoModelForCausalLM.from_pretrained(out / checkpoint)
        assert_is_said_by(page, student, base)  # the teacher is the initial policy
    assert sorted(path.name for path in out.glob("inspect*")) == []  # nothing is left in the run's folder


def test_given_completions(inspected, model_path, tokenizer):
    given = [{"row": 3, "completion": "six"}, {"row": 0, "completion_ids": [7, 8, tokenizer.eos_token_id]}]
    file = inspected.folder / "given.jsonl"
    file.write_text("".join(json.dumps(its) + "\n" for its in given))
    page = inspected(model_path, "--completions", str(file))
    texts = [tokenizer.decode(ids(page, its["completion"])) for its in page["rollouts"]]
    assert texts == ["six", tokenizer.decode([7, 8, tokenizer.eos_token_id])]
    assert [its["facts"]["row"] for its in page["rollouts"]] == [3, 0]


def test_rewards_that_nobody_knows_are_not_shown_as_zero(inspected, model_path):
    flags = "--rollouts", "4", "--num_generations", "2", "--policy_loss_coef", "0.1", "--reward_funcs"
    page = inspected(model_path, *flags, "scripts.test_inspect.unknown")
    assert [its["facts"]["reward"] for its in page["rollouts"]] == [None] * 4
    page = inspected(model_path, *flags, "scripts.test_inspect.unknown", "scripts.test_inspect.of_one")
    assert [its["facts"]["reward"] for its in page["rollouts"]] == [0.5, None] * 2
    assert [its["facts"]["unknown"] for its in page["rollouts"]] == [None] * 4
    assert [its["facts"]["of_one"] for its in page["rollouts"]] == [0.5, None] * 2


def test_rows_of_a_test_split_and_of_a_stream(inspected, model_path, tokenizer):
    (inspected.folder / "data").mkdir()
    for split, sign in (("train", "+"), ("test", "-")):
        rows = [{"prompt": f"{n}{sign}{n}=", "solution": "It is that."} for n in range(6)]
        (inspected.folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--dataset_name", str(inspected.folder / "data"), "--rollouts", "2"

    def prompts(*more):
        page = inspected(model_path, *flags, *more)
        return [tokenizer.decode(ids(page, its["student_prompt"])) for its in page["rollouts"]]

    assert prompts("--held_out") == ["1-1=", "4-4="]
    assert prompts("--dataset_streaming") == ["0+0=", "1+1="]


@pytest.fixture
def interrupted(monkeypatch):
    """Has sampling be interrupted at one of its calls."""
    own = SelfDistillationTrainer.sample

    def at(number):
        asked = []

        def sample(self, *args, **kwargs):
            asked.append(args)
            if len(asked) == number:
                raise KeyboardInterrupt
            return own(self, *args, **kwargs)

        monkeypatch.setattr(SelfDistillationTrainer, "sample", sample)

    return at


def test_interrupted_it_shows_the_groups_that_are_there(inspected, model_path, interrupted, capsys):
    flags = "--num_generations", "2", "--policy_loss_coef", "0.1", "--reward_funcs", "scripts.test_inspect.of_one"
    batches = "--per_device_eval_batch_size", "3", "--rollouts", "12"
    whole = inspected(model_path, *flags, *batches)
    interrupted(3)
    page = inspected(model_path, *flags, *batches, status=130)
    assert "The page shows 6 of 12 rollouts." in capsys.readouterr().err
    shown = [(its["facts"], ids(page, its["completion"])) for its in page["rollouts"]]
    assert shown == [(its["facts"], ids(whole, its["completion"])) for its in whole["rollouts"][:6]]
    interrupted(2)
    assert len(inspected(model_path, *flags, *batches, status=130)["rollouts"]) == 2


def test_interrupted_before_there_is_a_rollout_it_leaves_no_page(inspected, model_path, interrupted, capsys):
    interrupted(1)
    assert main(["inspect", model_path, "--config", str(inspected.recipe), "--output", "page.html"]) == 130
    assert "interrupted. No page was written." in capsys.readouterr().err
    assert not (inspected.folder / "page.html").exists()


def test_progress_is_shown(inspected, model_path, capsys):
    inspected(model_path, "--rollouts", "4", "--disable_tqdm", "false")
    assert re.search(r"sampling: 100%.* 4/4", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rollouts", "0"], "`--rollouts` must be at least 1, got 0."),
        (["--learning_rat", "1"], "Did you mean `--learning_rate`?"),
        (["--num_processes", "2"], "a page is made in one process"),
        (["--completions", "given.jsonl"], "Line 2 of given.jsonl needs `row`"),
        (["--completions", "given.jsonl", "--dataset_streaming"], "set `dataset_streaming: false`"),
        (["--completions", "none.jsonl"], "none.jsonl"),
    ],
)
def test_bad_input(inspected, model_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(inspected.folder)
    (inspected.folder / "given.jsonl").write_text('{"row": 1, "completion": "2"}\n{"row": 12, "completion": "2"}\n')
    assert main(["inspect", model_path, "--config", str(inspected.recipe), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (inspected.folder / "inspect.html").exists()


def test_an_adapter_without_a_checkpoint_is_refused(inspected, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert main(["inspect", str(tmp_path / "adapter"), "--config", str(inspected.recipe)]) == 2
    assert "holds an adapter and no checkpoint" in capsys.readouterr().err
