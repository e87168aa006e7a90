"""
What may interrupt a program: signals, and terminals or pipes that close.
"""
import io
import os
import signal
import sys
from contextlib import contextmanager


@contextmanager
def heed_signals(something_to_save=lambda: True):
    """A context with a list that receives SIGINT, SIGTERM or SIGHUP, so that the program can finish its step.

    A second signal does not wait, nor does a first one with nothing to save: it raises KeyboardInterrupt.
    """
    received = []

    def on_signal(signum, frame):
        if received or not something_to_save():
            raise KeyboardInterrupt
        received.append(signum)
    def heeded(s):  # nohup has SIGHUP ignored, and Windows has none
        return s.name in ('SIGINT', 'SIGTERM') or s.name == 'SIGHUP' and signal.getsignal(s) != signal.SIG_IGN
    old_handlers = {s: signal.signal(s, on_signal) for s in filter(heeded, signal.Signals)}
    try:
        yield received
    finally:
        for s, handler in old_handlers.items():
            signal.signal(s, handler)


class Unbreakable:
    """A text stream whose writes never fail: once one has, what is written is lost without a word."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, 'w')  # None: closed before we started

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except (OSError, ValueError):
            self.give_up()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.give_up()

    def give_up(self):
        """What is still in the stream's buffer, and all that follows, goes nowhere."""
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except (OSError, ValueError):  # it has no file
            self.stream = open(os.devnull, 'w')


@contextmanager
def text_streams():
    """A context in which standard output and error take any text, and in which both are there.

    A file or a pipe gets UTF-8; a terminal gets its own encoding, with \\uXXXX for what that cannot show.
    Python has None for a stream that was closed before it started. What goes wrong on standard error ends
    nothing.
    """
    old = sys.stdout, sys.stderr
    out, err = (stream or open(os.devnull, 'w') for stream in old)
    for stream in out, err:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=stream.encoding if stream.isatty() else 'utf-8',
                               errors='backslashreplace')
    sys.stdout, sys.stderr = out, Unbreakable(err)
    try:
        yield
    finally:
        Unbreakable(out).flush()  # so that the interpreter does not try in vain
        sys.stdout, sys.stderr = old


@contextmanager
def unbreakable_output():
    """A context in which no terminal or pipe that closes, no full disk behind it, can end the work."""
    old = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Unbreakable, old)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = old
