"""How a process of several ends."""

import atexit
import os
import sys


def leave() -> None:
    """
    End this process, which has done all it had to, before Python clears up.

    A thread of gloo that is late waits for Python to let go of a tensor, and aborts the process if Python has gone:
    pytorch/pytorch#190489. Ending the group of the processes does not wait for it, since modules that were imported
    after its start hold the group as a default argument.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
