"""Trains a tiny model against a vLLM server, on one process or two, and saves what came of it.

The weights go to the server as a file: NCCL, which carries them on GPUs, does not run on the CPU.
"""

import json
import os
import sys
import tempfile
from typing import ClassVar

import torch
from environment import SETTINGS, dataset, save_result
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer
from trl_opsd.serving import ServerError
from trl_opsd.teacher import ExternalTeacher, LiveTeacher, SeveralTeachers
from trl_opsd.trainer.several import has_served_teacher


class FileClient(VLLMClient):
    """Also keeps what was sampled."""

    completions: ClassVar[list[list[list[int]]]] = []

    def generate(self, *args, **kwargs):
        output = super().generate(*args, **kwargs)
        self.completions.append(output["completion_ids"])
        return output

    def init_communicator(self, device=0):
        pass

    def update_named_params(self, metadata, named_params):
        with tempfile.TemporaryDirectory() as folder:
            weights = {name: value.detach().clone().contiguous() for name, value in named_params}
            assert [name for name, _, _ in metadata] == list(weights)
            save_file(weights, f"{folder}/model.safetensors")
            kwargs = {"weights_path": folder}
            self._post(f"{self.base_url}/collective_rpc", json={"method": "reload_weights", "kwargs": kwargs})


class SendSignal(TrainerCallback):
    """Sends the server's process group a signal after the second step."""

    def __init__(self, signal: int, group: int):
        self.signal, self.group = signal, group

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and state.is_world_process_zero:
            os.killpg(self.group, self.signal)


def compare_with_local_teacher(trainer: SelfDistillationTrainer, teacher, differences: list[float]) -> None:
    """Compute every loss a second time, with the teacher's weights in this process."""
    compute_loss = trainer.compute_loss
    teacher.knows_entropy = trainer.teacher.knows_entropy  # what is logged is to be the server's

    def both(*args, **kwargs):
        served, trainer.loss.networks.teacher = trainer.loss.networks.teacher, teacher
        with torch.no_grad():
            local = compute_loss(*args, **kwargs).item()
        trainer.loss.networks.teacher = served
        loss = compute_loss(*args, **kwargs)
        differences.append(abs(loss.item() - local) / abs(local))
        return loss

    trainer.compute_loss = both


def main(base: str, output_dir: str, job: dict) -> dict:
    args = SelfDistillationConfig(
        output_dir=output_dir,
        **SETTINGS | {"vllm_server_timeout": 20.0, "vllm_server_request_timeout": 60.0} | job["settings"],
    )
    trainer = SelfDistillationTrainer(
        base,
        args=args,
        train_dataset=dataset().add_column("teacher", ["served", "own"] * 8),
        peft_config=LoraConfig(r=job["lora"], target_modules="all-linear") if "lora" in job else None,
        callbacks=[SendSignal(*job["signal"])] if "signal" in job else None,
    )
    differences: list[float] = []
    if has_served_teacher(args):
        model = AutoModelForCausalLM.from_pretrained(base)
        teacher = LiveTeacher() if args.teacher == "live" else ExternalTeacher(model, lambda model: model)
        if args.teacher == "several":
            members = {**trainer.teacher.members, "served": teacher}
            teacher = SeveralTeachers(members, args.teacher_column, is_alone=True)
        compare_with_local_teacher(trainer, teacher, differences)
    result = {}
    try:
        trainer.train(resume_from_checkpoint=job.get("resume"))
    except ServerError as error:
        result["error"] = str(error)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    name = "sampling/sampling_logp_difference/mean"
    return {
        **result,
        "world": trainer.accelerator.num_processes,
        "sent": trainer.sampler.sent,
        "losses": [entry["loss"] for entry in steps],
        "sampler": [entry[name] for entry in steps if name in entry],
        "served": differences,
        "completions": FileClient.completions,
        "metrics": sorted(steps[-1]) if steps else [],
    }


if __name__ == "__main__":
    vllm_generation.VLLMClient = FileClient
    try:
        result = main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
    except ValueError as error:
        result = {"refused": str(error)}
    save_result(result)
