"""
What the trainer relies on in TRL's private methods. A new TRL release that moves one of them fails here, readably.
"""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer
from trl.distributed import DistributedBackend
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import _ForwardRedirection
from trl.trainer import grpo_trainer, utils

from trl_opsd.scoring.images import IMAGES, OF_TOKENS


SIGNATURES = {
    "_prepare_inputs": ["self", "generation_batch"],
    "_generate": ["self", "prompts"],
    "_generate_single_turn": [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    "_generate_and_score_completions": ["self", "inputs"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_log_completion_extra": ["self", "column", "values"],
    "_compute_loss": ["self", "model", "inputs"],
    "_tokenize_prompts": ["self", "prompts"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_best_model": ["self"],
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_set_signature_columns_if_needed": ["self"],
    "log": ["self", "logs", "start_time"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    found = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
    assert found == SIGNATURES[name], (
        f"GRPOTrainer.{name} now takes {found}; trl_opsd/trainer/trainer.py overrides or calls it "
        f"with {SIGNATURES[name]}."
    )


def test_policy_loss_reads_the_student_through_one_method():
    method = GRPOTrainer._get_per_token_logps_and_entropies
    assert list(inspect.signature(method).parameters)[:6] == [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
    ]
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert "per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(\n" in source
    assert set(re.findall(r".*\bmodel\b.*", source)) == {
        "    def _compute_loss(self, model, inputs):",
        "        # Compute the per-token log probabilities for the model",
        "            model,",
        "        # Compute the KL divergence between the model and the reference model",
        '        mode = "train" if self.model.training else "eval"',
    }


def test_images_have_the_names_that_are_taken_apart():
    """One more of them would not be cut into rows with the rest, and the student would be read without it."""
    taken = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    images = set(taken[taken.index("pixel_values") :])
    assert images == {*IMAGES, *OF_TOKENS, "num_images", "num_tiles"}
    assert "self._is_vlm = True" in inspect.getsource(GRPOTrainer.__init__)
    assert 'output["num_images"] = num_images' in inspect.getsource(GRPOTrainer._generate_and_score_completions)


def test_what_reward_functions_log_is_there_until_rewards_are_returned():
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert 'reward_kwargs["log_extra"] = self._log_completion_extra' in source
    assert "_pending_extra_logs" not in source
    assert "_pending_extra_logs[column].extend(values)" in inspect.getsource(GRPOTrainer._log_completion_extra)
    assert "_pending_metrics[name].append(value)" in inspect.getsource(GRPOTrainer._log_metric)
    assert "self.environments = None\n" in inspect.getsource(GRPOTrainer.__init__)


def test_epochs_are_run_by_one_method():
    assert "self._run_epoch(" in inspect.getsource(GRPOTrainer._inner_training_loop)


def test_weights_are_sent_to_vllm_through_one_method():
    assert list(inspect.signature(VLLMGeneration._iter_named_params).parameters) == ["self"]
    assert "_iter_named_params()" in inspect.getsource(VLLMGeneration.sync_weights)
    assert "if self.state.global_step != self._last_loaded_step" in inspect.getsource(
        GRPOTrainer._generate_single_turn
    )
    assert list(inspect.signature(DistributedBackend.gather_params).parameters) == ["self", "params"]


def test_weights_of_a_colocated_engine_are_asked_for_once_when_it_is_awake():
    events = []
    generation = SimpleNamespace(
        mode="colocate",
        enable_sleep_mode=True,
        accelerator=SimpleNamespace(is_main_process=True),
        llm=SimpleNamespace(
            wake_up=lambda tags: events.append("wake up"), reset_prefix_cache=lambda: events.append("reset")
        ),
        _iter_named_params=lambda: events.append("weights") or (),
    )
    VLLMGeneration.sync_weights(generation)
    assert events == ["wake up", "weights", "reset"]


def test_engine_is_made_by_names_that_can_be_exchanged():
    """One of this process that loads adapters, as `trl_opsd/serving/adapter.py` has it."""
    made = inspect.getsource(GRPOTrainer.__init__)
    assert "self.vllm_generation = VLLMGeneration(\n                model=self.model," in made
    assert grpo_trainer.VLLMGeneration is VLLMGeneration
    for name in ("mode", "enable_sleep_mode"):
        assert f"{name}=args.vllm_{name}," in made
    engine = inspect.getsource(VLLMGeneration._init_vllm)
    assert "self.llm = LLM(" in engine
    assert "quantization=quantization," in engine
    assert "self.llm.generate(" in inspect.getsource(VLLMGeneration.generate)
    assert '"model": self.model,' in inspect.getsource(VLLMClient.generate)


def test_vllm_samples_by_attributes_that_an_evaluation_changes():
    """One more of them would leave the sampling of the rollouts in force while benchmarks are evaluated."""
    read = set(re.findall(r"self\.(\w+)", inspect.getsource(VLLMGeneration.generate)))
    engine = {"mode", "model", "accelerator", "llm", "vllm_client", "tensor_parallel_size", "tp_group"}
    sleep = {"enable_sleep_mode", "_llm_weights_sleeping", "sync_weights"}
    assert read - engine - sleep - {"logprobs", "_place_features"} == {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "max_completion_length",
        "structured_outputs_regex",
        "generation_kwargs",
    }


def test_batch_and_call_order(tokenizer, model, dataset, training_args):
    """The keys and paddings of a batch, and that rewards are computed once, after generation, for all rows."""
    calls = []

    class Recorder(GRPOTrainer):
        def _generate(self, prompts):
            calls.append("generate")
            return super()._generate(prompts)

        def _generate_single_turn(self, *args, **kwargs):
            calls.append("single_turn")
            return super()._generate_single_turn(*args, **kwargs)

        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            calls.append("rewards")
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            assert rewards.shape == (len(prompts), 1)
            assert [completion[0]["role"] for completion in completions] == ["assistant"] * len(prompts)
            return rewards

    trainer = Recorder(
        model=model,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=GRPOConfig(**training_args, num_generations=2),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    rows = [row for row in dataset.select(range(2)) for _ in range(2)]
    batch = trainer._generate_and_score_completions(rows)
    assert calls == ["generate", "single_turn", "rewards"]
    assert {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"} <= batch.keys()
    assert batch["prompt_mask"][:, -1].all()
    assert batch["completion_mask"][:, 0].all()

    tensors = {"advantages": torch.arange(4.0), "extra": torch.arange(4), "scalar": torch.tensor(7.0)}
    shuffled = utils.shuffle_sequence_dict(tensors)
    assert shuffled["extra"].tolist() == shuffled["advantages"].int().tolist()
    for part in utils.split_tensor_dict(shuffled, 2):
        assert part["extra"].shape == (2,)
        assert part["scalar"] == 7.0


def test_micro_batches_are_buffered(tokenizer, model, dataset, training_args):
    """The list of shuffled micro-batches is made anew when there is a new generation, and only then."""
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=GRPOConfig(**{**training_args, "gradient_accumulation_steps": 2, "num_generations": 2}),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.model.train()
    rows = [row for row in dataset.select(range(4)) for _ in range(2)]
    lists = []
    for step in range(3):
        trainer._step = step
        inputs = trainer._prepare_inputs(rows)
        assert inputs is trainer._buffered_inputs[step % 2]
        lists.append(trainer._buffered_inputs)
    assert lists[0] is lists[1]
    assert lists[1] is not lists[2]
    assert all(isinstance(value, torch.Tensor) for batch in lists[0] for value in batch.values())


def test_loss_is_not_divided_again_by_the_number_of_micro_batches():
    assert GRPOTrainer.loss_is_scaled_for_ga


def test_forward_redirection_runs_the_method_inside_the_wrapper():
    inner = torch.nn.Linear(1, 1)
    outer = torch.nn.Sequential(inner)
    seen = []
    outer.register_forward_pre_hook(lambda *_: seen.append("wrapper"))
    assert _ForwardRedirection()(outer, inner, lambda value: value + 1, 41) == 42
    assert seen == ["wrapper"]
