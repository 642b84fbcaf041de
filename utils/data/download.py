"""Fetch one file over HTTP so that a broken line costs nothing and a broken file never appears."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from utils.errors import UserError
from utils.files import atomic_write

MAX_BYTES = 8 << 30  # the largest D4RL file is under 1 GiB
_ATTEMPTS = 5
_GAIN = 1 << 14  # bytes: an attempt that gained fewer counts as one that gained nothing
_TIMEOUT_S = 30
_PAUSE_S = 1.0  # doubled with every attempt that gained nothing
_BLOCK = 1 << 18
_LEAST_BYTES, _PATIENCE_S = 60_000, 60.0  # a server that sends less in that time is given up: 1 kB/s


class _BrokenLine(Exception):
    """The connection ended before the file did: worth another attempt from where it stopped."""


@dataclass(frozen=True)
class _Version:
    """Which of the server's files the bytes of a part are of: kept beside the part, compared before it is continued."""

    url: str
    etag: str | None
    last_modified: str | None
    size: int | None

    @property
    def validator(self) -> str | None:
        """What If-Range may carry; None where the server names no version, so that no two pieces can be told apart."""
        strong = self.etag is not None and not self.etag.startswith("W/")
        return self.etag if strong else self.last_modified

    def differs(self, other: _Version) -> bool:
        """Whether the two cannot be the same version; what one of them does not say is not compared."""
        pairs = [(self.etag, other.etag), (self.last_modified, other.last_modified), (self.size, other.size)]
        return any(a is not None and b is not None and a != b for a, b in pairs)


def download(url: str, target: Path, check: Callable[[Path], None]) -> None:
    """Fetch `url` to `target`, which appears whole and checked or not at all.

    Bytes go to `<target>.part`, which is continued after a break, within this call or a later one, as long as the
    server still has the same version of the file (`<target>.part.json` says which one it was). `check` is called with
    the complete part and raises UserError if it is not sound; it is then deleted. A lock file keeps a second process
    waiting. Raises UserError, one line, for whatever goes wrong.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.with_name(target.name + ".lock")):
            if target.exists():  # another process was faster
                return
            resumed = _size(part) > 0
            _fetch(url, part)
            try:
                check(part)
            except UserError:
                _discard(part)
                if not resumed:
                    raise
                # An earlier call's bytes may be damaged: once more, in one piece.
                _fetch(url, part)
                _check_or_discard(part, check)
            os.replace(part, target)
            _version_file(part).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or target}: {error.strerror or error}") from error


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; nothing is left of it. (filelock sees that a file it waited for was deleted.)"""
    with FileLock(path):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _check_or_discard(part: Path, check: Callable[[Path], None]) -> None:
    try:
        check(part)
    except UserError:
        _discard(part)
        raise


# --------------------------------------------------------------------------------------------------
# The part and its version
# --------------------------------------------------------------------------------------------------
def _version_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


def _begin(part: Path, version: _Version) -> None:
    """An empty part of that version. The old bytes go first, so that a kill never leaves them under a new name."""
    _discard(part)
    atomic_write(_version_file(part), json.dumps(asdict(version)))


def _kept_version(part: Path, url: str) -> _Version | None:
    """The version that the part's bytes are of; None where that is not known, or is of another address."""
    try:
        version = _Version(**json.loads(_version_file(part).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return version if version.url == url else None


# --------------------------------------------------------------------------------------------------
# Requests
# --------------------------------------------------------------------------------------------------
def _fetch(url: str, part: Path) -> None:
    """Bring `part` to its full length; attempts that gained next to nothing are counted, the others are free."""
    failures, most = 0, _size(part)
    while True:
        try:
            _continue(url, part)
            return
        except _BrokenLine as error:
            after = _size(part)
            failures = 0 if after - most >= _GAIN else failures + 1
            most = max(most, after)
            if failures >= _ATTEMPTS or after == 0:
                raise UserError(f"{url}: {error}{_kept(part)}") from error
            time.sleep(_PAUSE_S * 2**failures)


def _kept(part: Path) -> str:
    return f"; {_size(part)} bytes are kept and continued next time" if _size(part) else ""


def _continue(url: str, part: Path) -> None:
    """One request for what `part` lacks; for the whole file where its version is another now, or unknown."""
    version = _kept_version(part, url)
    have = _size(part)
    if version is None or version.validator is None or (version.size is not None and have > version.size):
        version, have = None, 0
    elif have and have == version.size:
        return
    ranges = {"Range": f"bytes={have}-", "If-Range": str(version.validator)} if version and have else {}
    try:
        response = _open(urllib.request.Request(url, headers=ranges))
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing lies after what is there: it is not this file
            _discard(part)
            return _continue(url, part)
        raise UserError(f"{url}: HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenLine(getattr(error, "reason", None) or error or type(error).__name__) from error
    except ValueError as error:  # urllib's word for an address that cannot be taken apart
        raise UserError(f"{url}: the server names a broken address: {error}") from error
    with response:
        start, found = _what_comes(url, response, have)
        if start and not have:
            raise UserError(f"{url}: the server sends a piece where the whole file was asked for")
        if start and (start != have or version is None or version.differs(found)):
            _discard(part)  # a server that knows no If-Range
            return _continue(url, part)
        _check_room(url, part, start, found.size)
        if start == 0:
            _begin(part, found)
        _append(response, url, part, found.size)


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """urllib would also follow a server to ftp."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(("http://", "https://")):
            raise ValueError(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    """The server's answer; its head must come within `_PATIENCE_S`: a socket's limit begins anew at every byte."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.build_opener(_WebOnly).open(request, timeout=_TIMEOUT_S))
        except Exception as error:  # raised again by the thread that asked
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=_PATIENCE_S)
    except queue.Empty:
        raise _BrokenLine(f"the server did not answer within {_PATIENCE_S:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _what_comes(url: str, response: http.client.HTTPResponse, have: int) -> tuple[int, _Version]:
    """Where the body belongs (at 0 where the server sends all of the file; -1 where it is none of this) and of what."""
    headers = response.headers
    start, size = 0, _number(headers.get("Content-Length", ""))
    if response.status == 206:
        unit, _, content_range = headers.get("Content-Range", "").partition(" ")
        span, _, total = content_range.partition("/")
        first = _number(span.partition("-")[0])
        start = first if unit == "bytes" and first is not None and first == have else -1
        size = _number(total)
    return start, _Version(url, headers.get("ETag"), headers.get("Last-Modified"), size)


def _number(text: str) -> int | None:
    """A count of bytes in a header; None where it is no number. Nothing has more than 19 digits of bytes."""
    text = text.strip()
    return int(text[:20]) if text.isascii() and text.isdigit() else None


def _check_room(url: str, part: Path, start: int, total: int | None) -> None:
    if total is None:
        return
    if total > MAX_BYTES:
        raise UserError(f"{url}: the server offers {total} bytes, more than the bound of {MAX_BYTES}")
    if total - start > shutil.disk_usage(part.parent).free:
        raise UserError(f"{part.parent} has no room for {total - start} more bytes")


def _append(response: http.client.HTTPResponse, url: str, part: Path, total: int | None) -> None:
    have = _size(part)
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024, desc=part.stem, disable=None)
    with bar, open(part, "ab") as file:
        since, seen = time.monotonic(), 0
        while True:
            try:
                block = response.read1(_BLOCK)  # what has come; `read` would wait for all of the block
            except (OSError, http.client.HTTPException) as error:
                raise _BrokenLine(f"the connection broke ({error or type(error).__name__})") from error
            if not block:
                break
            file.write(block)
            bar.update(len(block))
            have, seen = have + len(block), seen + len(block)
            if have > MAX_BYTES:
                raise UserError(f"{url}: the server sends more than the bound of {MAX_BYTES} bytes")
            if time.monotonic() - since > _PATIENCE_S:
                if seen < _LEAST_BYTES:
                    file.flush()
                    raise UserError(f"{url}: only {seen} bytes came in {_PATIENCE_S:g} s{_kept(part)}")
                since, seen = time.monotonic(), 0
    if total is not None and have < total:
        raise _BrokenLine(f"the connection broke after {have} of {total} bytes")
