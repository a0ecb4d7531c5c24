import pytest
import torch
from transformers import AutoModelForCausalLM, FalconH1Config, FalconH1ForCausalLM

from trl_opsd.bench.arguments import TeacherArguments
from trl_opsd.bench.channel import CannotRun
from trl_opsd.bench.report import CaseResult, teacher_plot, teacher_table
from trl_opsd.bench.runner import Row
from trl_opsd.bench.teacher import Teacher, TeacherCase
from trl_opsd.scoring import backbone_of


def make_case(model, **kwargs):
    sizes = {"num_rollouts": 3, "teacher_prompt_tokens": 11, "max_new_tokens": 5}
    fields = {"model": str(model), "random_weights": False, "device": torch.empty(0).device.type}
    return TeacherCase(**{**fields, "dtype": "float32", "seed": 0, **sizes, **kwargs})


def test_both_yield_the_states_of_the_rollouts(model_path):
    shared, whole = (Teacher(name, make_case(model_path)) for name in TeacherArguments.all_contenders)
    tokens = []
    for teacher in (shared, whole):
        backbone_of(teacher._model).register_forward_pre_hook(
            lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
        )

    states = shared.run()

    torch.testing.assert_close(states, whole.run(), atol=1e-5, rtol=1e-5)
    assert states.shape[:2] == (3, 5)
    assert tokens == [11, 15, 48]
    model = AutoModelForCausalLM.from_pretrained(model_path).to(states.device)
    logits = model.lm_head(states)
    with torch.no_grad():
        expected = model(whole._input_ids).logits[:, 10:15]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_recurrent_model_says_why_it_cannot_share(tmp_path):
    config = FalconH1Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_d_state=8,
    )  # fmt: skip
    FalconH1ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CannotRun, match="more of a prompt than keys and values"):
        Teacher("shared-prompt", make_case(tmp_path))


@pytest.mark.needs("matplotlib")
def test_table_and_plot(model_path):
    rows = [
        Row("shared-prompt", samples=[{"seconds": 1.0}], facts={"peak_extra_bytes": 2**20}),
        Row("whole-sequences", samples=[{"seconds": 4.0}], facts={"peak_extra_bytes": 2**21}),
    ]
    result = CaseResult(vars(make_case(model_path, device="cpu")), rows, [])
    assert list(teacher_table(result).columns[3].cells) == ["0.25×", "1.00×"]
    title = teacher_plot([result]).get_suptitle()
    assert title.endswith("3 rollouts of 5 tokens after one prompt of 11, float32 on cpu")
