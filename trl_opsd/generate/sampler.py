"""Completions that are on disk as soon as they are made, and are never made twice."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..files import LineFile
from ..sampling import Backend, Completion, MixedCompletion, MixedRequest, Request, Sampling, generate_mixed
from ..sampling.sources import TokenIds
from .base import Attempt


class Sampler:
    """
    Samples completions and writes each down as it is finished. One is known by its prompt and by how often that was
    asked for before, which with the seed decides what it is: a file that is there already is read instead.

    Args:
        file (`Path`):
            File of the completions, a JSON object per line.
        load (`Callable[[], Backend]`):
            Gives what generates. It is called when the first completion is missing.
        decode (`Callable[[int, list[int], list[int]], Any]`):
            From the index of a row, the token ids of a prompt and of its completion to the completion as the row's
            prompt is, text or messages.
        sampling ([`Sampling`]):
            How to draw tokens.
        seed (`int`):
            Seed that those of all completions come from.

    Raises:
        ValueError: If a line of the file is no completion.
    """

    def __init__(
        self,
        file: Path,
        load: Callable[[], Backend],
        decode: Callable[[int, TokenIds, TokenIds], Any],
        sampling: Sampling,
        seed: int,
    ):
        self._load, self._decode, self._sampling, self._seed = cache(load), decode, sampling, seed
        self._file = LineFile(file)
        self._asked: Counter[str] = Counter()
        self._known: dict[tuple[str, int], dict[str, Any]] = {}
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            try:
                entry = json.loads(line)
                self._known[entry["prompt"], entry["number"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number}, is no completion ({error!r}). Remove that line.") from error

    def __call__(
        self,
        rows: Sequence[int],
        prompt_ids: Sequence[TokenIds],
        what: str | None,
        max_new_tokens: int | None = None,
    ) -> list[Attempt]:
        """
        Completions of prompts, each for a row.

        Args:
            rows (`Sequence[int]`):
                Index of the row of each.
            prompt_ids (`Sequence[list[int]]`):
                Token ids of the prompts.
            what (`str`, *optional*):
                What they are, for the progress bar. `None` shows none.
            max_new_tokens (`int`, *optional*):
                Longest completion, if it is another one than that of the run.
        """
        limited = "" if max_new_tokens is None else f" {max_new_tokens}"
        sampling = self._sampling if max_new_tokens is None else replace(self._sampling, max_new_tokens=max_new_tokens)
        keys = self._keys(f"{ids}{limited}" for ids in prompt_ids)
        requests = [Request(ids, self._seed_of(*key)) for ids, key in zip(prompt_ids, keys, strict=True)]
        return self._completed(rows, keys, requests, what, lambda backend, asked: backend.generate(asked, sampling))

    def mix(
        self,
        rows: Sequence[int],
        prompt_ids: Sequence[TokenIds],
        other_prompt_ids: Sequence[TokenIds],
        share: float,
        what: str,
    ) -> list[Attempt]:
        """
        Completions of two prompts each, whose tokens are drawn after the one or the other.

        Args:
            rows (`Sequence[int]`):
                Index of the row of each.
            prompt_ids (`Sequence[list[int]]`):
                Token ids of the prompts.
            other_prompt_ids (`Sequence[list[int]]`):
                Token ids of the other prompts.
            share (`float`):
                Probability with which a token is drawn after the first.
            what (`str`):
                What they are, for the progress bar.
        """
        pairs = list(zip(prompt_ids, other_prompt_ids, strict=True))
        keys = self._keys(f"{ids} {other_ids} {share}" for ids, other_ids in pairs)
        requests = [
            MixedRequest(ids, self._seed_of(*key), other_ids, share)
            for (ids, other_ids), key in zip(pairs, keys, strict=True)
        ]
        return self._completed(
            rows, keys, requests, what, lambda backend, asked: generate_mixed(backend, asked, self._sampling)
        )

    def _keys(self, texts: Iterable[str]) -> list[tuple[str, int]]:
        keys = []
        for text in texts:
            digest = hashlib.sha256(text.encode()).hexdigest()[:32]
            keys.append((digest, self._asked[digest]))
            self._asked[digest] += 1
        return keys

    def _completed(
        self,
        rows: Sequence[int],
        keys: Sequence[tuple[str, int]],
        requests: Sequence[Any],
        what: str | None,
        generate: Callable[[Backend, list[Any]], Iterator[tuple[int, Completion]]],
    ) -> list[Attempt]:
        missing = [index for index, key in enumerate(keys) if key not in self._known]
        if missing:
            asked = [requests[index] for index in missing]
            # Not smoothed: completions come in batches, and the pace within one says nothing
            bar = tqdm(
                total=len(keys),
                initial=len(keys) - len(missing),
                desc=what,
                unit="completion",
                smoothing=0,
                disable=what is None,
            )
            with bar:
                for position, completion in generate(self._load(), asked):
                    index, request = missing[position], asked[position]
                    entry = self._entry(rows[index], keys[index], request, completion)
                    self._file.append(json.dumps(entry, ensure_ascii=False))
                    self._known[keys[index]] = entry
                    bar.update()
        return [self._attempt(row, self._known[key]) for row, key in zip(rows, keys, strict=True)]

    def _entry(self, row: int, key: tuple[str, int], request: Request, completion: Completion) -> dict[str, Any]:
        digest, number = key
        entry = {
            "row": row,
            "prompt": digest,
            "number": number,
            "seed": request.seed,
            "truncated": not completion.terminated,
            "completion": self._decode(row, request.prompt_ids, completion.token_ids),
            "token_ids": completion.token_ids,
        }
        if isinstance(completion, MixedCompletion):
            entry["sides"] = completion.sides
        return entry

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _attempt(self, row: int, entry: dict[str, Any]) -> Attempt:
        made = {name: entry[name] for name in ("completion", "token_ids", "seed", "truncated")}
        return Attempt(row, **made, sides=entry.get("sides"))

    def _seed_of(self, digest: str, number: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed} {number} {digest}".encode()).digest()[:4], "big")
