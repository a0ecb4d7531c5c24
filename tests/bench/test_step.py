from collections import Counter
from itertools import pairwise

import pytest
import torch
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from trl_opsd.bench import models
from trl_opsd.bench import step as bench
from trl_opsd.bench.arguments import StepArguments
from trl_opsd.bench.channel import CannotRun
from trl_opsd.bench.models import PRESETS, random_model, save_config, save_model
from trl_opsd.bench.step import CONTENDERS, PARTS, GivenRollouts, StepCase, make_rows, model_tensors, serve
from trl_opsd.methods import METHODS


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
        "random_weights": False,
        "device": device.type,
        "output_dir": str(tmp_path),
        "num_steps": 3,
        "lora": False,
        "num_rollouts": 4,
        "num_generations": 2,
        "prompt_tokens": 9,
        "teacher_prompt_tokens": 21,
        "equal_teacher_tokens": True,
        "max_new_tokens": 5,
        "sample": False,
        "use_vllm": False,
        "vllm_gpu_memory_utilization": 0.3,
        "divergence": "jsd",
        "gradient_checkpointing": False,
        "dtype": "float32",
        "seed": 0,
    }


@pytest.fixture
def small_shape(monkeypatch):
    monkeypatch.setattr(models, "_NUM_WORDS", 64)
    monkeypatch.setitem(PRESETS, "tiny", {**PRESETS["tiny"], "vocab_size": 70, "hidden_size": 32})


@pytest.fixture
def seen(monkeypatch):
    """What the trainers of the contenders compute: losses, and the shapes that their backbones read."""
    losses, shapes = [], []

    def watch(trainer):
        compute_loss = trainer.compute_loss

        def watched(*args, **kwargs):
            loss = compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

        trainer.compute_loss = watched
        models = {id(model): model for model in (trainer.model, getattr(trainer, "teacher_model", None)) if model}
        for model in models.values():
            backbone = model.base_model
            backbone.register_forward_pre_hook(
                lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
            )

    for name, make in CONTENDERS.items():

        def make_and_watch(case, make=make):
            contender = make(case)
            watch(contender.trainer)
            return contender

        monkeypatch.setitem(CONTENDERS, name, make_and_watch)
    return losses, shapes


def test_prompts_have_the_lengths_asked_for(settings):
    tokenizer = make_tokenizer(bos_token="<s>")
    rows = make_rows(tokenizer, StepCase(**{**settings, "num_rollouts": 12}))
    assert len(rows) == 6
    for row in rows:
        assert len(tokenizer(row["prompt"])["input_ids"]) == 9
        assert len(tokenizer("{prompt} {privileged_context}".format(**row))["input_ids"]) == 21
    assert len({row["prompt"] for row in rows}) > 1
    assert rows == make_rows(tokenizer, StepCase(**{**settings, "num_rollouts": 12}))


def test_given_rollouts_depend_on_step_and_prompt_alone(settings):
    tokenizer = make_tokenizer()
    given = GivenRollouts(tokenizer, StepCase(**settings))
    prompts = [[7, 8], [7, 8], [9]]
    rollouts = given(3, prompts)
    assert [len(ids) for ids in rollouts] == [5] * 3
    assert rollouts == GivenRollouts(tokenizer, StepCase(**settings))(3, prompts)
    assert given(3, prompts[::-1]) == [rollouts[2], *rollouts[:2]]
    assert len({tuple(ids) for ids in (*rollouts, *given(4, prompts))}) == 6
    many = GivenRollouts(tokenizer, StepCase(**{**settings, "max_new_tokens": 5000}))(0, [[1]])[0]
    assert set(many) == set(range(len(tokenizer))) - set(tokenizer.all_special_ids)


@pytest.mark.parametrize(
    ("name", "lora", "sample"),
    [
        ("self-distillation", False, True),
        ("self-distillation", True, False),
        ("self-distillation+grpo", True, False),
        ("sdft", True, False),
        ("sdft", False, True),
        ("distillation", False, False),
        ("distillation", True, True),
    ],
)
def test_contenders_take_steps(name, lora, sample, settings):
    channel = Commands("warmup", "time", "memory")
    serve(name, {**settings, "lora": lora, "sample": sample}, channel)

    facts, *timed, memory = channel.replies
    assert facts["model_bytes"] > 0
    assert facts["threads"] == torch.get_num_threads()
    assert len(timed) == 2
    for reply in timed:
        assert reply["seconds"] == pytest.approx(reply["generation_seconds"] + reply["learning_seconds"])
        parts = [reply[f"{part}_seconds"] for part in PARTS]
        assert sum(parts) == pytest.approx(reply["learning_seconds"], rel=0.01, abs=1e-3)
        assert min(reply["seconds"], reply["generation_seconds"], *parts) > 0
    assert memory["peak_bytes"] >= memory["peak_learning_bytes"]


@pytest.fixture
def no_sampling(monkeypatch):
    def generate(*args, **kwargs):
        raise AssertionError("it was sampled")

    monkeypatch.setattr("transformers.generation.utils.GenerationMixin.generate", generate)


@pytest.mark.parametrize("name", StepArguments.all_contenders)
def test_nothing_is_sampled_from_given_rollouts(name, settings, no_sampling):
    """Nor by the methods, see below."""
    serve(name, {**settings, "num_steps": 1, "num_generations": 4}, Commands("time"))


def test_all_compute_the_same_loss_on_the_same_tokens(settings, seen):
    losses, shapes = seen
    by_name = {}
    # Without groups, or ours would read a shared prompt once
    settings |= {"num_rollouts": 2, "num_generations": 1}
    for name in ("self-distillation", "sdft", "distillation"):
        losses.clear()
        shapes.clear()
        serve(name, settings, Commands("warmup", "time", "time"))
        by_name[name] = list(losses)
        if name == "distillation":
            assert set(shapes) == {(2, 9 + 5), (2, 21 + 5)}
    ours, sdft, distillation = by_name.values()
    assert len(ours) == 3
    assert ours[0] > 0
    # The first two steps: what Adam makes of the smallest gradients is rounding
    assert sdft[:2] == pytest.approx(ours[:2], rel=1e-4)
    assert distillation[:2] == pytest.approx(ours[:2], rel=1e-4)


def test_unequal_teacher_tokens(settings, seen):
    _, shapes = seen
    serve("distillation", {**settings, "equal_teacher_tokens": False}, Commands("warmup", "time", "time"))
    assert set(shapes) == {(4, 9 + 5)}


def test_grpo_takes_part_and_needs_groups(settings, seen):
    losses, _ = seen
    serve("self-distillation+grpo", settings, Commands("warmup", "time", "time"))
    with_grpo = list(losses)
    losses.clear()
    serve("self-distillation", settings, Commands("warmup", "time", "time"))
    assert with_grpo[1] != pytest.approx(losses[1], rel=1e-6)
    with pytest.raises(CannotRun, match=r"groups of 4 rollouts: set `--num_rollouts` to a multiple of 4"):
        CONTENDERS["method-rlcsd"](StepCase(**{**settings, "num_rollouts": 6}))
    with pytest.raises(CannotRun, match="num_generations"):
        CONTENDERS["self-distillation+grpo"](StepCase(**{**settings, "num_generations": 1}))


# Of a step: how often a backbone is read with a gradient, and without one
PASSES = {
    "opsd": (1, 1),
    "purified_opsd": (1, 3),
    "opsdc": (1, 1),
    "pbsd": (1, 2),
    "brts": (1, 3),  # of 8 completions of the teacher's, two passes choose
    "vpd": (1, 1),  # and in every fifth batch (1, 2)
    "atmanrl": (1, 0),  # besides those of its reward, which the benchmark replaces
    "sdft": (1, 1),
    "sdpo": (1, 1),
    "sc_sdpo": (1, 1),
    "ssopd": (1, 1),
    "u_opsd": (1, 1),
    "drift": (1, 1),
    "drift_code": (1, 3),  # the teacher for the advantages too
    "cipo": (1, 0),
    "sort": (1, 2),
    "mopd": (1, 1),
    "correct_only": (1, 1),
    "rlsd": (1, 1),
    "rlrt": (1, 1),
    "trace": (1, 1),
    "resd": (1, 1),
    "rlcsd": (1, 4),  # of 4 rollouts, right ones are read after two wrong peers and wrong ones after one
    "dasd": (1, 1),
    "antisd": (1, 1),
    "antisd_code": (1, 2),
    "egrsd": (1, 2),
    "cl_egrsd": (1, 2),
    "msd": (1, 1),
    "sdpg": (1, 2),  # teacher and reference
    "rethinking_opd": (1, 1),
    "rethinking_opd_code": (1, 1),
    "stable_opd": (1, 2),  # reference too
    "vopd": (1, 1),
    "star": (1, 0),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_take_the_passes_that_their_formulas_need(name, settings, no_sampling, monkeypatch):
    counts, seen = Counter(), []
    forward = Qwen3Model.forward

    def counting(self, *args, **kwargs):
        counts[torch.is_grad_enabled()] += 1
        return forward(self, *args, **kwargs)

    class Steps(Commands):
        def receive(self):
            seen.append((counts[True], counts[False]))
            return super().receive()

    monkeypatch.setattr(Qwen3Model, "forward", counting)
    serve(f"method-{name}", {**settings, "num_steps": 2}, Steps("warmup", "time"))
    steps = [(new[0] - old[0], new[1] - old[1]) for old, new in pairwise(seen)]
    assert steps == [PASSES[name]] * 2


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["self-distillation", "sdft", "distillation"])
def test_random_weights_are_loaded_by_nobody(name, lora, settings, small_shape, tmp_path, seen):
    losses, _ = seen
    save_config(tmp_path / "model", "tiny")
    settings |= {"model": str(tmp_path / "model"), "random_weights": True, "lora": lora}
    serve(name, settings, Commands("warmup", "time", "time"))
    assert len(losses) == 3
    assert not list(tmp_path.rglob("*.safetensors"))


def test_contenders_train_side_by_side(settings):
    settings["num_steps"] = 1

    class Meanwhile(Commands):
        def receive(self):
            if len(self.commands) == 1:
                serve("self-distillation+grpo", settings, other)
            return super().receive()

    ours, other = Meanwhile("time"), Commands("time")
    serve("self-distillation", settings, ours)
    assert len(ours.replies) == len(other.replies) == 2


def test_it_ends_when_there_are_no_more_commands(settings):
    with pytest.raises(SystemExit):
        serve("self-distillation", settings, Commands("warmup"))


@pytest.mark.parametrize("name", [*StepArguments.all_contenders, "method-star"])
def test_other_lengths_are_refused(name, settings, monkeypatch):
    arguments = bench._arguments

    def shorter(case):
        return {**arguments(case), "max_completion_length": 4, "generation_kwargs": {"min_new_tokens": 4}}

    monkeypatch.setattr(bench, "_arguments", shorter)
    with pytest.raises(ValueError, match=r"4 rollouts of 5 tokens were asked for, got \[4, 4, 4, 4\]"):
        serve(name, {**settings, "sample": True}, Commands("warmup"))


def test_the_same_divergence_is_asked_of_all(settings):
    names = ("self-distillation", "sdft", "distillation")
    for divergence, beta in {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}.items():
        case = StepCase(**{**settings, "divergence": divergence})
        ours, sdft, other = (CONTENDERS[name](case).trainer.args for name in names)
        assert ours.divergence == divergence
        assert (sdft.distillation_alpha, sdft.distillation_mode, other.beta) == (beta, "full_logits", beta)


def test_vllm_samples_rollouts_of_the_length_asked_for(settings):
    arguments = bench._arguments(StepCase(**{**settings, "sample": True, "use_vllm": True}))
    assert arguments["use_vllm"]
    assert arguments["vllm_mode"] == "colocate"
    assert arguments["vllm_max_model_length"] == 9 + 5
    assert arguments["generation_kwargs"] == {"ignore_eos": True, "min_tokens": 5}


def test_shared_weights_are_counted_once():
    before = len(model_tensors())
    layers = torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 16, bias=False)
    layers[1].weight = layers[0].weight
    assert len(model_tensors()) - before == 1


def test_random_models(tmp_path, small_shape):
    save_config(tmp_path, "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 64
    assert tokenizer.unk_token_id not in tokenizer("the red of w40")["input_ids"]

    model, same, other = (random_model(tmp_path, "cpu", "bfloat16", seed) for seed in (0, 0, 1))
    assert model.name_or_path == str(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == 70
    weights, same_weights, other_weights = (dict(m.named_parameters()) for m in (model, same, other))
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    assert not torch.equal(weights["model.embed_tokens.weight"], other_weights["model.embed_tokens.weight"])

    save_model(tmp_path, "cpu", "bfloat16", 0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert all(torch.equal(weights[name], weight) for name, weight in loaded.named_parameters())


@pytest.mark.parametrize(("preset", "billions"), [("qwen3-0.6b", 0.596), ("qwen3-1.7b", 1.721), ("qwen3-8b", 8.191)])
def test_presets_have_the_size_of_their_name(preset, billions, tmp_path):
    save_config(tmp_path, preset)
    model = random_model(tmp_path, "meta", "bfloat16", 0)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)
    assert model.config.rope_parameters["rope_theta"] == 1e6
