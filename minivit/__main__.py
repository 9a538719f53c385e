"""`python -m minivit`, and the command `minivit`."""

import os
import signal
from collections.abc import Mapping
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> int:
    """Run the command line of this process; returns the exit status."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _end_at_once(before)  # an exception in the middle of an import would be shown, or become another one
    from .cli.main import main as run

    for number, handler in before.items():
        signal.signal(number, handler)
    try:
        return run()
    finally:
        _end_at_once(before)


def _end_at_once(before: Mapping[signal.Signals, object]) -> None:
    """Let the signals end the process with one line, unless they are ignored."""
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, b"minivit: interrupted\n")
    finally:
        os._exit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
