from .base import Backend, Completion, Request, Sampling, end_token_ids
from .mixed import MixedCompletion, MixedRequest, generate_mixed


__all__ = [
    "Backend",
    "Completion",
    "MixedCompletion",
    "MixedRequest",
    "Request",
    "Sampling",
    "end_token_ids",
    "generate_mixed",
]
