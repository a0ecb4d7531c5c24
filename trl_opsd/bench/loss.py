"""
The contenders of `trl-opsd bench loss`: one divergence, forward and backward, from the same hidden states.

The teacher has the student's head, as in self-distillation, and hidden states near the student's. What a contender
cannot do it says with a reason, instead of doing something else.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch.nn import functional as F

from ..objective import Divergence, Head, Objective, Support, default_kernel, fused_divergence
from .channel import CannotRun, Channel
from .measure import PeakMemory, release_memory, synchronize


# Slice on which gradients are checked: its float64 reference must stay cheap beside the benchmark
_CHECKED_TOKENS = 16
_CHECKED_VOCABULARY = 4096

_GPU_WARMUP_SECONDS = 0.1

# Rows of one product of the floor. More make a product no faster, and a whole [N, V] tensor may not fit
_FLOOR_ROWS = 1024


@dataclass(frozen=True)
class LossCase:
    """
    What is computed.

    Args:
        num_tokens (`int`): Number of tokens N.
        hidden_size (`int`): Width H of the hidden states.
        vocab_size (`int`): Size V of the vocabulary.
        device (`str`): Device of all tensors.
        dtype (`str`, *optional*, defaults to `"float32"`): Dtype of hidden states and head.
        divergence (`str`, *optional*, defaults to `"jsd"`): `"forward_kl"`, `"reverse_kl"` or `"jsd"`, β = 0.5.
        support (`str`, *optional*, defaults to `"full"`): Tokens whose entries are summed, see [`Objective`].
        frozen_head (`bool`, *optional*, defaults to `False`): Whether the head gets no gradient.
        clip (`float`, *optional*): Upper bound on every vocabulary entry.
        token_weights (`bool`, *optional*, defaults to `False`): Whether tokens have weights of their own.
        metrics (`bool`, *optional*, defaults to `False`): Whether the pass also yields what a log shows.
        seed (`int`, *optional*, defaults to `0`): Seed of the inputs.
    """

    num_tokens: int
    hidden_size: int
    vocab_size: int
    device: str
    dtype: str = "float32"
    divergence: str = "jsd"
    support: str = "full"
    frozen_head: bool = False
    clip: float | None = None
    token_weights: bool = False
    metrics: bool = False
    seed: int = 0

    @property
    def beta(self) -> float:
        """The divergence in TRL's terms: 0 is the forward KL, 1 the reverse KL."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[self.divergence]


@dataclass
class LossInputs:
    """
    Tensors of a case.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`): The student's hidden states, which receive a gradient.
        teacher_hidden (`torch.Tensor` of shape `(N, H)`): The teacher's.
        weight (`torch.Tensor` of shape `(V, H)`): The head of both, which receives one if it trains.
        token_ids (`torch.Tensor` of shape `(N,)`): Sampled tokens.
        weights (`torch.Tensor` of shape `(N,)`): Factor of each token's divergence.
    """

    hidden: torch.Tensor
    teacher_hidden: torch.Tensor
    weight: torch.Tensor
    token_ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def make(cls, case: LossCase) -> "LossInputs":
        """The inputs of a case, the same in every process."""
        device, dtype = torch.device(case.device), getattr(torch, case.dtype)
        generator = torch.Generator(device).manual_seed(case.seed)
        randn = partial(torch.randn, generator=generator, device=device, dtype=dtype)
        tokens, width, vocabulary = case.num_tokens, case.hidden_size, case.vocab_size
        hidden = randn(tokens, width)
        # A teacher that mostly agrees, and logits with a standard deviation of 2: neither flat nor one-hot
        teacher_hidden = randn(tokens, width).mul_(0.3).add_(hidden)
        weight = randn(vocabulary, width).mul_(2.0 / width**0.5)
        token_ids = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        weights = torch.ones(tokens, device=device)
        if case.token_weights:
            weights = torch.rand(tokens, generator=generator, device=device) + 0.5
        weights = weights.to(torch.promote_types(dtype, torch.float32)) / weights.sum()
        return cls(
            hidden.requires_grad_(), teacher_hidden, weight.requires_grad_(not case.frozen_head), token_ids, weights
        )

    def cut(self) -> "LossInputs":
        """A copy of the first tokens and of the first part of the vocabulary, with its own leaves."""
        weight = self.weight.detach()[:_CHECKED_VOCABULARY].clone()
        return LossInputs(
            self.hidden.detach()[:_CHECKED_TOKENS].clone().requires_grad_(),
            self.teacher_hidden[:_CHECKED_TOKENS],
            weight.requires_grad_(self.weight.requires_grad),
            self.token_ids[:_CHECKED_TOKENS] % weight.size(0),
            self.weights[:_CHECKED_TOKENS] / self.weights[:_CHECKED_TOKENS].sum(),
        )

    def double(self) -> "LossInputs":
        """A copy in float64."""
        return LossInputs(
            self.hidden.detach().double().requires_grad_(),
            self.teacher_hidden.double(),
            self.weight.detach().double().requires_grad_(self.weight.requires_grad),
            self.token_ids,
            self.weights.double(),
        )

    def gradients(self) -> list[torch.Tensor]:
        """Gradients there are."""
        return [leaf.grad for leaf in (self.hidden, self.weight) if leaf.grad is not None]

    def clear_gradients(self) -> None:
        """Forgets the gradients."""
        self.hidden.grad = self.weight.grad = None


def ours(inputs: LossInputs, case: LossCase, kernel: str | None = None) -> torch.Tensor:
    """[`fused_divergence`], with the kernel that it chooses or with another one. It always yields the metrics."""
    head = Head(weight=inputs.weight)
    return fused_divergence(
        inputs.hidden,
        inputs.teacher_hidden,
        head,
        Head(weight=inputs.weight.detach()),
        inputs.token_ids,
        inputs.weights,
        Objective(cast(Divergence, case.divergence), support=cast(Support, case.support), clip=case.clip),
        kernel=kernel,
    ).loss


def trl_chunked(inputs: LossInputs, case: LossCase) -> torch.Tensor:
    """TRL's chunked divergence, which [`~trl.DistillationTrainer`] trains with."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        inputs.hidden, inputs.weight, None, inputs.teacher_hidden, inputs.weight.detach(), None, case.beta
    )
    return (divergence * inputs.weights).sum()


def liger(inputs: LossInputs, case: LossCase) -> torch.Tensor:
    """Liger Kernel's fused JSD, a mean over tokens, without the cross-entropy that it adds by default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=case.beta)
    return loss(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.weight.detach(), inputs.token_ids)


def dense(inputs: LossInputs, case: LossCase) -> torch.Tensor:
    """Whole logit tensors and autograd, in the operations of TRL's SDFT trainer. In float64, the reference."""
    wide = torch.promote_types(inputs.weight.dtype, torch.float32)  # what autocast does to a log-softmax
    student_logits = (inputs.hidden @ inputs.weight.t()).to(wide)
    with torch.no_grad():
        teacher_logits = (inputs.teacher_hidden @ inputs.weight.t()).to(wide)
    log_s = torch.log_softmax(student_logits, dim=-1)
    log_t = torch.log_softmax(teacher_logits, dim=-1)
    kl_div = partial(F.kl_div, reduction="none", log_target=True)
    if case.divergence == "forward_kl":
        entries = kl_div(log_s, log_t)
    elif case.divergence == "reverse_kl":
        entries = kl_div(log_t, log_s)
    else:
        beta = torch.tensor(case.beta, dtype=wide, device=log_s.device)
        mixture = torch.stack([log_s + torch.log(1 - beta), log_t + torch.log(beta)]).logsumexp(dim=0)
        entries = torch.lerp(kl_div(mixture, log_s), kl_div(mixture, log_t), case.beta)
    if case.metrics:
        with torch.no_grad():
            _ = [-(log_p.exp() * log_p).sum(dim=-1) for log_p in (log_s, log_t)]
            _ = [log_p.gather(1, inputs.token_ids[:, None]) for log_p in (log_s, log_t)]
            if case.clip is not None:
                _ = [(entries > case.clip).any(dim=-1)]
    if case.clip is not None:
        entries = entries.clamp(max=case.clip)
    return (entries.sum(dim=-1) * inputs.weights).sum()


LOSSES: dict[str, Callable[[LossInputs, LossCase], torch.Tensor]] = {
    "ours": ours,
    "ours-triton": partial(ours, kernel="triton"),
    "ours-compiled": partial(ours, kernel="compiled"),
    "ours-eager": partial(ours, kernel="eager"),
    "trl-chunked": trl_chunked,
    "liger": liger,
    "dense": dense,
}


def missing_feature(name: str, case: LossCase) -> str | None:
    """
    What a case asks for that a contender does not have.

    Args:
        name (`str`):
            Name of the contender.
        case ([`LossCase`]):
            Case.

    Returns:
        `str`, *optional*:
            The reason, `None` if it has everything.
    """
    if name == "ours-triton" and case.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton is for GPUs"
    if case.support != "full" and not name.startswith("ours"):
        return "it sums over the whole vocabulary"
    if name in ("trl-chunked", "liger") and case.clip is not None:
        return "it cannot clip"
    if name == "liger" and case.token_weights:
        return "it weights all tokens alike"
    if name == "liger" and case.metrics:
        return "it yields no metrics"
    if name == "trl-chunked" and case.metrics:
        return "of the metrics it yields the student's entropy only"
    return None


class Loss:
    """
    A contender that computes the loss and its gradients.

    Args:
        name (`str`):
            Key of `LOSSES`.
        case ([`LossCase`]):
            Case.
    """

    def __init__(self, name: str, case: LossCase):
        reason = missing_feature(name, case)
        if reason is not None:
            raise CannotRun(reason)
        self._loss, self._case = LOSSES[name], case
        self.inputs = LossInputs.make(case)

    def run(self) -> None:
        """One forward and backward pass."""
        self._loss(self.inputs, self._case).backward()

    def kept_bytes(self) -> int:
        """Bytes of the gradients, which any way of computing them has to hand over."""
        return sum(gradient.nbytes for gradient in self.inputs.gradients())

    def clear(self) -> None:
        """Forgets the gradients."""
        self.inputs.clear_gradients()

    def check(self) -> dict[str, float]:
        """Relative error of the gradients on a slice of the inputs, in the Euclidean norm: the larger one."""
        inputs = self.inputs.cut()
        reference = inputs.double()
        self._loss(inputs, self._case).backward()
        dense(reference, self._case).backward()
        errors = [
            ((got.double() - wanted).norm() / wanted.norm()).item()
            for got, wanted in zip(inputs.gradients(), reference.gradients(), strict=True)
        ]
        return {"gradient_error": max(errors)}


class Floor:
    """
    The matrix products that no way of computing the gradients can do without, and nothing else.

    They are the two projections, the gradient's product with the head and, unless the head is frozen, with the hidden
    states. All results go to tensors made beforehand, so there is no extra memory to report.

    Args:
        case ([`LossCase`]):
            Case.
    """

    def __init__(self, case: LossCase):
        inputs = LossInputs.make(case)
        self._hidden, self._teacher_hidden = inputs.hidden.detach(), inputs.teacher_hidden
        self._weight = inputs.weight.detach()
        self._logits = self._hidden.new_empty(min(_FLOOR_ROWS, case.num_tokens), case.vocab_size)
        self._grad_hidden = torch.empty_like(self._hidden)
        self._grad_weight = None if case.frozen_head else torch.zeros_like(self._weight)

    def run(self) -> None:
        """The products, each once."""
        step = self._logits.size(0)
        for start in range(0, self._hidden.size(0), step):
            rows = slice(start, start + step)
            hidden = self._hidden[rows]
            logits = self._logits[: hidden.size(0)]
            torch.mm(self._teacher_hidden[rows], self._weight.t(), out=logits)
            torch.mm(hidden, self._weight.t(), out=logits)
            torch.mm(logits, self._weight, out=self._grad_hidden[rows])
            if self._grad_weight is not None:
                # Added up over the blocks, if there are several
                torch.addmm(self._grad_weight, logits.t(), hidden, beta=float(start > 0), out=self._grad_weight)


def serve(name: str, settings: dict[str, Any], channel: Channel) -> None:
    """
    Runs a contender until there are no more commands.

    Args:
        name (`str`):
            Name of the contender.
        settings (`dict[str, Any]`):
            Fields of [`LossCase`].
        channel ([`Channel`]):
            Where commands come from and answers go.
    """
    case = LossCase(**settings)
    device = torch.device(case.device)
    contender: Loss | Floor | None = make_contender(name, case)
    facts: dict[str, Any] = {"threads": torch.get_num_threads()}
    if name.startswith("ours"):
        wide = torch.promote_types(getattr(torch, case.dtype), torch.float32)
        facts["kernel"] = name.partition("-")[2] or default_kernel(device, case.vocab_size, wide)
    answer = facts
    while True:
        if device.type == "cuda":
            # The contenders share the device: nobody holds anything while it is another one's turn
            contender = None
            release_memory(device)
        channel.send(answer)
        command = channel.receive()
        if command is None:
            return
        contender = contender or make_contender(name, case)
        answer = _obey(command, contender, device)


def make_contender(name: str, case: LossCase) -> Loss | Floor:
    """The contender of a name, with its inputs."""
    return Floor(case) if name == "floor" else Loss(name, case)


def _obey(command: str, contender: Loss | Floor, device: torch.device) -> dict[str, float]:
    if command == "check":
        return contender.check() if isinstance(contender, Loss) else {}
    if command == "memory":
        if isinstance(contender, Floor):
            return {}
        peak = PeakMemory(device)
        contender.run()
        synchronize(device)
        extra = peak.stop() - contender.kept_bytes()
        contender.clear()
        return {"peak_extra_bytes": max(0, extra)}
    if command == "time" and device.type == "cuda":
        _run_for(_GPU_WARMUP_SECONDS, contender, device)
    seconds = _timed(contender, device)
    if command == "warmup":
        release_memory(torch.device("cpu"))  # what compilers leave behind
    return {"seconds": seconds}


def _run_for(seconds: float, contender: Loss | Floor, device: torch.device) -> None:
    """Fills PyTorch's cache and brings the clock up, as in a run that has been going on for a while."""
    while seconds > 0.0:
        seconds -= _timed(contender, device)


def _timed(contender: Loss | Floor, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    contender.run()
    synchronize(device)
    seconds = time.perf_counter() - started
    if isinstance(contender, Loss):
        contender.clear()
    return seconds
