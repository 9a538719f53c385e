"""`serve`: a model behind HTTP, until a signal."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from ..errors import UserError
from ..inference.classifier import Classifier, load
from ..kernels.cpu.run import threads_set
from ..runtime.threads import thread_count
from .options import ServeOptions

PACKAGES = ("starlette", "uvicorn", "python_multipart", "prometheus_client")  # of the extra "serve"


def serve(
    model: Classifier | str | os.PathLike[str],
    *,
    ready: Callable[[str], None] = lambda address: None,
    threads: int | None = None,
    **options: Any,
) -> None:
    """Serve a model over HTTP until SIGINT or SIGTERM, after which what was accepted is answered; a second signal ends at once.

    model: a Classifier, or a run as for `load`. ready: is told the address, as http://127.0.0.1:8000, as soon as requests are answered.
    threads: how many compute; None: as many as there are cores. options: the fields of `ServeOptions` (docs/serving.md). Outside the main
    thread no signal ends it. Raises UserError for wrong options, a missing run or package, and an address that cannot be used.
    """
    checked = ServeOptions(**options)
    for package in PACKAGES:
        if find_spec(package) is None:
            raise UserError(f"serving needs {package}, which is not installed: pip install 'minivit[serve]'")
    from .server import run

    with threads_set(thread_count(threads)):
        run(model if isinstance(model, Classifier) else load(model), checked, ready)
