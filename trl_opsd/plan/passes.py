"""What a pass through a network takes: it is run on tensors without data, and what is alive is counted."""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..scoring.heads import backbone_of
from .models import Model


class Alive(TorchDispatchMode):
    """
    Counts the bytes of the tensors that are alive, those excepted that were there before. Memory that an operation
    takes and gives back inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Count these as nothing."""
        for tensor in tensors:
            self._add(tensor.untyped_storage(), 0)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._add(storage, storage.nbytes())
        return results

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key).atexit = False

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class Rows(NamedTuple):
    """
    Rows that go through a network at once.

    Args:
        number (`int`):
            How many.
        prompt (`int`):
            Tokens of the longest prompt.
        completion (`int`):
            Tokens of the longest completion.
    """

    number: int
    prompt: int
    completion: int

    @property
    def num_tokens(self) -> int:
        """Tokens that the network reads, padding included."""
        return self.number * (self.prompt + self.completion)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of the completions."""
        return self.number * self.completion


class Pass(NamedTuple):
    """
    Bytes of a pass beyond weights and their gradients, at the end of which the states of the completion tokens are
    there.

    Args:
        forward (`int`):
            Most at once in the forward pass.
        saved (`int`):
            What it leaves, for the backward pass too if there is one.
        backward (`int`):
            Most at once in the backward pass of the layers, the gradient of the states included.
        last (`int`):
            The same, in that of the first layer, which comes last.
        embedding (`int`):
            The same, in that of the embedding.
    """

    forward: int
    saved: int
    backward: int = 0
    last: int = 0
    embedding: int = 0


class Reading(NamedTuple):
    """
    How a network reads rows.

    Args:
        rows ([`Rows`]):
            Which.
        dtype (`torch.dtype`, *optional*):
            What weights are converted to beforehand, by DeepSpeed or FSDP2.
        autocasts (`bool`, *optional*, defaults to `False`):
            Whether autocast converts them for each product.
        learns (`bool`, *optional*, defaults to `False`):
            Whether there is a backward pass.
        recomputes (`bool`, *optional*, defaults to `False`):
            Whether activations are recomputed in it, layer by layer (gradient checkpointing).
        reentrant (`bool`, *optional*, defaults to `False`):
            How.
    """

    rows: Rows
    dtype: torch.dtype | None = None
    autocasts: bool = False
    learns: bool = False
    recomputes: bool = False
    reentrant: bool = False


def measure(model: Model, reading: Reading) -> Pass:
    """
    What a pass takes. Two models with few of its layers are run, and the rest follows, as layers are alike.

    Args:
        model ([`Model`]):
            The network.
        reading ([`Reading`]):
            How it reads.

    Raises:
        ValueError: If it cannot be run without data.
    """
    known = model.__dict__.setdefault("_passes", {})
    if reading not in known:
        total, few = model.num_layers, _representative_layers(model.kinds)
        if 2 * few >= total:
            one = _run(model, reading, 1) if reading.learns else Pass(0, 0)
            known[reading] = _run(model, reading, total)._replace(last=one.backward)
        else:
            one, two = _run(model, reading, few), _run(model, reading, 2 * few)
            slopes = [(more - less) / few for less, more in zip(one, two, strict=True)]
            values = [round(less + slope * (total - few)) for less, slope in zip(one, slopes, strict=True)]
            last = round(one.backward - slopes[2] * (few - 1))
            known[reading] = Pass(*values)._replace(last=last)
    return known[reading]


def _representative_layers(kinds: Sequence[Any]) -> int:
    """As many layers as it takes until those that follow repeat, again and again, at least two."""
    for few in range(2, len(kinds)):
        if all(kinds[index] == kinds[index - few] for index in range(2 * few, len(kinds))):
            return few
    return max(2, len(kinds))


class _Experts(TorchDispatchMode):
    """Has products with experts in every dtype. Those of tensors without data PyTorch has in bf16 alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
            return func(*args, **kwargs)
        left, right = args[:2]
        if right.ndim == 3:  # rows, each with the matrix of its expert
            return left.new_empty(left.size(0), right.size(2))
        ends = args[2] if len(args) > 2 else kwargs["offs"]
        return left.new_empty(len(ends), left.size(0), right.size(1))  # the gradient of the matrices


class _Loss(torch.autograd.Function):
    """Stands for what reads the states: it takes nothing, and hands back their gradient."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
        ctx.states = states.shape, states.dtype
        return states.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> torch.Tensor:
        shape, dtype = ctx.states
        return torch.empty(shape, dtype=dtype)


def _run(model: Model, reading: Reading, num_layers: int) -> Pass:
    modules = model.build(num_layers)
    rows = reading.rows
    width = rows.prompt + rows.completion
    with FakeTensorMode(), _Experts(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _without_data(modules, reading.dtype)
        modules.train(reading.learns)
        if reading.recomputes:
            kwargs = {"use_reentrant": reading.reentrant}
            modules.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            if model.peft_config is not None:
                modules.enable_input_require_grads()
        shape = (1, rows.number * width) if model.packs else (rows.number, width)
        ids = torch.zeros(shape, dtype=torch.int64)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        index = torch.zeros(rows.num_completion_tokens, dtype=torch.int64)
        alive = Alive()
        alive.ignore(*modules.parameters(), *modules.buffers(), ids, position_ids, index)
        for parameter in modules.parameters() if reading.learns else ():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                alive.ignore(parameter.grad)
        peaks: list[int] = []

        def at_the_embedding(_: torch.Tensor) -> None:
            peaks.append(alive.peak)
            alive.restart()

        def watch(_: Any, __: Any, embedded: torch.Tensor) -> None:
            if embedded.requires_grad:
                embedded.register_hook(at_the_embedding)

        modules.get_input_embeddings().register_forward_hook(watch)
        with alive, torch.set_grad_enabled(reading.learns):
            try:
                with torch.autocast("cpu", torch.bfloat16, enabled=reading.autocasts):
                    states = backbone_of(modules)(
                        input_ids=ids,
                        attention_mask=_mask(model, modules, rows, width),
                        position_ids=position_ids,
                        use_cache=False,
                    ).last_hidden_state
                    states = states.flatten(0, 1)[index]
            except Exception as error:
                raise ValueError(
                    f"A model of type {model.config.model_type!r} cannot be run without its weights, so what its "
                    f"passes take is not known ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})."
                ) from error
            forward, saved = alive.peak, alive.now
            if not reading.learns:
                return Pass(forward, saved)
            alive.restart()
            loss = _Loss.apply(states)
            del states
            loss.backward()
            layers = peaks[0] if peaks else alive.peak
            return Pass(forward, saved, layers, layers, alive.peak if peaks else 0)


def _without_data(modules: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace what is on the meta device by tensors of a CPU, which kernels and autocast are chosen by."""
    replaced: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in replaced:
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            made = torch.empty(tensor.shape, dtype=wanted, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            replaced[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
        return replaced[id(tensor)]

    for module in modules.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in places:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)


def _mask(model: Model, modules: Any, rows: Rows, width: int) -> torch.Tensor | None:
    """What transformers hands to the layers where rows are padded; a single row is not."""
    is_eager = modules.config._attn_implementation == "eager"
    if model.packs or (rows.number == 1 and not is_eager):
        return None
    kind = next(modules.parameters()).dtype if is_eager else torch.bool
    return torch.empty(rows.number, 1, width, width, dtype=kind)
