"""vLLM servers: which of them will do, what happens when one fails, and teachers that are scored on one."""

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
from .merged_weights import check_mergeable, merged_weights
from .rollouts import report_failures
from .teacher import Scores, TeacherServer


__all__ = [
    "Scores",
    "ServerError",
    "TeacherServer",
    "check_holds_policy",
    "check_mergeable",
    "check_tokenizer",
    "check_vllm_installed",
    "connect",
    "context_length",
    "limit_requests",
    "merged_weights",
    "report_failures",
    "wait_for_server",
]
