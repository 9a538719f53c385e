"""The options of `serve`, for Python and for the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..data.image_file import MAX_PIXELS, check_max_pixels
from ..schema import Checked, Limits


@dataclass(frozen=True)
class ServeOptions(Checked):
    """Where a server listens, and its limits. Raises UserError for values out of range."""

    host: Annotated[str, "address or name to listen on; by default only this machine can connect"] = "127.0.0.1"
    port: Annotated[int, "port to listen on; 0 takes a free one", Limits(0, 65535)] = 8000
    budget: Annotated[
        float | None, "of a calibrated cascade: largest mean cost of an image, where a request names none; None: the last exit"
    ] = None
    batch_size: Annotated[int, "most images that are computed at once", Limits(1, 64)] = 32
    max_wait: Annotated[float, "milliseconds for which images wait for others that are being decoded", Limits(0, 1000)] = 2.0
    max_queue: Annotated[int, "images that wait or are computed; requests beyond them are answered 503", Limits(1, 2**16)] = 256
    max_upload: Annotated[float, "MiB of the body of a request", Limits(above=0, most=1024)] = 16.0
    max_pixels: Annotated[int, "largest number of pixels of an image file", check_max_pixels] = MAX_PIXELS
    max_connections: Annotated[int, "clients connected at once; more are answered 503", Limits(1, 2**16)] = 256
    timeout: Annotated[float, "seconds in which a request must have come and been answered", Limits(0.1, 3600)] = 30.0

    @property
    def upload_bytes(self) -> int:
        """`max_upload` in bytes."""
        return int(self.max_upload * 2**20)
