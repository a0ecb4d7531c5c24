import io
from contextlib import redirect_stdout

from trl.scripts.env import print_env as print_trl_env

import trl_opsd


def print_env() -> None:
    """Print the versions that a bug report should name."""
    with redirect_stdout(io.StringIO()) as trl_env:
        print_trl_env()
    print(f"{trl_env.getvalue().rstrip()}\n- trl-opsd version: {trl_opsd.__version__}\n")


if __name__ == "__main__":
    print_env()
