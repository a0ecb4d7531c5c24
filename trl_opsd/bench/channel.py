"""How a contender's process talks to the one that started it."""

import json
import os
import sys
from typing import Any


class CannotRun(Exception):
    """A contender has no way to do what the case asks for."""


class Channel:
    """
    The contender's end: JSON lines from stdin, answers on stdout.

    What libraries print joins stderr, so that it is not taken for an answer.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def receive(self) -> Any:
        """
        Waits for the next message.

        Returns:
            `Any`:
                The message, `None` if there will be no more.
        """
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def send(self, answer: dict[str, Any]) -> None:
        """
        Answers.

        Args:
            answer (`dict[str, Any]`):
                Answer, of JSON types.
        """
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()
