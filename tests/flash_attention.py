"""The package `flash_attn` in plain PyTorch, for devices and dtypes that the real one does not have."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from transformers import modeling_flash_attention_utils


class FlashAttention:
    """
    Stands in for the package `flash_attn`: transformers imports it, and does all else as it does with the real one.

    Sequences are attended one by one, queries aligned with the last keys, as version 2.1 and later do.
    """

    def __init__(self):
        self.boundaries: list[list[int]] = []
        """Where sequences begin and the last one ends, for each attention over sequences of different lengths."""

    def install(self, monkeypatch) -> None:
        for name, functions in {
            "flash_attn": {
                "flash_attn_func": self.flash_attn_func,
                "flash_attn_varlen_func": self.flash_attn_varlen_func,
                "flash_attn_with_kvcache": None,
            },
            "flash_attn.bert_padding": {
                "pad_input": modeling_flash_attention_utils._pad_input,
                "unpad_input": modeling_flash_attention_utils._unpad_input,
            },
        }.items():
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            vars(module).update(functions)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda *_, **__: True)
        monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)

    def flash_attn_func(self, q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
        return torch.stack([_attention(*row, softmax_scale, causal, window_size) for row in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        self.boundaries.append(cu_seqlens_q.tolist())
        num_queries, num_keys = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        assert max_seqlen_q == num_queries.max()
        assert max_seqlen_k == num_keys.max()
        rows = zip(q.split(num_queries.tolist()), k.split(num_keys.tolist()), v.split(num_keys.tolist()), strict=True)
        return torch.cat([_attention(*row, softmax_scale, causal, window_size) for row in rows])


class TorchFlashAttention(FlashAttention):
    """The same, computed by the flash attention that PyTorch has for CUDA."""

    def flash_attn_func(self, q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
        starts = [torch.arange(len(x) + 1, dtype=torch.int32, device=x.device) * x.size(1) for x in (q, k)]
        out = self.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)), *starts, q.size(1), k.size(1), softmax_scale, causal, window_size
        )
        return out.view_as(q)

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        from torch.nn.attention.varlen import varlen_attn

        self.boundaries.append(cu_seqlens_q.tolist())
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
        window = (window_size[0], 0) if causal else window_size
        return varlen_attn(
            q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k),
            scale=softmax_scale, window_size=window,
        )  # fmt: skip


def use_flash_attention(model):
    """The model, reading with flash attention. Loading it so would ask for a GPU."""
    model.config._attn_implementation = "flash_attention_2"
    return model


def _attention(queries, keys, values, scale, causal, window):
    keys, values = (x.repeat_interleave(queries.size(1) // x.size(1), dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * (scale or queries.size(-1) ** -0.5)
    if causal:
        query_positions = torch.arange(len(queries), device=queries.device) + len(keys) - len(queries)
        distances = query_positions[:, None] - torch.arange(len(keys), device=queries.device)
        unseen = distances < 0
        if window[0] >= 0:
            unseen |= distances > window[0]
        scores = scores.masked_fill(unseen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values)
