"""The number of compute threads; see also `kernels.cpu.run.threads_set`, and `kernels.cpu.team` for the threads."""

from __future__ import annotations

from ..errors import UserError
from ..kernels.cpu import run


def thread_count(threads: int | None) -> int:
    """The number of threads for the argument `threads`; None: the setting of the calling thread, by default the number of cores.

    Raises UserError for a number outside 1 ... the number of cores.
    """
    if threads is None:
        return run.threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= run.most_threads():
        raise UserError(f"threads must be a whole number of 1 ... {run.most_threads()}, the cores of this process, got {threads!r}")
    return threads
