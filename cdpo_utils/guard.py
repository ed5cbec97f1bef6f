"""What comes from files, models and servers is not trusted: how it may reach terminals, pages, tables and folders."""

import functools
import json
import os
import re
import sys

from cdpo_utils import files

SECRET_NAME = re.compile("KEY|TOKEN|SECRET|PASSWORD")
SHORTEST_SECRET = 8  # TOKENIZERS_PARALLELISM=false is no secret: what is shorter would blot out ordinary words
USER_AND_PASSWORD = re.compile(r"(?<=://)[^\s/?#'\"\\]*@")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet runs when a cell begins with it
# What a page had better not hold: control characters, and marks that turn the direction of text around.
_CODES = {*range(32), *range(127, 160), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
UNSEEN = {code: repr(chr(code))[1:-1] for code in _CODES - set(map(ord, "\t\n\r"))}


def visible(text, limit=None, keep=""):
    """The first `limit` characters; what cannot be printed is written out, such as \\x1b, unless in `keep`."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in str(text)[:limit])


def one_line(error, limit=None):
    """The first line of an exception's message, fit for a terminal and without secrets; its type where it has none."""
    lines = without_secrets(str(error)).strip().splitlines() or [type(error).__name__]
    return visible(lines[0], limit)


def disk(error):
    """An OSError in one line: the file, then what the system says of it."""
    return one_line(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)


def told(main):
    """A command line whose OSErrors end it with one line and status 1 in the place of a traceback, Ctrl-C with 130."""

    @functools.wraps(main)
    def with_one_line(*args, **settings):
        try:
            return main(*args, **settings)
        except OSError as error:
            print(disk(error), file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; a command with --resume goes on with what is kept", file=sys.stderr)
            return 130

    return with_one_line


def without_secrets(value):
    """Text, or the texts in dicts and lists, with *** for user and password in URLs and for the value of every
    environment variable with KEY, TOKEN, SECRET or PASSWORD in its name (8 characters or more)."""
    if isinstance(value, dict):
        return {without_secrets(name): without_secrets(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(without_secrets, value))
    if not isinstance(value, str):
        return value
    found = [text for name, text in os.environ.items() if SECRET_NAME.search(name.upper())]
    for secret in sorted((text for text in found if len(text) >= SHORTEST_SECRET), key=len, reverse=True):
        for written in (secret, json.dumps(secret)[1:-1]):  # in a notebook's file it stands as JSON has it
            value = value.replace(written, "***")
    return USER_AND_PASSWORD.sub("***@", value)


def scrub(path):
    """Take the secrets out of a text file that is already written, where there is one."""
    if path.is_file():
        text = path.read_bytes().decode("utf-8", "replace")
        if (clean := without_secrets(text)) != text:
            files.write_whole(path, clean)


def inside(folder, name):
    """`folder / name`. Raises ValueError, in one line, for a name that is no plain name of a file in that folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\:"):
        raise ValueError(f"{visible(repr(name), 100)} is not the name of a file; expected one without folders")
    return folder / name


def write_csv(frame, path):
    """Write a DataFrame as CSV, with an apostrophe before text that a spreadsheet would take for a formula."""

    def safe(value):
        return "'" + value if isinstance(value, str) and value.startswith(FORMULA) else value

    files.write_whole(path, frame.map(safe).rename(columns=safe).to_csv(index=False))
