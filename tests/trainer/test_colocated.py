"""An engine in the process of the trainer: here one that does with transformers what TRL wants of vLLM."""

import dataclasses
import json
import math
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer
from trl_opsd.eval.in_training import BenchmarkCallback
from trl_opsd.trainer.record import describe_run
from trl_opsd.trainer.sampler import _why_asked_for_the_base, sampler_index


DIFFERENCE = "sampling/sampling_logp_difference/max"


class Engine:
    """
    Seeds the process when it starts, and takes the seed of each request from NumPy's generator, as vLLM does on a GPU.
    """

    faults: ClassVar[list[str]] = []

    def __init__(self, model, seed, max_model_len, quantization, enable_lora=False, max_lora_rank=16, **kwargs):
        set_seed(seed)
        if quantization is not None or (enable_lora and "no adapters" in self.faults):
            raise RuntimeError(f"cannot: {quantization}, {enable_lora}")
        self.max_lora_rank = max_lora_rank if enable_lora else None
        self.lora_manager = SimpleNamespace(modules={}, get_adapter=lambda number: self.adapter)
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.model_config = SimpleNamespace(max_model_len=max_model_len)
        self.calls, self.loads, self.seeds, self.added = [], [], [], []
        self.while_loading = lambda: None
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        executor = SimpleNamespace(driver_worker=worker)
        self.num_forgotten = 0
        self.llm_engine = SimpleNamespace(
            model_executor=executor, add_lora=self.add_lora, reset_encoder_cache=self.reset_encoder_cache
        )

    def load_weights(self, weights):
        names = []
        for name, value in weights:
            self.while_loading()
            self.model.get_parameter(name).data.copy_(value)
            names.append(name)
        self.loads.append(names)

    def reset_prefix_cache(self):
        pass

    def reset_encoder_cache(self):
        self.num_forgotten += 1
        assert self.num_forgotten == len(self.loads)  # each time that there are other weights

    def add_lora(self, request):
        """Of the weights that were loaded and the adapter, makes others: peft would read a factor for each rank."""
        assert request.load_inplace
        config = json.loads(Path(request.lora_path, "adapter_config.json").read_text())
        assert config["r"] <= self.max_lora_rank
        weights = load_file(Path(request.lora_path, "adapter_model.safetensors"))
        names = {name.rpartition(".lora_")[0] for name in weights}
        modules = {name.removeprefix("base_model.model."): name for name in names}
        self.adapter = SimpleNamespace(loras=modules)
        self.lora_manager.modules = {name: None for name in modules if "left out" not in self.faults}
        self.deltas = {
            name: config["lora_alpha"]
            / config["r"]
            * weights[f"{key}.lora_B.weight"]
            @ weights[f"{key}.lora_A.weight"]
            for name, key in modules.items()
        }
        self.added.append(request.lora_int_id)

    @contextmanager
    def adapted(self, request):
        for sign in (1, -1) if request is not None else ():
            assert request.lora_int_id == self.added[-1]
            for name, delta in self.deltas.items():
                self.model.get_submodule(name).weight.data += sign * delta.to(self.model.device)
            if sign == 1:
                yield
        if request is None:
            yield

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm, lora_request=None):
        with self.adapted(lora_request):
            return self._generate(prompts, sampling_params)

    def _generate(self, prompts, sampling_params):
        outputs = [self._complete(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]
        self.calls.append([output.outputs[0].token_ids for output in outputs])
        return outputs

    def _complete(self, prompt, sampling):
        self.seeds.append(np.random.randint(2**31))
        generator = torch.Generator().manual_seed(self.seeds[-1])
        ids, log_probs = list(prompt), []
        for _ in range(sampling.max_tokens):
            distribution = self.model(torch.tensor([ids], device=self.model.device)).logits[0, -1].log_softmax(-1)
            token = torch.multinomial(distribution.exp(), 1, generator=generator).item()
            ids.append(token)
            log_probs.append({token: SimpleNamespace(logprob=distribution[token].item(), rank=1)})
        output = SimpleNamespace(token_ids=ids[len(prompt) :], logprobs=log_probs)
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[output])


@pytest.fixture
def make_trainer(model_path, dataset, tokenizer, training_args, monkeypatch):
    monkeypatch.setattr("trl_opsd.trainer.preparation.check_vllm_installed", lambda: None)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(Engine, "faults", [])
    request = dataclasses.make_dataclass(
        "LoRARequest", ["lora_name", "lora_int_id", "lora_path", ("load_inplace", bool, False)]
    )
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=request))

    def make(peft_config=None, eval_dataset=None, **settings):
        args = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 512, "max_steps": 4}
        with mock.patch.dict(os.environ):  # TRL tells the engine of its process there, and accelerate would hear of it
            return SelfDistillationTrainer(
                model_path,
                args=SelfDistillationConfig(**training_args | args | {"learning_rate": 0.05} | settings),
                train_dataset=dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                peft_config=peft_config,
            )

    return make


def steps_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, target_modules="all-linear")], ids=["full", "lora"])
def test_all_weights_are_loaded_in_one_call(peft_config, make_trainer):
    trainer = make_trainer(peft_config)
    engine = trainer.vllm_generation.llm
    merged = [module for module in trainer.model.modules() if hasattr(module, "merged_adapters")]
    most = []
    engine.while_loading = lambda: most.append(sum(bool(module.merged_adapters) for module in merged))

    trainer.train()

    names = [name for name, _ in engine.model.named_parameters()]
    assert engine.loads == [names] * 4
    assert engine.num_forgotten == 4
    assert max(most) == (0 if peft_config is None else 1)
    differences = [entry[DIFFERENCE] for entry in steps_of(trainer)]
    assert len(differences) == 4
    assert 0.0 < max(differences) < 1e-4  # with the weights of a step ago, above 0.1


def test_adapter_alone_is_loaded_after_each_step(make_trainer):
    # vLLM knows one factor for all ranks, and has loaded the base that PiSSA changes
    settings = {"rank_pattern": {"q_proj": 9}, "use_rslora": True, "init_lora_weights": "pissa"}
    trainer = make_trainer(LoraConfig(r=4, target_modules="all-linear", **settings), vllm_lora_sync="adapter")
    engine = trainer.vllm_generation.llm
    assert engine.max_lora_rank == 16
    assert ("rollout engine", "vLLM, colocate, sent its adapter alone, temperature 1") in describe_run(trainer, 4)

    trainer.train()

    assert engine.loads == [[name for name, _ in engine.model.named_parameters()]]
    assert engine.added == [1] * 5  # once before the first step, so that it could be refused
    differences = [entry[DIFFERENCE] for entry in steps_of(trainer)]
    assert len(differences) == 4
    assert 0.0 < max(differences) < 1e-4


@pytest.mark.parametrize(
    ("settings", "lora", "faults", "problem"),
    [
        ({}, {"use_dora": True}, [], r"q_proj it is a variant \(DoraLinearVariant\) that vLLM does not know"),
        ({}, {"r": 513}, [], "its rank of 513 is above vLLM's 512"),
        ({"vllm_enable_sleep_mode": True}, {}, [], "an engine that sleeps .* has lost the base"),
        ({}, {}, ["no adapters"], "cannot: None, True"),
        ({}, {}, ["left out"], r"it has no place for the adapter on model\.layers\.0\.mlp\.down_proj, "),
    ],
    ids=["dora", "rank", "sleep", "engine", "left-out"],
)
def test_adapter_that_the_engine_cannot_load_is_refused(settings, lora, faults, problem, make_trainer):
    Engine.faults = faults
    message = rf"`vllm_lora_sync='adapter'`: vLLM cannot load .* by itself: .*{problem}.*Set `vllm_lora_sync='merged'`"
    with pytest.raises(ValueError, match=message):
        make_trainer(LoraConfig(target_modules="all-linear", **lora), vllm_lora_sync="adapter", **settings)
    with pytest.raises(ValueError, match=message.replace(problem, "the policy has none")):
        make_trainer(vllm_lora_sync="adapter")


def test_adapter_that_cannot_be_merged_is_refused_before_an_engine_is_made(make_trainer, monkeypatch):
    monkeypatch.setattr(vllm_generation, "LLM", None)
    with pytest.raises(ValueError, match="`trainable_token_indices` unset, or set `use_vllm=False`"):
        make_trainer(LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]))


def test_adapter_is_merged_where_nothing_asks_for_it_alone(make_trainer):
    trainer = make_trainer(LoraConfig(target_modules="all-linear"))
    assert trainer.vllm_generation.llm.max_lora_rank is None
    assert trainer.sampler.sent == "all weights, its adapter merged"


def test_server_that_is_asked_for_the_base_is_known(training_args):
    def why(reports_failures=True, **teacher):
        url = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://sampler"}
        served = {"divergence_support": "sampled_token", "distillation_temperature": 1.0, "temperature": 1.0}
        return _why_asked_for_the_base(
            SelfDistillationConfig(**training_args, **url, **served, **teacher), reports_failures
        )

    live = {"teacher": "live", "teacher_server_base_url": "http://sampler/"}
    other = {"teacher": "external", "teacher_server_base_url": "http://other"}
    assert why() is None
    assert why(**other) is None
    assert "`rollout_func`" in why(reports_failures=False)
    assert "the live teacher" in why(**live)
    assert "the live teacher" in why(teacher="several", teachers={"one": other, "two": live})


@pytest.mark.usefixtures("deterministic")
def test_seed_reaches_rollouts_and_training(make_trainer):
    def run(seed):
        trainer = make_trainer(seed=seed, shuffle_dataset=False, max_steps=2)
        drawn = torch.rand(()).item()  # as dropout does
        trainer.train()
        return trainer.vllm_generation.llm.calls, drawn

    calls, drawn = run(1)
    assert len(calls) == 2
    assert calls[0] != calls[1]
    assert run(1) == (calls, drawn)
    other_calls, other_drawn = run(2)
    assert other_calls[0] != calls[0]
    assert other_drawn != drawn


def test_processes_of_an_engine_sample_by_the_same_random_numbers():
    def index(process_index, **settings):
        return sampler_index(SimpleNamespace(vllm_tensor_parallel_size=2, **settings), process_index)

    assert [index(rank, use_vllm=True) for rank in range(4)] == [0, 0, 1, 1]
    assert [index(rank, use_vllm=False) for rank in range(4)] == [0, 1, 2, 3]


@pytest.mark.usefixtures("deterministic")
def test_resumed_equals_uninterrupted(make_trainer):
    peft_config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(peft_config, **settings)
    whole.train()
    resumed = make_trainer(peft_config, **settings)
    torch.rand(5)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")

    calls, seeds = whole.vllm_generation.llm.calls, whole.vllm_generation.llm.seeds
    assert len(calls) == 8  # two in each step
    assert len(set(seeds)) == len(seeds) == 8 * 4
    assert resumed.vllm_generation.llm.calls == calls[4:]
    assert [entry["loss"] for entry in steps_of(resumed)] == [entry["loss"] for entry in steps_of(whole)]


@pytest.mark.usefixtures("deterministic")
def test_evaluations_leave_rollouts_as_they_are(make_trainer, dataset, tmp_path):
    Dataset.from_list([{"question": "What is 1 + 2?", "answer": "3"}]).to_json(tmp_path / "problems.jsonl")
    benchmark = tmp_path / "sums.yaml"
    benchmark.write_text(yaml.safe_dump({"dataset_name": str(tmp_path / "problems.jsonl")}))

    def run(*benchmarks, **settings):
        trainer = make_trainer(**settings)
        if benchmarks:
            trainer.add_callback(BenchmarkCallback(trainer, benchmarks, steps=1))
        trainer.train()
        evaluations = [entry for entry in trainer.state.log_history if any(name.startswith("eval") for name in entry)]
        return [entry["loss"] for entry in steps_of(trainer)], trainer.vllm_generation.llm.calls, len(evaluations)

    losses, calls, _ = run()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "num_generations_eval": 1}
    found_losses, found_calls, num_evaluations = run(str(benchmark), eval_dataset=dataset.select(range(4)), **settings)

    assert num_evaluations == 9
    assert found_losses == losses
    assert not any(math.isnan(loss) for loss in losses)
    assert [call for call in found_calls if call in calls] == calls
