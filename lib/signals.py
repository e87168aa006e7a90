"""
Signals that ask a program to stop.
"""
import signal
from contextlib import contextmanager


@contextmanager
def heed_signals():
    """Gives a list that a SIGINT or SIGTERM goes into: the step is finished first. A second one does not wait."""
    received = []

    def on_signal(signum, frame):
        if received:
            raise KeyboardInterrupt
        received.append(signum)
    old_handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for s, handler in old_handlers.items():
            signal.signal(s, handler)
