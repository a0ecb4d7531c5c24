"""Trains under FSDP2 on two processes and writes what the first of them holds. Started by test_measured.py."""

import json
import os
import sys
from pathlib import Path

import torch
from distributed.train import relabel_cpu_world
from leave import leave
from plan.measuring import CASES, make_trainer, storages

from trl_opsd.teacher.sharding import part_of


def main(folder: Path) -> None:
    case = next(case for case in CASES if case.name == json.loads((folder / "case.json").read_text()))
    rank = int(os.environ["RANK"])
    relabel_cpu_world()
    trainer = make_trainer(case, folder / f"rank{rank}")
    held = {}

    def watch(optimizer, *_):
        held["gradients"] = storages(
            [part_of(one.grad) for group in optimizer.param_groups for one in group["params"]]
        )

    def on_first_step(before):
        def step(*args, **kwargs):
            if not held:
                trainer.optimizer.optimizer.register_step_pre_hook(watch)
            return before(*args, **kwargs)

        return step

    trainer.training_step = on_first_step(trainer.training_step)
    trainer.train()
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    held |= {
        "weights": storages(map(part_of, trainer.model_wrapped.parameters())),
        "teacher": storages(part_of(one) for _, _, one in trainer.teacher.copy.pairs()),
        "optimizer": storages(part_of(one) for one in states if isinstance(one, torch.Tensor) and one.ndim),
    }
    if rank == 0:
        (folder / "held.json").write_text(json.dumps(held))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
