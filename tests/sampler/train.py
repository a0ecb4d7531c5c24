"""Trains a tiny model on vLLM's rollouts in these processes, and saves what came of it. Run by test_colocate.py."""

import json
import os
import sys
from collections import Counter
from functools import partial

import torch
from distributed.train import shard_small_weights, share_held, skip_unused_op
from environment import SETTINGS, dataset, save_result
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl.generation import vllm_generation

from trl_opsd import SelfDistillationTrainer
from trl_opsd.eval.in_training import BenchmarkCallback
from trl_opsd.methods import config_class
from trl_opsd.signal.weighting import ImportanceClip
from trl_opsd.teacher.sharding import part_of


NUM_SYNCS = 300
# One that vLLM reads differently if left to itself: a factor of its own for each rank, and another base
PISSA = {"r": 4, "rank_pattern": {"q_proj": 8}, "use_rslora": True, "init_lora_weights": "pissa"}
ADAPTERS = {"lora": {"r": 8}, "pissa": PISSA, "4bit": {"r": 8}}
FOUR_BITS = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def record_calls(llm) -> list[dict]:
    """How vLLM is told to sample in every call from now on, the prompts, and what it gives."""
    calls: list[dict] = []
    generate = llm.generate
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed")

    def recording(prompts, sampling_params, **kwargs):
        outputs = generate(prompts, sampling_params=sampling_params, **kwargs)
        calls.append(
            {
                "sampling": {name: getattr(sampling_params, name) for name in names},
                "prompts": [prompt["prompt_token_ids"] for prompt in prompts],
                "completions": [list(one.token_ids) for output in outputs for one in output.outputs],
            }
        )
        return outputs

    llm.generate = recording
    return calls


def record_batches(trainer) -> list[dict]:
    """What is trained on from now on: completions, and what the teacher reads, without padding; advantages."""
    batches: list[dict] = []
    generate = trainer._generate_and_score_completions

    def recording(inputs):
        batch = generate(inputs)
        record = {
            f"{name}s": [ids[mask.bool()].tolist() for ids, mask in zip(*of(batch, name), strict=True)]
            for name in ("completion", "teacher_prompt")
        }
        record["has_context"] = batch["has_context"].tolist()
        record["advantages"] = batch["advantages"].tolist()
        batches.append(record)
        return batch

    def of(batch, name):
        return batch[f"{name}_ids"], batch[f"{name}_mask"]

    trainer._generate_and_score_completions = recording
    return batches


def record_ratios() -> list[dict]:
    """Every weight that `importance_clip` gives from now on, by whether the engine knows the token's probability."""
    ratios: list[dict] = []
    weigh = ImportanceClip.__call__

    def recording(self, log_probs, old_log_probs):
        weights, known = weigh(self, log_probs, old_log_probs), ~old_log_probs.isnan()
        ratios.append({"known": weights[known].tolist(), "unknown": weights[~known].tolist()})
        return weights

    ImportanceClip.__call__ = recording
    return ratios


def record_scores(trainer) -> list[float]:
    """How far every score of a sampled token is from the engine's log-probability from now on."""
    differences: list[float] = []
    score = trainer._score

    def recording(batch, mode):
        scores = score(batch, mode=mode)
        apart = (scores.student_log_prob - batch["sampling_per_token_logps"])[scores.known]
        differences.extend(apart.abs().tolist())
        return scores

    trainer._score = recording
    return differences


def every_other(completions, **kwargs):
    """Of the rollouts of a prompt, half are right."""
    return [float(index % 2) for index in range(len(completions))]


def right_at_last(prompts, completions, graded=Counter(), **kwargs):  # noqa: B006
    """Answers to odd problems are right, and those to every other even one when they are graded again."""
    rewards = []
    for prompt in prompts:
        number = int(prompt.split()[2])
        rewards.append(float(number % 2 == 1 or (number % 4 == 2 and graded[prompt] > 0)))
    graded.update(prompts)
    return rewards


REWARDS = {"every_other": every_other, "right_at_last": right_at_last}


def record_loads(llm) -> list[int]:
    """The number of weights in every call that loads some from now on."""
    loads: list[int] = []
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    load_weights = model.load_weights

    def recording(weights):
        loads.append(0)

        def count():
            for pair in weights:
                loads[-1] += 1
                yield pair

        return load_weights(count())

    model.load_weights = recording
    return loads


def greedy_completions(model, call: dict) -> list[list[int]]:
    """What transformers gives to the prompts of a call."""
    model.eval()
    completions = []
    for prompt in call["prompts"]:
        limit = call["sampling"]["max_tokens"]
        output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=limit)
        completions.append(output[0, len(prompt) :].tolist())
    return completions


def main(folder: str, weights: str, dtype: str, settings: dict) -> dict:
    settings = dict(settings)
    resume, evaluation = settings.pop("resume", None), settings.pop("evaluation", None)
    method, reward = settings.pop("method", "distill"), settings.pop("reward", None)
    # On the CPU, vLLM would compute in bf16 what the trainer does in fp32. Compiling takes half of an engine's start,
    # so one run does it for all.
    engine = {"dtype": dtype, "enforce_eager": dtype == "float32"}
    vllm_generation.LLM = partial(vllm_generation.LLM, **engine)
    args = config_class(method)(
        output_dir=f"{folder}/run",
        model_init_kwargs={"dtype": dtype},
        **SETTINGS
        | {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 512}
        | {"vllm_gpu_memory_utilization": 0.1}
        | settings,
    )
    shard_small_weights(args)
    trainer = SelfDistillationTrainer(
        f"{folder}/base",
        REWARDS.get(reward),
        args=args,
        train_dataset=dataset(),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, **FOUR_BITS) if weights == "4bit" else None,
        peft_config=LoraConfig(target_modules="all-linear", **ADAPTERS[weights]) if weights in ADAPTERS else None,
    )
    if evaluation is not None:
        trainer.add_callback(BenchmarkCallback(trainer, **evaluation))
    parameters = trainer.model.named_parameters()
    frozen = {name: p for name, p in parameters if not p.requires_grad and "teacher" not in name.split(".")}
    before = {name: part_of(parameter).clone() for name, parameter in frozen.items()}
    calls = record_calls(trainer.vllm_generation.llm)
    loads = record_loads(trainer.vllm_generation.llm)
    batches, scores, ratios = record_batches(trainer), record_scores(trainer), record_ratios()
    trainer.train(resume_from_checkpoint=resume)
    names = ("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max", "loss")
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {name: [entry[name] for entry in steps if name in entry] for name in names}
    result |= {"batches": batches, "scores": scores, "weights": ratios}
    result["ratios"] = [entry.get("sampling/importance_sampling_ratio/mean") for entry in steps]
    for _ in range(NUM_SYNCS if weights == "lora" and dtype == "bfloat16" else 0):
        trainer.vllm_generation.sync_weights()
    result["frozen"] = len(frozen)
    result["changed"] = [
        name for name, parameter in frozen.items() if not torch.equal(part_of(parameter), before[name])
    ]
    plugin = trainer.accelerator.state.deepspeed_plugin
    result["world"] = [trainer.accelerator.num_processes, None if plugin is None else plugin.zero_stage]
    result["share"] = share_held(trainer.model)
    result["calls"] = calls
    result["sent"] = trainer.sampler.sent
    result["loads"] = loads
    if evaluation is not None:
        result["expected"] = greedy_completions(trainer.model, calls[-1])
    return result


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        skip_unused_op()
    save_result(main(sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])))
