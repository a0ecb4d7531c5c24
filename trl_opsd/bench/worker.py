"""
The process of one contender: `python -m trl_opsd.bench.worker`.

A case begins with a message that names the contender and its settings and is answered once everything is built; each
further one is a command, and `null` ends the case. The process ends when stdin does, so it outlives nobody, and after
an error that may have left something behind.
"""

import pkgutil
import sys
import traceback
from typing import Any

import torch

from .channel import CannotRun, Channel
from .measure import release_memory


# A CUDA context keeps some workspaces
_KEPT_BYTES = 2**28


def main() -> None:
    """Builds a contender for each case and does what it is told."""
    channel = Channel()
    while (request := channel.receive()) is not None:
        answer = _serve(request, channel)
        device = torch.device(request["case"].get("device", "cpu"))
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # the shapes of one case do not count against another's limit of recompilations
        release_memory(device)
        if answer is None:
            continue
        if answer["no_memory"] and torch.cuda.memory_allocated(device) < _KEPT_BYTES:
            answer["goes_on"] = True
        channel.send(answer)
        if not answer["goes_on"]:
            return


def _serve(request: dict[str, Any], channel: Channel) -> dict[str, Any] | None:
    try:
        serve = pkgutil.resolve_name(request["factory"])
        serve(request["contender"], request["case"], channel)
    except CannotRun as error:
        return {"error": str(error), "no_memory": False, "goes_on": True}
    except Exception as error:
        traceback.print_exc()
        first_line = next(iter(str(error).strip().splitlines()), "")
        return {
            "error": f"{type(error).__name__}: {first_line}",
            "no_memory": isinstance(error, torch.OutOfMemoryError),
            "goes_on": False,
        }
    return None


if __name__ == "__main__":
    main()
