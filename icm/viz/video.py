"""Pictures of the game as a video, as an animation, or one by one."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import imageio_ffmpeg
import numpy as np

from icm.errors import UserError
from icm.files import whole

FPS = 60
"""Frames per second of the console (60.1 exactly)."""


class Format(NamedTuple):
    """How ffmpeg writes pictures."""

    codec: str
    pixels: str
    fps: int  # at most so many pictures per second
    options: list[str]


FORMATS = {
    # as every browser plays it; quicker than ffmpeg's default
    ".mp4": Format("libx264", "yuv420p", FPS, ["-preset", "veryfast", "-f", "mp4"]),
    # a palette for each picture: one for all would keep all of them in memory
    ".gif": Format(
        "gif",
        "pal8",
        20,
        [
            "-vf",
            "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=none",
            *("-f", "gif"),
        ],
    ),
    "": Format("png", "rgb24", FPS, ["-f", "image2"]),
}
"""By the ending of a name; without one it is a folder for single pictures."""


class Video:
    """Takes pictures of one size, see `record`.

    Args:
        file: what ffmpeg writes.
        form: how.
        fps: pictures that come per second; more than the format has are left out evenly.
    """

    def __init__(self, file: Path, form: Format, fps: float) -> None:
        self.file, self.form = file, form
        self.fps = min(fps, form.fps)
        self.share = self.fps / fps  # of the pictures that come
        self.due = 1.0
        self.writer: Any = None

    def add(self, image: np.ndarray) -> None:
        """Append one image, uint8 (H, W, 3)."""
        if self.due >= 1:
            self.due -= 1
            self._write(image)
        self.due += self.share

    def _write(self, image: np.ndarray) -> None:
        if self.writer is None:
            self.writer = imageio_ffmpeg.write_frames(
                self.file,
                (image.shape[1], image.shape[0]),
                fps=self.fps,
                codec=self.form.codec,
                pix_fmt_out=self.form.pixels,
                macro_block_size=2,
                output_params=self.form.options,
            )
            self.writer.send(None)
        self.writer.send(np.ascontiguousarray(image))


@contextmanager
def record(path: Path, fps: float = FPS) -> Generator[Video]:
    """A video that stands at `path` when it is whole.

    Args:
        path: ends in `.mp4` (H.264), in `.gif`, or is a folder that gets single pictures.
        fps: pictures that come per second of the video.

    Raises:
        UserError: the name ends in something else, or the file cannot be written.
    """
    form = FORMATS.get(path.suffix)
    if form is None:
        raise UserError(f"out={path}: must end in .mp4 or .gif, or be a folder for pictures")
    with whole(path) as temporary:
        if path.suffix:
            temporary.touch()
            file = temporary
        else:
            temporary.mkdir()
            file = temporary / "%06d.png"
        video = Video(file, form, fps)
        try:
            yield video
        finally:
            if video.writer is not None:
                video.writer.close()
