"""The language-model head as the losses read it."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from trl_opsd.objective import Head
from trl_opsd.scoring import unsharded


@pytest.fixture
def mesh():
    """A mesh of one process that computes on another device than the CPU: one whose tensors hold no values."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("meta", (1,))
    dist.destroy_process_group()


def test_sharded_head_that_is_offloaded_is_gathered_where_the_model_computes(mesh):
    spec = distribute_tensor(torch.ones(4, 3), mesh)._spec
    weight = DTensor(torch.ones(4, 3), spec, requires_grad=False)  # as FSDP2 makes a shard in CPU memory

    head = unsharded(Head(weight, None, 1.0, None))

    assert head.weight.device.type == "meta"
    assert head.weight.shape == (4, 3)
