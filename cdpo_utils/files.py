"""Files that are whole or not there, and folders that one process has to itself.

A disk that is full or read-only is an OSError which names the file; `guard.told` says it in one line.
"""

import contextlib
import errno
import os
import tempfile

FAR = 2**30  # Windows locks a byte, and nobody could read one that is in use: one beyond the end of every file here
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system that knows none, as some of clusters


def write_whole(path, content):
    """Write a text or bytes so that a reader sees the old file or the new one, never half of one.

    Raises OSError, which names the file, where it cannot be written; nothing of the new one is left behind then."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise named(error, path) from None


def named(error, path):
    """An OSError with the name of the file: what fails in the middle of writing has none."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def writable(folder):
    """Make `folder` where it is missing. Raises OSError, which names what cannot be written, before hours are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "is a file; expected a folder", str(folder)) from None
    tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def alone(path):
    """Hold the file `path`, made where it is missing, for this process alone; it must not be replaced meanwhile.

    Raises BlockingIOError where another process holds it. The system lets go of it when that one ends, however it ends.
    """
    with open(path, "ab") as file:
        try:
            _lock(file)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise BlockingIOError(errno.EAGAIN, "in use by another process", str(path)) from None
        yield


def _lock(file):
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
