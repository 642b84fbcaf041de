"""Fetch one file over HTTP so that a broken line costs nothing and a broken file never appears."""

from __future__ import annotations

import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from utils.errors import UserError

MAX_BYTES = 8 << 30  # the largest D4RL file is under 1 GiB
_ATTEMPTS = 5
_TIMEOUT_S = 30
_PAUSE_S = 1.0  # doubled with every attempt that gained nothing
_BLOCK = 1 << 18


class _BrokenLine(Exception):
    """The connection ended before the file did: worth another attempt from where it stopped."""


def download(url: str, target: Path, check: Callable[[Path], None]) -> None:
    """Fetch `url` to `target`, which appears whole and checked or not at all.

    Bytes go to `<target>.part`, which is continued after a break, within this call or a later one. `check` is
    called with the complete part and raises UserError if it is not sound; it is then deleted. A lock file
    keeps a second process waiting. Raises UserError, one line, for whatever goes wrong.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):
            if target.exists():  # another process was faster
                return
            resumed = part.exists() and part.stat().st_size > 0
            _fetch(url, part)
            try:
                check(part)
            except UserError:
                part.unlink()
                if not resumed:
                    raise
                # The two pieces need not come from the same file on the server: once more, in one piece.
                _fetch(url, part)
                _check_or_delete(part, check)
            os.replace(part, target)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or target}: {error.strerror or error}") from error


def _check_or_delete(part: Path, check: Callable[[Path], None]) -> None:
    try:
        check(part)
    except UserError:
        part.unlink()
        raise


def _fetch(url: str, part: Path) -> None:
    """Bring `part` to its full length; attempts that gained nothing are counted, the others are free."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _continue(url, part, before)
            return
        except _BrokenLine as error:
            after = part.stat().st_size if part.exists() else 0
            failures = 0 if after > before else failures + 1
            if failures >= _ATTEMPTS or after == 0:
                kept = f"; {after} bytes are kept and continued next time" if after else ""
                raise UserError(f"{url}: {error}{kept}") from error
            time.sleep(_PAUSE_S * 2**failures)


def _continue(url: str, part: Path, have: int) -> None:
    """One request for what is missing after `have` bytes, appended to `part`."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing lies after what is there
            if error.headers.get("Content-Range") != f"bytes */{have}":
                part.unlink()  # nor is it this file: from the start
                _continue(url, part, 0)
            return
        raise UserError(f"{url}: HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenLine(getattr(error, "reason", None) or error or type(error).__name__) from error
    with response:
        start = _start_of_body(response, have)
        total = _total_bytes(response, start)
        _check_room(url, part, start, total)
        _append(response, url, part, start, total)


def _start_of_body(response: http.client.HTTPResponse, have: int) -> int:
    """Where the body belongs: after what is there, or at 0 where the server ignores ranges."""
    content_range = response.headers.get("Content-Range", "")
    return have if response.status == 206 and content_range.startswith(f"bytes {have}-") else 0


def _total_bytes(response: http.client.HTTPResponse, start: int) -> int | None:
    length = response.headers.get("Content-Length", "")
    return start + int(length) if length.isdigit() else None


def _check_room(url: str, part: Path, start: int, total: int | None) -> None:
    if total is None:
        return
    if total > MAX_BYTES:
        raise UserError(f"{url}: the server offers {total} bytes, more than the bound of {MAX_BYTES}")
    if total - start > shutil.disk_usage(part.parent).free:
        raise UserError(f"{part.parent} has no room for {total - start} more bytes")


def _append(
    response: http.client.HTTPResponse,
    url: str,
    part: Path,
    start: int,
    total: int | None,
) -> None:
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024, desc=part.stem, disable=None)
    with bar, open(part, "ab" if start else "wb") as file:
        while True:
            try:
                block = response.read(_BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise _BrokenLine(f"the connection broke ({error or type(error).__name__})") from error
            if not block:
                break
            file.write(block)
            bar.update(len(block))
            if file.tell() > MAX_BYTES:
                raise UserError(f"{url}: the server sends more than the bound of {MAX_BYTES} bytes")
    have = part.stat().st_size
    if total is not None and have < total:
        raise _BrokenLine(f"the connection broke after {have} of {total} bytes")
