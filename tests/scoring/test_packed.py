"""Rows packed into one give the states and the gradients that they give apart."""

import pytest
import torch
import torch.distributed as dist
from flash_attention import FlashAttention, TorchFlashAttention, use_flash_attention
from peft import LoraConfig, get_peft_model
from placement import place
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    CLIPVisionConfig,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    modeling_flash_attention_utils,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from trl_opsd.scoring import can_pack, check_packing, completion_states, packed_states


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])


def gemma3():
    """Five layers with a sliding window, then one without."""
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 6}, sliding_window=6))


def longrope():
    """A rotary embedding that is another one in batches with a row of more than 16 tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope | factors))


def falcon_h1():
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8}
    return FalconH1ForCausalLM(FalconH1Config(**SIZES, **mamba))


def text_and_images():
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**small), text_config=LlamaConfig(**SIZES))
    )


class OtherModel(LlamaModel):
    """Code that does not come from transformers."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def other_code():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model = OtherModel(model.config)
    return model


PACKING = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-longrope": longrope,
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "gemma3-sliding": gemma3,
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    ),
}
NOT_PACKING = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2)),
    "falcon-h1": falcon_h1,
    "lfm2": lambda: Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 2)),
    "recurrent gemma": lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SIZES, lru_width=32)),
    "stablelm": lambda: StableLmForCausalLM(StableLmConfig(**SIZES)),  # hands boundaries on to no layer
    "text and images": text_and_images,
    "other code": other_code,
}
TELLS_APART = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids"}
# Tokens of the prompt and of the completion of each row, and the completion tokens that are not selected
ROWS = {
    "many lengths": ([(20, 9), (1, 1), (3, 0), (13, 5), (7, 9)], [(0, 0), (0, 3), (4, 8)]),
    "one row": ([(5, 4)], []),
    "one token": ([(1, 1)], []),
    "one token a row": ([(1, 0), (1, 1), (1, 0)], []),
    "equal lengths": ([(4, 3)] * 3, []),
    "a row without a selected token": ([(6, 2), (2, 7)], [(0, 0), (0, 1)]),
    "nothing selected": ([(3, 2), (5, 1)], [(0, 0), (0, 1), (1, 0)]),
}


def make_batch(name):
    """Token ids, attention mask and selected tokens."""
    torch.manual_seed(1)
    lengths, unselected = ROWS[name]
    width, completion_width = max(p for p, _ in lengths), max(max(c for _, c in lengths), 1)
    ids = torch.randint(1, 50, (len(lengths), width + completion_width))
    mask = torch.ones_like(ids)
    for row, (prompt, completion) in enumerate(lengths):
        mask[row, : width - prompt] = 0
        mask[row, width + completion :] = 0
    selected = mask[:, -completion_width:].bool()
    for row, column in unselected:
        selected[row, column] = False
    return ids * mask, mask, selected


def states_and_gradients(model, batch, pack=False):
    """States, and the gradients of a sum of them in which each counts differently."""
    states = completion_states(model, *batch, pack=pack)
    factors = torch.sin(torch.arange(states.numel(), dtype=torch.float32, device=states.device)).view_as(states)
    (states * factors).sum().backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad()
    return states.detach(), gradients


def assert_equal(one, other, rtol=1e-5, atol=2e-5):
    torch.testing.assert_close(other[0], one[0], rtol=rtol, atol=atol)
    for name, gradient in one[1].items():
        scale = max(gradient.abs().max().item(), 1.0)
        torch.testing.assert_close(other[1][name], gradient, rtol=rtol, atol=atol * scale, msg=name)


@pytest.fixture
def flash(monkeypatch):
    flash = FlashAttention()
    flash.install(monkeypatch)
    return flash


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", PACKING)
def test_states_and_gradients_equal_those_of_padded_rows(name, lora, rows, flash):
    torch.manual_seed(0)
    model = place(PACKING[name]())
    if lora:
        model = get_peft_model(model, LORA)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.normal_(std=0.2)
    batch = make_batch(rows)
    padded = states_and_gradients(model, batch)
    assert not flash.boundaries

    use_flash_attention(model)
    packed = states_and_gradients(model, batch, pack=True)
    assert flash.boundaries
    assert_equal(padded, packed)
    assert packed[0].shape == (batch[2].sum(), 32)
    if batch[2].any():
        assert packed[0].std() > 0.1
        assert any(gradient.abs().max() > 1e-3 for gradient in packed[1].values())


def test_network_reads_no_padding(flash, monkeypatch):
    def search(*_):
        raise AssertionError("boundaries are given, so that no layer has to search for them in the positions")

    monkeypatch.setattr(modeling_flash_attention_utils, "_is_packed_sequence", search)
    torch.manual_seed(0)
    model = place(PACKING["qwen3"]())
    batch = make_batch("many lengths")
    padded = states_and_gradients(model, batch)
    read = []
    use_flash_attention(model).get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
    packed = states_and_gradients(model, batch, pack=True)
    assert_equal(padded, packed)

    (token_ids,) = read
    ids, mask, _ = batch
    assert token_ids.tolist() == [ids[mask.bool()].tolist()]
    assert flash.boundaries == [[0, 29, 31, 34, 52, 68]] * 4


def test_layers_that_are_handed_no_boundaries_find_them(flash):
    """Some models of transformers let the positions through and nothing else."""
    torch.manual_seed(0)
    model = place(PACKING["qwen3"]())
    batch = make_batch("many lengths")
    expected = completion_states(model, *batch)
    use_flash_attention(model)

    def backbone(input_ids, position_ids, use_cache, **_):
        return model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    torch.testing.assert_close(packed_states(backbone, *batch), expected, rtol=1e-5, atol=1e-5)
    assert flash.boundaries == [[0, 29, 31, 34, 52, 68]] * 4


class TestCheck:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", PACKING)
    def test_rows_that_are_told_apart(self, name, dtype, flash):
        torch.manual_seed(0)
        model = use_flash_attention(place(PACKING[name]()).to(dtype))
        check_packing(model, model.device)
        assert flash.boundaries[0] == [0, 6, 13, 21]
        assert model.training

    @pytest.mark.parametrize("name", PACKING)
    def test_rows_that_are_taken_for_one_sequence(self, name, flash):
        """As by a model that hands neither boundaries nor positions on to its attention."""
        torch.manual_seed(0)
        model = use_flash_attention(place(PACKING[name]()))
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {k: v for k, v in kwargs.items() if k not in TELLS_APART}),
                with_kwargs=True,
            )
        with pytest.raises(
            ValueError, match=r"differ by \d+%. Load it with another `attn_implementation` than 'flash"
        ):
            check_packing(model, model.device)


def test_gradient_checkpointing(flash):
    torch.manual_seed(0)
    model = place(PACKING["gemma3-sliding"]())
    batch = make_batch("many lengths")
    padded = states_and_gradients(model, batch)
    use_flash_attention(model).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(padded, states_and_gradients(model, batch, pack=True))
    assert len(flash.boundaries) == 2 * 6  # every layer is run again in the backward pass


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", PACKING)
def test_positions_tell_rows_apart_where_masks_are_made_of_them(name, implementation):
    """What transformers makes of packed rows without flash attention: exact, but quadratic in all tokens."""
    torch.manual_seed(0)
    model = place(PACKING[name]())
    model.config._attn_implementation = implementation
    batch = make_batch("many lengths")
    padded = states_and_gradients(model, batch)
    assert_equal(padded, states_and_gradients(model, batch, pack=True))


@pytest.mark.parametrize("rows", ["many lengths", "equal lengths", "one row"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3-sliding", "mistral-sliding"])
def test_padded_rows_under_flash_attention(name, rows, flash):
    torch.manual_seed(0)
    model = place(PACKING[name]())
    batch = make_batch(rows)
    expected = states_and_gradients(model, batch)
    assert_equal(expected, states_and_gradients(use_flash_attention(model), batch))


class TestCanPack:
    @pytest.mark.parametrize("name", PACKING)
    def test_with_flash_attention(self, name):
        assert can_pack(use_flash_attention(PACKING[name]()))

    @pytest.mark.parametrize("name", NOT_PACKING)
    def test_models_that_cannot_tell_rows_apart(self, name):
        model = use_flash_attention(NOT_PACKING[name]())
        assert not can_pack(model)

    @pytest.mark.parametrize(
        ("implementation", "packs"),
        [
            ("flash_attention_2", True),
            ("flash_attention_3", True),
            ("kernels-community/flash-attn2", True),  # registered as it is when a kernel is loaded
            ("eager", False),
            ("sdpa", False),
            ("flex_attention", False),
            ("paged|flash_attention_2", False),
            ("somebody/their-attention", False),
        ],
    )
    def test_attention_implementations(self, implementation, packs, monkeypatch):
        functions = ALL_ATTENTION_FUNCTIONS
        monkeypatch.setattr(functions, "_local_mapping", {}, raising=False)
        functions["kernels-community/flash-attn2"] = functions["flash_attention_2"]
        functions["somebody/their-attention"] = lambda *args, **kwargs: None
        model = PACKING["qwen3"]()
        model.config._attn_implementation = implementation
        assert can_pack(model) is packs

    def test_sharded_by_fsdp2(self):
        """Its classes are no longer those of transformers."""
        model = use_flash_attention(PACKING["qwen3"]())
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            fully_shard(model.model, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert can_pack(model)
        finally:
            dist.destroy_process_group()


class TestOnGPU:
    """The kernels themselves, which no CPU runs."""

    @pytest.fixture(params=["flash_attention_2", "flash_attention_3", "torch"])
    def implementation(self, request, monkeypatch):
        if not torch.cuda.is_available():
            pytest.skip("flash attention runs on a GPU, and there is none")
        if request.param == "torch":
            pytest.importorskip("torch.nn.attention.varlen", reason="this version of PyTorch has no such function")
            TorchFlashAttention().install(monkeypatch)
            return "flash_attention_2"
        available = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
        if not available[request.param]():
            pytest.skip(f"no package of {request.param} that runs on this GPU is installed")
        return request.param

    @pytest.mark.parametrize("name", ["qwen3", "gemma3-sliding"])
    def test_packed_is_as_exact_as_padded(self, name, implementation):
        torch.manual_seed(0)
        model = PACKING[name]().cuda()
        batch = tuple(tensor.cuda() for tensor in make_batch("many lengths"))
        exact = states_and_gradients(model, batch)

        model.to(torch.bfloat16)
        model.config._attn_implementation = implementation
        packed = states_and_gradients(model, batch, pack=True)
        padded = states_and_gradients(model, batch)
        for of_packed, of_padded in zip(errors(exact, packed), errors(exact, padded), strict=True):
            assert of_packed < 1.5 * of_padded + 1e-3
            assert of_padded < 0.1


def errors(exact, rounded):
    """Relative errors of the states and of all gradients together."""
    gradients = [torch.cat([value.float().flatten() for value in result[1].values()]) for result in (exact, rounded)]
    for reference, value in ((exact[0], rounded[0].float()), gradients):
        yield ((value - reference).norm() / reference.norm()).item()
