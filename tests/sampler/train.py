"""Trains a tiny model on vLLM's rollouts in this process, and saves what came of it. Started by test_colocate.py."""

import json
import sys
from pathlib import Path

import torch
from environment import SETTINGS, dataset, save_model, save_result
from peft import LoraConfig

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer


NUM_SYNCS = 300


def main(folder: str, weights: str, dtype: str, settings: dict) -> dict:
    save_model(Path(folder) / "base", dtype)
    trainer = SelfDistillationTrainer(
        f"{folder}/base",
        args=SelfDistillationConfig(
            output_dir=f"{folder}/run",
            model_init_kwargs={"dtype": dtype},
            **SETTINGS,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=512,
            vllm_gpu_memory_utilization=0.1,
            **settings,
        ),
        train_dataset=dataset(),
        peft_config=LoraConfig(r=8, target_modules="all-linear") if weights == "lora" else None,
    )
    parameters = trainer.model.named_parameters()
    frozen = {name: p for name, p in parameters if not p.requires_grad and "teacher" not in name.split(".")}
    before = {name: parameter.detach().clone() for name, parameter in frozen.items()}
    trainer.train()
    names = ("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max", "loss")
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {name: [entry[name] for entry in steps] for name in names}
    result["ratios"] = [entry.get("sampling/importance_sampling_ratio/mean") for entry in steps]
    for _ in range(NUM_SYNCS if weights == "lora" and dtype == "bfloat16" else 0):
        trainer.vllm_generation.sync_weights()
    result["frozen"] = len(frozen)
    result["changed"] = [name for name, parameter in frozen.items() if not torch.equal(parameter, before[name])]
    return result


if __name__ == "__main__":
    save_result(main(sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])))
