import json
import os
import subprocess
import sys
from shutil import copytree

import pytest
import yaml
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from trl_opsd.scripts.train import find_checkpoint, main, make_parser, run
from trl_opsd.trainer.checkpoints import begin, finish


@pytest.fixture
def recipe(tmp_path, model_path, device):
    rows = [{"problem": f"What is {n} + {n}?", "reference": f"[b]{2 * n}[/b]"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**fields):
        settings = {
            "model_name_or_path": model_path,
            "dataset_name": str(tmp_path / "rows.jsonl"),
            "column_mapping": {"reference": "solution"},
            "prompt_template": "{problem} [red]Brief![/red]",
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
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            **fields,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write


def train(method, *args):
    run(*make_parser(method).parse_args_and_config(list(args)))


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_opsd(recipe, tmp_path, model_path, capsys):
    train("opsd", "--config", recipe())

    before, after = weights(model_path), weights(tmp_path / "out")
    assert any(not before[name].equal(after[name]) for name in before)
    output = capsys.readouterr().out
    student, teacher = output.split("Teacher prompt, ")
    assert (
        "<|im_start|>user\nWhat is 0 + 0? [red]Brief![/red]<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>"
        in student
    )
    assert "[b]0[/b]" in teacher
    assert "Who trains whom" in teacher
    assert "forward KL(teacher ‖ student)" in teacher


def test_a_text_model_with_a_processor_beside_it(recipe, tmp_path, model_path):
    """As Gemma 3 and others come, of which AutoProcessor gives no tokenizer."""
    pytest.importorskip("PIL")
    model, tokenizer = copytree(model_path, tmp_path / "model"), AutoTokenizer.from_pretrained(model_path)
    processor = LlavaProcessor(CLIPImageProcessor(), tokenizer, patch_size=8, chat_template=tokenizer.chat_template)
    processor.save_pretrained(model)

    train("opsd", "--config", recipe(), "--model_name_or_path", str(model))

    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_opsdc_resumes_from_the_newest_checkpoint(recipe, tmp_path, capsys):
    path = recipe(save_strategy="steps", save_steps=1)
    train("opsdc", "--config", path, "--max_steps", "1", "--resume_from_checkpoint", "auto")
    assert "Resuming" not in capsys.readouterr().out

    train("opsdc", "--config", path, "--resume_from_checkpoint", "true")

    output = capsys.readouterr().out
    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-1'}." in output
    assert "reverse KL(student ‖ teacher)" in output
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


@pytest.mark.needs("math_verify")
def test_distill_with_lora_rewards_and_evaluation(recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "rewards_of_test_training.py").write_text(
        "def brief(completions, **kwargs):\n    return [1.0 for _ in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    path = recipe(
        use_peft=True,
        lora_r=2,
        reward_funcs=["rewards_of_test_training.brief"],
        num_generations=2,
        divergence="jsd",
        teacher="live",
        dataset_train_split="train[:6]",
        dataset_test_split="train[6:]",
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=2,
        logging_steps=1,
        system_prompt="Add.",
        eval_benchmarks=["playground_opsd"],
        eval_benchmarks_limit=1,
    )

    train("distill", "--config", path)

    run = json.loads((tmp_path / "out" / "eval" / "step-2" / "run.json").read_text())
    assert run["settings"]["system_prompt"] == "Add."

    assert PeftConfig.from_pretrained(tmp_path / "out").r == 2
    output = capsys.readouterr().out
    assert "rewards/brief/mean" in output
    assert "eval_distillation_loss" in output
    assert "(LoRA)" in output
    assert "JSD, weight 0.5" in output


@pytest.mark.cpu("launched so")
@pytest.mark.slow
def test_accelerate_launch(recipe, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["-m", "trl_opsd.scripts.train", "opsd", "--config", recipe(), "--max_steps", "1", "--use_cpu"]

    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1200
    )

    assert done.returncode == 0, done.stderr
    assert "Who trains whom" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_interrupted_run_says_how_to_go_on(recipe, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_opsd.SelfDistillationTrainer.train", interrupted)
    with pytest.raises(SystemExit, match="130"):
        train("opsd", "--config", recipe())
    said = f"Interrupted. `--resume_from_checkpoint auto` goes on from the last checkpoint in {tmp_path / 'out'}"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [([], "Name what to train with"), (["--config", "r.yaml"], "one of: opsd, purified_opsd, opsdc")],
)
def test_launched_without_a_method(args, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", *args])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in capsys.readouterr().err


def test_unknown_method():
    with pytest.raises(ValueError, match=r"Unknown method: `opsdd`\. Did you mean `opsd`\?"):
        make_parser("opsdd")


def make_checkpoint(folder, *, complete=True):
    begin(folder)
    if complete:
        finish(folder, {})
    return str(folder)


def test_newest_complete_checkpoint(tmp_path):
    make_checkpoint(tmp_path / "checkpoint-9")
    newest = make_checkpoint(tmp_path / "checkpoint-10")
    make_checkpoint(tmp_path / "checkpoint-11", complete=False)
    make_checkpoint(tmp_path / "checkpoint-best")

    for choice in (True, "true", "auto"):
        with pytest.warns(match="checkpoint-11 is incomplete"):
            assert find_checkpoint(choice, str(tmp_path)) == newest
    assert find_checkpoint(newest, str(tmp_path)) == newest
    assert find_checkpoint(None, str(tmp_path)) is find_checkpoint("false", str(tmp_path)) is None


def test_no_checkpoint(tmp_path):
    assert find_checkpoint("auto", str(tmp_path)) is None
    with pytest.raises(ValueError, match=r"is true, but .* has no complete checkpoint"):
        find_checkpoint("true", str(tmp_path))


def test_checkpoint_that_cannot_be_resumed(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint-8 does not exist"):
        find_checkpoint(str(tmp_path / "checkpoint-8"), str(tmp_path))
    with pytest.raises(ValueError, match=r"checkpoint-9 is incomplete"):
        find_checkpoint(make_checkpoint(tmp_path / "checkpoint-9", complete=False), str(tmp_path))


def test_model_is_required(recipe):
    args = make_parser("opsd").parse_args_and_config(["--config", recipe(model_name_or_path=None)])

    with pytest.raises(ValueError, match="set `model_name_or_path`"):
        run(*args)
