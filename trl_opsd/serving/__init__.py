"""vLLM servers: which of them will do, what happens when one fails, and teachers that are scored on one."""

from .adapter import engine_for_adapters
from .client import (
    ServerError,
    check_holds_policy,
    check_tokenizer,
    check_vllm_installed,
    connect,
    context_length,
    limit_requests,
    wait_for_server,
)
from .rollouts import report_failures
from .sampler import check_engine_context, longest_prompt, prepare_sampler, wait_for_sampler
from .teacher import Scores, TeacherServer


__all__ = [
    "Scores",
    "ServerError",
    "TeacherServer",
    "check_engine_context",
    "check_holds_policy",
    "check_tokenizer",
    "check_vllm_installed",
    "connect",
    "context_length",
    "engine_for_adapters",
    "limit_requests",
    "longest_prompt",
    "prepare_sampler",
    "report_failures",
    "wait_for_sampler",
    "wait_for_server",
]
