"""What pulls the student: tensors in, tensors out."""

from .aggregation import aggregation_weights, share_of_rows
from .dense import generalized_jsd_loss
from .divergence import Divergence, pointwise_divergence
from .fused import FusedDivergence, fused_divergence
from .head import Head
from .kernels import default_kernel
from .lookups import teacher_choices, token_log_probs, tokens_in_top_k
from .objective import Bounded, Objective, Support, Tail
from .readings import Combine, Readings
from .top_log_probs import TopLogProbs


__all__ = [
    "Bounded",
    "Combine",
    "Divergence",
    "FusedDivergence",
    "Head",
    "Objective",
    "Readings",
    "Support",
    "Tail",
    "TopLogProbs",
    "aggregation_weights",
    "default_kernel",
    "fused_divergence",
    "generalized_jsd_loss",
    "pointwise_divergence",
    "share_of_rows",
    "teacher_choices",
    "token_log_probs",
    "tokens_in_top_k",
]
