"""Runs a training command, as `accelerate launch -m trl_opsd.scripts.train` would."""

import torch
from distributed.train import skip_unused_op
from leave import leave

from trl_opsd.scripts.train import main


if __name__ == "__main__":
    skip_unused_op()
    main()
    assert not torch.distributed.is_initialized(), "the command left the group of its processes open"
    leave()
