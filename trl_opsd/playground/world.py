"""
The embedded world: column addition with worked solutions, a character tokenizer and a small Qwen3 configuration.

Nothing here is downloaded and everything is a function of a seed, so that the demos start from the same problems on
every machine.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config


PAD_TOKEN = "<|pad|>"
UNK_TOKEN = "<|unk|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True)
class World:
    """
    Addition problems of one size, split into rows for the base, for self-distillation and for the held-out test.

    Args:
        digits (`int`):
            Number of digits of both summands.
        base_rows (`int`):
            Number of problems that the base model is trained on.
        train_rows (`int`):
            Number of problems for self-distillation.
        test_rows (`int`):
            Number of held-out problems.
        chatty (`bool`, *optional*, defaults to `False`):
            Whether the worked solutions restate the problem and comment every step.
    """

    digits: int
    base_rows: int
    train_rows: int
    test_rows: int
    chatty: bool = False

    def splits(self, seed: int = 0) -> dict[str, Dataset]:
        """
        Builds the `"base"`, `"train"` and `"test"` rows. No two rows of any split ask for the same pair of summands,
        in either order.

        Args:
            seed (`int`, *optional*, defaults to `0`):
                Seed of the problems.

        Returns:
            `dict[str, Dataset]`:
                Datasets with the columns `"prompt"` (one user turn), `"solution"` and `"answer"`. The base rows also
                have `"brief"`, a solution with hardly any elaboration.
        """
        rng = random.Random(seed)
        sizes = {"base": self.base_rows, "train": self.train_rows, "test": self.test_rows}
        low, high = 10 ** (self.digits - 1), 10**self.digits - 1
        pairs: dict[tuple[int, int], tuple[int, int]] = {}
        available = (high - low + 1) * (high - low + 2) // 2
        if sum(sizes.values()) > available:
            raise ValueError(
                f"The world has {available} different problems of {self.digits} digits, but base_rows, train_rows and "
                f"test_rows ask for {sum(sizes.values())}. Lower them or raise digits."
            )
        while len(pairs) < sum(sizes.values()):
            a, b = rng.randint(low, high), rng.randint(low, high)
            pairs.setdefault((min(a, b), max(a, b)), (a, b))
        problems = iter(pairs.values())
        splits = {
            name: Dataset.from_list([self.row(*next(problems), rng) for _ in range(size)])
            for name, size in sizes.items()
        }
        return {name: rows if name == "base" else rows.remove_columns("brief") for name, rows in splits.items()}

    def row(self, a: int, b: int, rng: random.Random) -> dict[str, Any]:
        """
        Makes the dataset row of one problem.
        """
        return {
            "prompt": [{"role": "user", "content": f"{a}+{b}=?"}],
            "solution": worked_solution(a, b, rng, detail=0.9 if self.chatty else 0.0),
            "brief": worked_solution(a, b, rng, detail=0.05 if self.chatty else 0.0),
            "answer": str(a + b),
        }


WORLDS = {
    "opsd": World(digits=3, base_rows=12_000, train_rows=8_000, test_rows=400),
    "opsdc": World(digits=2, base_rows=2_600, train_rows=1_000, test_rows=400, chatty=True),
}


def column_steps(a: int, b: int) -> list[tuple[str, int]]:
    """
    Adds two numbers column by column, from the ones up, as `(step, carry)`.
    """
    steps, carry = [], 0
    while a or b:
        total = a % 10 + b % 10 + carry
        step = f"{a % 10}+{b % 10}+{carry}={total}" if carry else f"{a % 10}+{b % 10}={total}"
        carry = total // 10
        steps.append((step, carry))
        a, b = a // 10, b // 10
    return steps


def worked_solution(a: int, b: int, rng: random.Random, detail: float = 0.0) -> str:
    r"""
    The worked solution: one line per column, then the boxed sum. Two kinds of elaboration are each present with
    probability `detail`: restating the problem and commenting every step.
    """
    restate, comment = rng.random() < detail, rng.random() < detail
    lines = [f"We add {a} and {b}."] if restate else []
    for step, carry in column_steps(a, b):
        lines.append(f"{step}, carry {carry}" if comment else step)
    return "\n".join([*lines, rf"\boxed{{{a + b}}}"])


def correct(completion: str, answer: str) -> bool:
    r"""
    Whether the last `\boxed{}` of a completion holds the answer.

    Args:
        completion (`str`):
            Text that the model wrote.
        answer (`str`):
            The sum, as in the `"answer"` column.

    Returns:
        `bool`:
            `True` if the completion is right.
    """
    boxed = _BOXED.findall(completion)
    return bool(boxed) and boxed[-1].strip() == answer


def accuracy_reward(completions: list[list[dict[str, str]]], answer: list[str], **kwargs: Any) -> list[float]:
    """
    [`correct`] as a reward function, for the training log.
    """
    return [float(correct(turns[-1]["content"], a)) for turns, a in zip(completions, answer, strict=True)]


def sums_by_the_teacher(before: list[str], written: list[str], by: str) -> list[int | None]:
    """
    Boundary of [`~trl_opsd.generate.TESSYMaker`]: what follows an equals sign takes capability, what follows a line
    end is style.

    Args:
        before (`list[str]`):
            Texts so far.
        written (`list[str]`):
            What has been written since.
        by (`str`):
            `"student"` or `"teacher"`.

    Returns:
        `list[int | None]`:
            Number of characters up to the end of the writer's part, `None` if it has not ended.
    """
    places = [text.find("=" if by == "student" else "\n") for text in written]
    return [place + 1 if place >= 0 else None for place in places]


def decisive_steps(row: Mapping[str, Any], rollout: Any) -> list[dict[str, Any]]:
    """
    Annotates a rollout, as the `annotator` of the diagnosis context: the result of every column of one that is right,
    the first column that is not the reference's of one that is wrong.

    Args:
        row (`Mapping[str, Any]`):
            Dataset row.
        rollout ([`~trl_opsd.context.Rollout`]):
            The rollout.
    """
    if rollout.correct:
        results = re.finditer(r"(?<==)\d+", rollout.text)
        return [{"start": its.start(), "end": its.end(), "type": "key_formula"} for its in results]
    known, start = row["solution"].split("\n"), 0
    for line in rollout.text.split("\n"):
        if line and line not in known:
            return [{"start": start, "end": start + len(line), "type": "arithmetic_slip"}]
        start += len(line) + 1
    return []


def make_tokenizer() -> PreTrainedTokenizerFast:
    """
    Makes the world's tokenizer: one token per printable ASCII character, per role name and per ChatML marker.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]:
            The tokenizer, with its chat template.
    """
    special = [PAD_TOKEN, UNK_TOKEN, TURN_START, TURN_END]
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocab = {token: index for index, token in enumerate([*special, *ROLES, *characters])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=UNK_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{'|'.join(ROLES)}|[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=512,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """
    Makes the configuration of the world's model: Qwen3 with about 0.8 M parameters.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Tokenizer of the model.

    Returns:
        [`~transformers.Qwen3Config`]:
            The configuration.
    """
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
