"""Pictures of the game as a video, as an animation, or one by one."""

import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

from icm.errors import UserError
from icm.files import whole

FPS = 60
"""Frames per second of the console (60.1 exactly)."""


class Format(NamedTuple):
    """How ffmpeg writes pictures."""

    codec: str
    pixels: str
    fps: int  # pictures per second, at most
    options: list[str]


# plays in every browser, which needs an even width and height; quicker than ffmpeg's default
MP4 = ["-preset", "veryfast", "-crf", "25", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-f", "mp4"]
# a palette for each picture: one for all would keep all of them in memory
PALETTE = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=none"

FORMATS = {
    ".mp4": Format("libx264", "yuv420p", FPS, MP4),
    ".gif": Format("gif", "pal8", 20, ["-vf", PALETTE, "-f", "gif"]),
    "": Format("png", "rgb24", FPS, ["-f", "image2"]),
}
"""By file name ending; without one, it is a folder for single pictures."""


class Video:
    """Takes pictures of one size, see `record`.

    imageio-ffmpeg brings ffmpeg along; its own way of calling it does not report failures.

    Args:
        file: what ffmpeg writes.
        form: how.
        fps: incoming pictures per second; those beyond the format's rate are dropped evenly.
    """

    def __init__(self, file: Path, form: Format, fps: float) -> None:
        self.file, self.form = file, form
        self.fps = min(fps, form.fps)
        self.share = self.fps / fps  # of incoming pictures
        self.due = 1.0
        self.ffmpeg: subprocess.Popen[bytes] | None = None

    def add(self, image: np.ndarray) -> None:
        """Append one image, uint8 (H, W, 3)."""
        if self.due >= 1:
            self.due -= 1
            if self.ffmpeg is None:
                self.ffmpeg = self._start(*image.shape[:2])
            assert self.ffmpeg.stdin is not None
            self.ffmpeg.stdin.write(np.ascontiguousarray(image).data)
        self.due += self.share

    def _start(self, height: int, width: int) -> subprocess.Popen[bytes]:
        given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
        written = ["-c:v", self.form.codec, "-pix_fmt", self.form.pixels, *self.form.options]
        rate = ["-r", str(self.fps)]
        command = [get_ffmpeg_exe(), "-y", "-loglevel", "error", *given, *rate, "-i", "-"]
        return subprocess.Popen(
            [*command, *written, f"file:{self.file}"],  # or "a:b" would be a protocol and its path
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,  # a few lines at most
            start_new_session=True,  # Ctrl-C is not for it
        )

    def close(self) -> None:
        """Let ffmpeg end, if it has begun.

        Raises:
            OSError: it has failed.
        """
        if self.ffmpeg is not None:
            _, said = self.ffmpeg.communicate()
            if status := self.ffmpeg.returncode:
                raise OSError(said.decode(errors="replace") or f"ffmpeg ended with {status}")


@contextmanager
def record(path: Path, fps: float = FPS) -> Generator[Video]:
    """A video that is at `path` once it is complete.

    Args:
        path: ends in `.mp4` (H.264), in `.gif`, or is a folder that gets single pictures.
        fps: incoming pictures per second of video.

    Raises:
        UserError: the name ends in something else, the folder exists, or the file cannot be
            written.
    """
    form = FORMATS.get(path.suffix)
    if form is None:
        raise UserError(f"out={path}: must end in .mp4 or .gif, or be a folder for pictures")
    if not path.suffix and path.exists():
        raise UserError(f"out={path}: exists; give another name")
    with whole(path) as temporary:
        if path.suffix:
            temporary.touch()
            file = temporary
        else:
            temporary.mkdir()
            file = Path(str(temporary).replace("%", "%%"), "%06d.png")
        video = Video(file, form, fps)
        try:
            yield video
        finally:
            video.close()
