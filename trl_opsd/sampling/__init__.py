from .base import Backend, Completion, Request, Sampling, end_token_ids


__all__ = ["Backend", "Completion", "Request", "Sampling", "end_token_ids"]
