"""Completions that are on disk as soon as they are made, and are never made twice."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..files import LineFile
from ..sampling import Backend, Request, Sampling
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

    def __call__(self, rows: Sequence[int], prompt_ids: Sequence[TokenIds], what: str) -> list[Attempt]:
        """
        Completions of prompts, each for a row.

        Args:
            rows (`Sequence[int]`):
                Index of the row of each.
            prompt_ids (`Sequence[list[int]]`):
                Token ids of the prompts.
            what (`str`):
                What they are, for the progress bar.
        """
        keys = []
        for ids in prompt_ids:
            digest = hashlib.sha256(str(ids).encode()).hexdigest()[:32]
            keys.append((digest, self._asked[digest]))
            self._asked[digest] += 1
        missing = [index for index, key in enumerate(keys) if key not in self._known]
        if missing:
            backend = self._load()
            requests = [Request(prompt_ids[index], self._seed_of(*keys[index])) for index in missing]
            # Not smoothed: completions come in batches, and the pace within one says nothing
            bar = tqdm(total=len(keys), initial=len(keys) - len(missing), desc=what, unit="completion", smoothing=0)
            with bar:
                for position, completion in backend.generate(requests, self._sampling):
                    index, request = missing[position], requests[position]
                    digest, number = keys[index]
                    entry = {
                        "row": rows[index],
                        "prompt": digest,
                        "number": number,
                        "seed": request.seed,
                        "truncated": not completion.terminated,
                        "completion": self._decode(rows[index], request.prompt_ids, completion.token_ids),
                        "token_ids": completion.token_ids,
                    }
                    self._file.append(json.dumps(entry, ensure_ascii=False))
                    self._known[keys[index]] = entry
                    bar.update()
        return [self._attempt(row, self._known[key]) for row, key in zip(rows, keys, strict=True)]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _attempt(self, row: int, entry: dict[str, Any]) -> Attempt:
        return Attempt(row, entry["completion"], entry["token_ids"], entry["seed"], entry["truncated"])

    def _seed_of(self, digest: str, number: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed} {number} {digest}".encode()).digest()[:4], "big")
