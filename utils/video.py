"""A video file, frame by frame: MP4 by imageio's ffmpeg wheel, GIF by Pillow."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import first_line

FPS = 30  # of the file at most, about: of what moves faster only every so many frames are kept


class Film:
    """Frames -> a file, whole or not at all; use it in a `with`, at whose end the file takes its name."""

    def __init__(self, path: Path, fps: float) -> None:
        """fps: frames that will be added for a second of the video.

        Raises UserError for another ending than .mp4 and .gif, a missing encoder, or no such folder.
        """
        check(path)
        self.path, self._every, self._count = path, max(1, round(fps / FPS)), 0
        self._temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix.lower()}")
        rate = fps / self._every
        import imageio.v2 as imageio

        # A GIF's times are in milliseconds, and it goes round.
        how: dict[str, Any] = {"duration": 1000 / rate, "loop": 0} if path.suffix.lower() == ".gif" else {"fps": rate}
        try:
            self._writer = imageio.get_writer(self._temporary, **how)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {path}: {first_line(error)}") from error

    def add(self, draw: Callable[[], np.ndarray]) -> None:
        """One frame, uint8 [height, width, 3], of a size that stays; drawn only where it is kept.

        Raises UserError where the disk refuses, or as `draw`.
        """
        self._count += 1
        if (self._count - 1) % self._every == 0:
            frame = draw()
            try:
                self._writer.append_data(frame)
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {first_line(error)}") from error

    def __enter__(self) -> Film:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._writer.close()
            if kind is None:
                os.replace(self._temporary, self.path)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {first_line(error)}") from error
        finally:
            self._temporary.unlink(missing_ok=True)


def check(path: Path) -> None:
    """Raises UserError for another ending than .mp4 and .gif, a missing encoder, or no such folder."""
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise UserError(f"a video is FILE.mp4 or FILE.gif, not {path}")
    if path.suffix.lower() == ".mp4" and find_spec("imageio_ffmpeg") is None:
        raise UserError("an .mp4 needs imageio-ffmpeg (pip install imageio-ffmpeg); a .gif does not")
    if not path.absolute().parent.is_dir():
        raise UserError(f"no folder {path.absolute().parent} for {path.name}")
