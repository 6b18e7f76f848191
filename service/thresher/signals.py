"""What a driver does when it is told to stop: it takes note, and stops its jobs when it can."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noted(set_up: Callable[[], None] | None = None) -> Iterator[list[int]]:
    """While inside, SIGINT and SIGTERM put their number into the list, and nothing else happens.

    An exception raised in a handler could fall between the start of a job and the note of it, and leave an orphan.

    Args:
        set_up: called first; handlers that it sets are replaced, and gone afterwards too.
    """
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if set_up is not None:
        set_up()
    stopped: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)

    for number in old:
        signal.signal(number, note)
    try:
        yield stopped
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
