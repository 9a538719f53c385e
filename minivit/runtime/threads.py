"""How many threads compute. There is one pool of them, Numba's; see also `kernels.cpu.run.threads_set`."""

from __future__ import annotations

from ..errors import UserError
from ..kernels.cpu import run


def thread_count(threads: int | None) -> int:
    """The number that `threads=` asks for; None: what the calling thread is set to, which is as many as there are cores by default.

    Raises UserError for a number that there are not.
    """
    if threads is None:
        return run.threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= run.most_threads():
        raise UserError(f"threads must be a whole number of 1 ... {run.most_threads()}, the cores of this process, got {threads!r}")
    return threads
