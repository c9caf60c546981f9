"""Videos of the game."""

import time
from pathlib import Path
from types import TracebackType
from typing import Any

import imageio.v2 as imageio
import numpy as np

from icm.errors import UserError

FPS = 60
"""Frames per second of the console (60.1 exactly)."""


class Pace:
    """Waits so that a person sees the game at its own speed."""

    def __init__(self) -> None:
        self.next = time.monotonic()

    def tick(self) -> None:
        """Wait until the next frame is due; a delay is not caught up with."""
        now = time.monotonic()
        self.next = max(self.next + 1 / FPS, now)
        time.sleep(self.next - now)


class VideoWriter:
    """Writes RGB images as an H.264 mp4 that browsers play; a context manager.

    Args:
        path: the file, ends in `.mp4`; its folder is created.

    Raises:
        UserError: the name does not end in `.mp4`, or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".mp4":
            raise UserError(f"out={path}: must end in .mp4")
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise UserError(f"out={path}: {error.strerror}") from None
        self.writer: Any = imageio.get_writer(
            path,
            format="FFMPEG",
            mode="I",
            fps=FPS,
            codec="libx264",
            macro_block_size=16,
            output_params=["-preset", "veryfast"],  # quicker than the default
        )

    def add(self, image: np.ndarray) -> None:
        """Append one image, uint8 (H, W, 3)."""
        self.writer.append_data(image)

    def __enter__(self) -> "VideoWriter":
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finish the file."""
        self.writer.close()
