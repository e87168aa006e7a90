"""
Files that are written whole or not at all, and files of JSON lines.
"""
import contextlib
import errno
import hashlib
import json
import math
import os
import sys

from lib.configurator import UserError
from lib.lock import lock


@contextlib.contextmanager
def whole(*paths):
    """A context with a temporary name for each path: what is written there replaces the paths when it ends.

    If it raises, the temporary files are removed and the old files stay. Of several paths the last one
    marks a complete set: it is removed before the others are replaced and comes back last, so that it
    never stands beside a mixture of old and new files. UserError if something cannot be written, or
    another process is writing it: both are found out now, not after the work.
    """
    temps, locks = [path + '.tmp' for path in paths], []
    folder = os.path.dirname(paths[-1]) or '.'
    try:
        os.makedirs(folder, exist_ok=True)
        for temp, path in zip(temps, paths):
            locks.append(lock(temp, f'another process is writing {path}; wait for it, or stop it'))
            locks[-1].truncate(0)  # what a killed process has left
        yield temps if len(temps) > 1 else temps[0]
        for temp in temps:
            with open(temp, 'rb+') as f:
                os.fsync(f.fileno())
        if len(paths) > 1 and os.path.exists(paths[-1]):
            os.remove(paths[-1])
        for path in paths:
            os.replace(temps[0], path)
            del temps[0]
        sync_folder(folder)
    except OSError as e:
        raise UserError(f'cannot write {paths[-1]} ({e.strerror or e})') from e
    finally:
        for temp in temps[:len(locks)]:  # neither those that have been renamed nor another process's
            with contextlib.suppress(OSError):
                os.remove(temp)
        for file in locks:
            file.close()


def sha256_of(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def sync_folder(folder):
    """Makes sure that new names in a folder survive a power cut, where the system can sync folders."""
    with contextlib.suppress(OSError):  # Windows and some network folders cannot
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def json_line(record):
    """A dict as one line of JSON. Numbers that are not finite become null, since JSON has no NaN."""
    def plain(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps({k: plain(v) for k, v in record.items()}) + '\n'


def append(path, *records):
    """Adds records to a .jsonl file, all or none; without records, only tests whether that is possible.

    UserError if it is not.
    """
    lines = ''.join(map(json_line, records)).encode()
    try:
        with open(path, 'ab+', buffering=0) as f:
            if lines and f.tell():
                f.seek(-1, os.SEEK_END)
                lines = b'\n' * (f.read() != b'\n') + lines  # the last line was torn: begin a new one
            written = f.write(lines)  # in one call, so that a reader never sees half a line
            if written < len(lines):
                f.truncate(f.tell() - written)
                raise OSError(errno.ENOSPC, 'the disk is full')
    except OSError as e:
        raise UserError(f'cannot write {path} ({e.strerror})') from e


def read_lines(path, numbers=(), texts=()):
    """-> the JSON objects in a .jsonl file, [] if there is no file. A torn last line is left out.

    UserError unless what they have under the names of numbers and texts is that, or null; NaN becomes null.
    """
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding='utf-8', errors='replace') as f:
            lines = f.read().split('\n')
    except OSError as e:
        raise UserError(f'cannot read {path} ({e.strerror})') from e
    records = []
    for i, line in enumerate(lines[:-1]):
        try:
            records.append(json.loads(line, parse_constant=lambda name: None))
            wrong = [k for k in numbers if not is_number(records[-1].get(k, 0))]
            wrong += [k for k in texts if not isinstance(records[-1].get(k, ''), str | None)]
        except (ValueError, AttributeError, RecursionError) as e:
            raise UserError(f'{path}, line {i + 1} is not a JSON object: {line[:40]!r}') from e
        if wrong:
            raise UserError(f'{path}, line {i + 1} is no result of ours: {wrong[0]} is '
                            f'{str(records[-1][wrong[0]])[:40]!r}')
    return records


def is_number(value):
    """Also None, which stands for a number that is not finite; not an integer too large for a float."""
    return value is None or isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
