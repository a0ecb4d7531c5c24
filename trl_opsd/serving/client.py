"""What a vLLM server is asked before it is relied on, and how long it may take to answer."""

import time
import warnings
from importlib import metadata
from typing import Any

import requests
from packaging.requirements import Requirement
from requests.adapters import HTTPAdapter
from transformers import AutoConfig, PreTrainedTokenizerBase
from trl.generation.vllm_client import VLLMClient
from urllib3.exceptions import ReadTimeoutError
from urllib3.util.retry import Retry


# What a model's weights fit into
_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

# A little of everything that tokenizers disagree on
_PROBE = "Let x₁ = 12,345.67;\n\n\tdef f(x):  return x**2  # naïve — 数学 🙂\n"


class ServerError(RuntimeError):
    """A vLLM server failed, also after retries."""


def check_vllm_installed() -> None:
    """
    Make sure that there is a vLLM that TRL works with.

    Raises:
        ValueError: If there is none, or one of another version.
    """
    requirements = map(Requirement, metadata.requires("trl") or [])
    (supported,) = (one.specifier for one in requirements if one.name == "vllm" and one.marker)
    try:
        installed = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        installed = "no vLLM"
    if installed == "no vLLM" or not supported.contains(installed, prereleases=True):
        raise ValueError(
            f"`use_vllm` and `teacher_server_base_url` need vLLM{supported}, the releases TRL works with, and "
            f"{installed} is installed. Run `pip install trl-opsd[vllm]`, or set `use_vllm=False`."
        )


def connect(base_url: str, startup_timeout: float, request_timeout: float) -> VLLMClient:
    """
    A client of a vLLM server.

    Args:
        base_url (`str`):
            Where it answers.
        startup_timeout (`float`):
            Seconds to wait for it to be up.
        request_timeout (`float`):
            See [`limit_requests`].

    Raises:
        ValueError: If it is not up by then.
    """
    wait_for_server(base_url, startup_timeout)
    client = VLLMClient(base_url=base_url)
    limit_requests(client.session, request_timeout)
    return client


def wait_for_server(base_url: str, timeout: float) -> None:
    """
    Wait until a server answers what a client of TRL asks it first. TRL itself would wait without end for one that
    accepts a connection and never answers, or that answers with an error.

    Args:
        base_url (`str`):
            Where it answers.
        timeout (`float`):
            Seconds to wait at most.

    Raises:
        ValueError: If it is not up by then.
    """
    deadline = time.monotonic() + timeout
    for path in ("health", "v1/models"):
        while (trouble := _trouble(f"{base_url}/{path}", deadline - time.monotonic())) is not None:
            left = deadline - time.monotonic()
            if left <= 0.0:
                raise ValueError(
                    f"No vLLM server answers at {base_url} within {timeout:g} seconds ({trouble}). Start it, correct "
                    "the address, or raise `vllm_server_timeout`."
                )
            time.sleep(min(1.0, left))


def _trouble(url: str, patience: float) -> str | None:
    """Why a server does not answer, if so."""
    try:
        # A connection may be lost in a restart without a sign of it, so not all patience goes into one
        response = requests.get(url, timeout=min(30.0, max(0.1, patience)))
    except requests.RequestException as error:
        return str(error)
    return None if response.status_code == 200 else f"{url} has status {response.status_code}"


def limit_requests(session: requests.Session, timeout: float) -> None:
    """
    Have a session try again, with growing pauses, where it cannot connect, the connection breaks or the server is busy
    (five times, about a minute in all), and once where an answer does not come.

    Args:
        session (`requests.Session`):
            Session of a client.
        timeout (`float`):
            Seconds an answer may take.
    """
    retries = _Retries(
        total=5,
        read=1,
        status_forcelist=(500, 502, 503, 504),
        allowed_methods=None,
        backoff_factor=2,
        raise_on_status=False,
    )
    for prefix in ("http://", "https://"):
        session.mount(prefix, _ImpatientAdapter(timeout, max_retries=retries, pool_maxsize=64))


class _Retries(Retry):
    def _is_read_error(self, err: Exception) -> bool:
        # A server that dies or restarts breaks several connections within an instant.
        return isinstance(err, ReadTimeoutError)


class _ImpatientAdapter(HTTPAdapter):
    def __init__(self, timeout: float, **kwargs: Any):
        self._timeout = timeout
        super().__init__(**kwargs)

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        kwargs["timeout"] = kwargs.get("timeout") or self._timeout
        return super().send(*args, **kwargs)


def context_length(client: VLLMClient) -> int:
    """Tokens a server takes for prompt and completion together."""
    return client._get(f"{client.base_url}/v1/models")["data"][0]["max_model_len"]


def check_tokenizer(client: VLLMClient, field: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Make sure that a server means the same by token ids.

    Args:
        client ([`~trl.generation.vllm_client.VLLMClient`]):
            Client of the server.
        field (`str`):
            Field that names the server, for messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.

    Raises:
        ValueError: If it does not.
    """
    text = _PROBE + "".join(tokenizer.all_special_tokens)
    request = {"model": client.model, "prompt": text, "add_special_tokens": False}
    theirs = client._post(f"{client.base_url}/tokenize", json=request)["tokens"]
    if theirs != tokenizer(text, add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"The vLLM server at {client.base_url} (`{field}`) serves '{client.model}', whose tokenizer is not the "
            "policy's: the same text has other token ids there. Serve a model with the policy's tokenizer."
        )


def check_holds_policy(client: VLLMClient, model_config: Any) -> None:
    """
    Make sure that a server can hold the policy's weights, and reports the log-probabilities it samples with.

    Args:
        client ([`~trl.generation.vllm_client.VLLMClient`]):
            Client of the server.
        model_config ([`~transformers.PreTrainedConfig`]):
            Configuration of the policy.

    Raises:
        ValueError: If it cannot.
    """
    info = client.get_server_info()["model_config"]
    if info["logprobs_mode"] != "processed_logprobs":
        raise ValueError(
            f"The vLLM server at {client.base_url} reports `{info['logprobs_mode']}`, which are not the "
            "log-probabilities it samples with. Restart it with `--logprobs-mode processed_logprobs`."
        )
    name, ours = model_config.name_or_path, model_config.get_text_config()
    if info["model"] == name:
        return
    try:
        theirs = AutoConfig.from_pretrained(info["model"], revision=info["revision"]).get_text_config()
    except (OSError, ValueError):
        warnings.warn(
            f"The vLLM server at {client.base_url} serves '{info['model']}'. Whether that is the policy, '{name}', "
            "cannot be seen from here.",
            stacklevel=2,
        )
        return
    for key in _ARCHITECTURE:
        if getattr(theirs, key, None) != getattr(ours, key, None):
            raise ValueError(
                f"The vLLM server at {client.base_url} serves '{info['model']}', which cannot take the weights of "
                f"the policy '{name}': its `{key}` is {getattr(theirs, key, None)}, not {getattr(ours, key, None)}. "
                "Serve the policy's model."
            )
