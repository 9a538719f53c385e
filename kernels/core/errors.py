"""What goes wrong on a GPU, in one line."""


class DeviceError(RuntimeError):
    """There is no GPU that minivit can use, or what it needs is not installed; the message says what to do."""


class OutOfMemoryError(DeviceError):
    """An array does not fit. asked, free: bytes."""

    def __init__(self, asked: int, free: int) -> None:
        super().__init__(f"the GPU has no room for {asked / 2**20:,.0f} MiB: {free / 2**20:,.0f} MiB are free")
        self.asked, self.free = asked, free
