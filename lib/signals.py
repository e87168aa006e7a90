"""
Signals that ask a program to stop.
"""
import signal
from contextlib import contextmanager


@contextmanager
def heed_signals():
    """A context with a list that receives SIGINT or SIGTERM, so that the program can finish its step first.

    A second signal does not wait: it raises KeyboardInterrupt.
    """
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
