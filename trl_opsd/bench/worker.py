"""
The process of one contender: `python -m trl_opsd.bench.worker`.

The first message names the contender and its case and is answered once everything is built; each further one is a
command. The process ends when stdin does, so it outlives nobody.
"""

import pkgutil
import traceback

from .channel import CannotRun, Channel


def main() -> None:
    """Builds a contender and does what it is told."""
    channel = Channel()
    request = channel.receive()
    if request is None:
        return
    try:
        serve = pkgutil.resolve_name(request["factory"])
        serve(request["contender"], request["case"], channel)
    except CannotRun as error:
        channel.send({"error": str(error)})
    except Exception as error:
        traceback.print_exc()
        first_line = next(iter(str(error).strip().splitlines()), "")
        channel.send({"error": f"{type(error).__name__}: {first_line}"})


if __name__ == "__main__":
    main()
