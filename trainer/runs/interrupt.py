"""SIGINT and SIGTERM end a run at a safe point; a second signal ends it at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

from .. import ranks
from ..errors import Interrupted


class StopRequest:
    """While active, the first signal only sets ``requested``; the loop calls ``check`` where it is
    safe to stop.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and a scheduler that ends the job

    def __init__(self) -> None:
        self.requested = False

    def check(self, *, alone: bool = False) -> None:
        """Raise ``Interrupted`` when a stop was requested on any rank. All ranks must call it
        equally often.

        alone: check this rank's request only; the caller then informs the other ranks
        (``ranks.all_gather``).
        """
        if self.requested if alone else ranks.any_rank(self.requested):
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True
        # The handler may interrupt a write of the progress display; only a raw write is safe here.
        if ranks.is_main():
            os.write(2, b"\nstopping at the next safe point; once more to stop at once\n")

    def __enter__(self) -> StopRequest:
        self._previous = [signal.signal(number, self._handle) for number in self.SIGNALS]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, previous in zip(self.SIGNALS, self._previous, strict=True):
            signal.signal(number, previous)
