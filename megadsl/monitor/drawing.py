"""Drawing beside training: a thread of its own, and so seldom that a run does not notice.

One thread draws, and nothing else of the process uses matplotlib while it trains: Figures without pyplot share no state that training
touches. What drawing costs is measured, and its share of the time is bounded whatever a picture costs.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from megadsl.monitor.signal import SignalRecord

SHARE = 0.005  # of the time may go into drawing: after pictures that took 1 s none are drawn for 200 s


class Drawing:
    """Draws records of a run when they are due; `take` and `draw` are called in the thread, one after the other.

    Args:
        interval: iterations between two drawn records at least; the first and the last record are always drawn.
        take: gets every record.
        draw: gets the records that are due, after `take`.
        log: gets one line where either fails; the run goes on without pictures.
    """

    def __init__(self, interval: int, take: Callable[[SignalRecord], None], draw: Callable[[SignalRecord], None], log: Callable[[str], None]):
        self._interval, self._take, self._draw, self._log = interval, take, draw, log
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="drawing")
        self._newest: SignalRecord | None = None
        self._drawn: int | None = None  # iteration of the record that was drawn last
        self._next = 0.0  # when the next may be drawn; infinite while one is
        self._failure: Exception | None = None
        self._failed = False

    def add(self, record: SignalRecord) -> None:
        """Take a record, and draw it where it is due."""
        if self._has_failed():
            return
        self._newest = record
        due = self._drawn is None or (record.iteration - self._drawn >= self._interval and time.monotonic() >= self._next)
        self._thread.submit(self._work, record, self._take)
        if due:
            self._begin(record)

    def close(self) -> None:
        """Draw the last record, and wait for it."""
        if self._newest is not None and self._newest.iteration != self._drawn and not self._has_failed():
            self._begin(self._newest)
        self._thread.shutdown()
        self._has_failed()

    def _begin(self, record: SignalRecord) -> None:
        self._drawn, self._next = record.iteration, float("inf")
        self._thread.submit(self._work, record, self._timed_draw)

    def _timed_draw(self, record: SignalRecord) -> None:
        begun = time.monotonic()
        self._draw(record)
        ended = time.monotonic()
        self._next = ended + (ended - begun) / SHARE

    def _work(self, record: SignalRecord, task: Callable[[SignalRecord], None]) -> None:
        if self._failure is not None:
            return
        try:
            task(record)
        except Exception as error:  # said by _has_failed in the training thread: a picture must not end a run
            self._failure = error

    def _has_failed(self) -> bool:
        if self._failure is not None and not self._failed:
            self._failed = True
            self._log(f"warning: the pictures of the signal could not be drawn ({type(self._failure).__name__}: {self._failure}); "
                      "the run goes on without them")
        return self._failed
