"""
Locks: one process at a time trains in a folder or writes a file. A lock dies with its process.
"""
import contextlib
import os

from lib.configurator import UserError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None


def claim(folder):
    """Locks a folder, which is made if need be, for a training -> a function that releases it.

    UserError if another training has it.
    """
    path = os.path.join(folder, 'lock')
    try:
        os.makedirs(folder, exist_ok=True)
        file = lock(path, f'another process trains in {folder}; stop it first, or give another --out_dir')
    except OSError as e:
        raise UserError(f'cannot write {folder} ({e.strerror}); give another --out_dir') from e

    def release():
        with contextlib.suppress(OSError):  # a folder that can no longer be written
            os.remove(path)
        file.close()
    return release


def lock(path, message):
    """Locks the file `path`, which is made if need be -> the open file; closing it ends the lock.

    UserError with the message if another process holds the lock. A file system without locks grants it.
    """
    while True:
        file = open(path, 'ab')
        if not fcntl:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            file.close()
            raise UserError(message) from e
        except OSError:  # some network folders
            return file
        if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
        file.close()  # whoever held the lock has renamed or removed this file: lock the one that is there now
