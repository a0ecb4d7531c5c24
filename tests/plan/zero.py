"""Trains under DeepSpeed on two processes and writes what the first of them holds. Started by test_measured.py."""

import json
import os
import sys
from pathlib import Path

import torch
from distributed.train import skip_unused_op
from leave import leave
from plan.measuring import CASES, make_trainer, storages


def main(folder: Path) -> None:
    case = next(case for case in CASES if case.name == json.loads((folder / "case.json").read_text()))
    rank = int(os.environ["RANK"])
    trainer = make_trainer(case, folder / f"rank{rank}")
    held = {}

    def watch(before):
        def step(*args, **kwargs):
            optimizer = trainer.deepspeed.optimizer
            if hasattr(optimizer, "grad_partitions_flat_buffer"):
                held["gradients"] = storages([optimizer.grad_partitions_flat_buffer])
            else:
                # A weight that two processes share the gradient of keeps all of its memory: what is used of it counts
                averaged = [one for some in optimizer.averaged_gradients.values() for one in some or []]
                held["gradients"] = sum(one.numel() * one.itemsize for one in averaged if one is not None)
            return before(*args, **kwargs)

        return step

    begin = trainer.training_step

    def training_step(*args, **kwargs):
        optimizer = trainer.deepspeed.optimizer
        if not hasattr(optimizer, "watched"):
            optimizer.watched, optimizer.step = True, watch(optimizer.step)
        return begin(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    engine = trainer.deepspeed
    optimizer = engine.optimizer
    parameters = list(engine.module.parameters())
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    masters = optimizer.single_partition_of_fp32_groups if masters is None else masters
    inner = [
        value
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    ]
    held |= {
        "weights": storages([getattr(one, "ds_tensor", one) for one in parameters]),
        "whole": storages([one for one in parameters if hasattr(one, "ds_tensor") and one.numel()]),
        "optimizer": storages([*masters, *inner]),
    }
    buckets = getattr(optimizer, "ipg_buckets", {}).values()
    buffers = [one.buffer if isinstance(one.buffer, list) else [one.buffer] for one in buckets]
    held["buffers"] = storages([one for some in buffers for one in some if one is not None])
    teacher = getattr(trainer.teacher, "copy", None)
    if teacher is not None:
        copies = [one for _, _, one in teacher.pairs()]
        held["teacher"] = storages([getattr(one, "ds_tensor", one) for one in copies])
    if rank == 0:
        (folder / "held.json").write_text(json.dumps(held))


if __name__ == "__main__":
    skip_unused_op()
    main(Path(sys.argv[1]))
    leave()
