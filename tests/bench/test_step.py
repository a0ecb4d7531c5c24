import pytest
import torch
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.bench import step as bench
from trl_opsd.bench.step import CONTENDERS, StepCase, make_rows, model_tensors, save_tiny_model, serve


class Commands:
    """Stands in for the channel of a contender's process."""

    def __init__(self, *commands):
        self.commands = list(commands)
        self.replies = []

    def receive(self):
        return self.commands.pop(0) if self.commands else None

    def send(self, reply):
        self.replies.append(reply)


@pytest.fixture
def settings(model_path, tmp_path, device):
    return {
        "model": model_path,
        "device": device.type,
        "output_dir": str(tmp_path),
        "num_steps": 3,
        "lora": False,
        "num_rollouts": 2,
        "prompt_tokens": 9,
        "teacher_prompt_tokens": 21,
        "max_new_tokens": 5,
        "divergence": "jsd",
        "gradient_checkpointing": False,
        "dtype": "float32",
        "seed": 0,
    }


def test_prompts_have_the_lengths_asked_for(settings):
    tokenizer = make_tokenizer(bos_token="<s>")
    rows = make_rows(tokenizer, StepCase(**{**settings, "num_rollouts": 6}))
    for row in rows:
        assert len(tokenizer(row["prompt"])["input_ids"]) == 9
        assert len(tokenizer("{prompt} {privileged_context}".format(**row))["input_ids"]) == 21
    assert len({row["prompt"] for row in rows}) > 1
    assert rows == make_rows(tokenizer, StepCase(**{**settings, "num_rollouts": 6}))


@pytest.mark.parametrize(
    ("name", "lora"),
    [("self-distillation", False), ("self-distillation", True), ("sdft", True), ("distillation", False)],
)
def test_contenders_take_steps(name, lora, settings):
    channel = Commands("warmup", "time", "memory")
    serve(name, {**settings, "lora": lora}, channel)

    facts, *timed, memory = channel.replies
    assert facts["model_bytes"] > 0
    assert facts["threads"] == torch.get_num_threads()
    assert len(timed) == 2
    for reply in timed:
        assert reply["seconds"] == pytest.approx(reply["generation_seconds"] + reply["learning_seconds"])
        assert min(reply.values()) > 0
    assert set(memory) == {"peak_learning_bytes"}


def test_it_ends_when_there_are_no_more_commands(settings):
    with pytest.raises(SystemExit):
        serve("self-distillation", settings, Commands("warmup"))


@pytest.mark.parametrize("name", CONTENDERS)
def test_other_lengths_are_refused(name, settings, monkeypatch):
    arguments = bench._arguments

    def shorter(case):
        return {**arguments(case), "max_completion_length": 4, "generation_kwargs": {"min_new_tokens": 4}}

    monkeypatch.setattr(bench, "_arguments", shorter)
    with pytest.raises(ValueError, match=r"2 rollouts of 5 tokens were asked for, got \[4, 4\]"):
        serve(name, settings, Commands("warmup"))


def test_the_same_divergence_is_asked_of_all(settings):
    for divergence, beta in {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}.items():
        case = StepCase(**{**settings, "divergence": divergence})
        ours, sdft, other = (CONTENDERS[name](case).trainer.args for name in CONTENDERS)
        assert ours.divergence == divergence
        assert (sdft.distillation_alpha, sdft.distillation_mode, other.beta) == (beta, "full_logits", beta)


def test_shared_weights_are_counted_once():
    before = len(model_tensors())
    layers = torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 16, bias=False)
    layers[1].weight = layers[0].weight
    assert len(model_tensors()) - before == 1


def test_tiny_model(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_TINY_VOCABULARY", 64)
    save_tiny_model(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(tokenizer) == model.config.vocab_size == 64
    assert tokenizer.unk_token_id not in tokenizer("the red of w40")["input_ids"]
