"""
Lets torchvision be imported beside a torch for CPUs: PyPI's build is for GPUs, and what declares these two operators
does not load. Nothing here calls them. For processes that have this folder in PYTHONPATH.
"""

import torch


if torch.version.cuda is None:
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
