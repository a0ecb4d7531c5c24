import pytest

from trl_opsd.eval.arguments import EvalArguments
from trl_opsd.sampling import Sampling
from trl_opsd.scripts.eval import make_parser


def arguments(**fields):
    return EvalArguments(**{"model_name_or_path": "org/model", "benchmarks": ["aime24"], **fields})


def test_presets_are_the_published_settings():
    opsd, opsdc = arguments(), arguments(preset="opsdc")

    assert opsd.sampling() == Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=38912)
    assert opsdc.sampling() == Sampling(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=30000)
    assert (opsd.num_samples, opsdc.num_samples) == (12, 8)
    assert opsd.chat_template_kwargs == opsdc.chat_template_kwargs == {"enable_thinking": True}


def test_every_field_of_a_preset_can_be_set():
    given = arguments(
        preset="opsdc",
        num_samples=1,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=5,
        chat_template_kwargs="{enable_thinking: false}",
    )

    assert given.sampling() == Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=5)
    assert given.num_samples == 1
    assert given.chat_template_kwargs == {"enable_thinking": False}
    assert arguments(chat_template_kwargs={}).chat_template_kwargs == {}


def test_output_dir():
    assert arguments().output_dir == "eval/model"
    assert arguments(adapter="runs/step-100/").output_dir == "eval/model-step-100"
    assert arguments(output_dir="mine").output_dir == "mine"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_name_or_path": None}, "set `model_name_or_path`"),
        ({"benchmarks": None}, "either `benchmarks` .* or `dataset_name`"),
        ({"dataset_name": "rows.jsonl"}, "either `benchmarks` .* or `dataset_name`"),
        ({"temperature": -1.0}, "`temperature` must be at least 0"),
        ({"temperature": 0.0}, "Set `num_samples` to 1"),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "`top_p` must be"),
        ({"top_k": -1}, "`top_k` must be at least 0"),
        ({"limit": 0}, "`limit` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"num_samples": 0}, "`num_samples` must be at least 1"),
        ({"chat_template_kwargs": "thinking"}, "Expected `chat_template_kwargs` to be a mapping"),
        ({"model_init_kwargs": "[1]"}, "Expected `model_init_kwargs` to be a mapping"),
        ({"backend": "vllm_server", "adapter": "a"}, "`--lora-modules`"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        arguments(**fields)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("preset: opsdd", "`preset` must be one of opsd, opsdc, got 'opsdd'"),
        ("backend: hf", "`backend` must be one of vllm, transformers, vllm_server, got 'hf'"),
        ("temperature: [1]", r"`temperature` must be of type float \| None, got \[1\]"),
        ("limit: 2.5", r"`limit` must be of type int \| None, got 2.5"),
        ("top_k: 2.5", r"`top_k` must be of type int \| None, got 2.5"),
        ("batch_size: true", "`batch_size` must be of type int, got True"),
        ("benchmarks: [1]", r"`benchmarks` must be names or files, got \[1\]"),
        ("benchmarks: []", "either `benchmarks`"),
        ("limit: {", "The file of `--config` is not YAML: .*line 4"),
    ],
)
def test_wrong_values_in_a_file(line, message, tmp_path):
    path = tmp_path / "eval.yaml"
    path.write_text(f"model_name_or_path: m\nbenchmarks: aime24\n{line}\n")
    with pytest.raises(ValueError, match=message):
        make_parser().parse_args_and_config(["--config", str(path)])


def test_a_file_may_name_one_benchmark_and_whole_numbers(tmp_path):
    path = tmp_path / "eval.yaml"
    path.write_text("model_name_or_path: m\nbenchmarks: aime24\ntemperature: 1\n")
    (given,) = make_parser().parse_args_and_config(["--config", str(path)])
    assert given.benchmarks == ["aime24"]
    assert given.temperature == 1


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")

    with pytest.raises(ValueError, match=r"holds an adapter. Name it in `adapter`"):
        arguments(model_name_or_path=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert arguments(model_name_or_path=str(tmp_path))
