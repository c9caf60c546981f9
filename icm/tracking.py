"""Where a run's numbers go: TensorBoard and metrics.jsonl."""

import json
import math
import shlex
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from icm.charts import CHARTS
from icm.config import flat
from icm.errors import WriteError
from icm.files import json_lines, write_lines


class Tracker:
    """Averages metrics over a log interval and writes them under their names.

    Args:
        folder: the run folder.
        step: agent steps already done.
        config: all settings, plain containers.
    """

    def __init__(self, folder: Path, step: int, config: dict[str, Any]) -> None:
        self.folder = folder
        threading.excepthook = self._report
        metrics = folder / "metrics.jsonl"
        with self._writing():
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)
            self.writer.add_custom_scalars(
                {
                    question: {title: ["Multiline", list(names)] for title, names in charts.items()}
                    for question, charts in CHARTS.items()
                }
            )
            self._describe(step, config)
            if metrics.exists():  # steps after a run's last checkpoint are done again
                rows = json_lines(metrics)
                write_lines(metrics, [json.dumps(row) for row in rows if row["step"] <= step])
            self.file = metrics.open("a", buffering=1)
        self.sums: dict[str, float | Tensor] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.values: dict[str, list[Tensor]] = defaultdict(list)
        self.last: dict[str, float | None] = {}  # the latest line of metrics.jsonl

    def _describe(self, step: int, config: dict[str, Any]) -> None:
        """Describe this run in TensorBoard: the command, every setting, hyperparameters."""
        for name, text, kind in (
            ("command", shlex.join(["python", *sys.argv]), "bash"),
            ("settings", OmegaConf.to_yaml(OmegaConf.create(config)), "yaml"),
        ):
            self.writer.add_text(f"run/{name}", f"```{kind}\n{text}\n```", step)
        kinds = bool, int, float, str  # that it can show
        shown = {name: value for name, value in flat(config).items() if isinstance(value, kinds)}
        metrics = dict.fromkeys(("episode/distance", "explore/cells", "icm/inverse_gain"))
        writer = self.writer._get_file_writer()
        for summary in hparams(shown, metrics):  # in this run, not in a sub-run of its own
            writer.add_summary(summary)

    @staticmethod
    def _report(failure: threading.ExceptHookArgs) -> None:
        """Ignore a thread of TensorBoard that cannot write: the next call raises its error."""
        if not isinstance(failure.thread, _AsyncWriterThread):
            threading.__excepthook__(failure)

    @contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise WriteError(f"cannot write to {self.folder}: {error.strerror or error}") from None

    def collect(self, name: str, values: Tensor) -> None:
        """Keep values, any shape, for a histogram of the log interval."""
        self.values[name].append(values)

    def add(self, samples: dict[str, Any]) -> None:
        """Add a number, which may be a scalar tensor, or many samples (N,) to each average.

        Sums of tensors stay on their device until `averages`.
        """
        for name, value in samples.items():
            many = isinstance(value, Tensor) and value.ndim > 0
            self.sums[name] = self.sums[name] + (value.sum() if many else value)
            self.counts[name] += value.numel() if many else 1

    def averages(self) -> dict[str, float]:
        """Averages of the running log interval, in plain numbers."""
        known = [name for name, count in self.counts.items() if count]  # 0: only resets
        return {name: float(self.sums[name]) / self.counts[name] for name in known}

    def state_dict(self) -> dict[str, Any]:
        """What the running log interval has so far."""
        return {
            "sums": dict(self.sums),
            "counts": dict(self.counts),
            "values": {name: torch.cat(values) for name, values in self.values.items() if values},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue that interval."""
        for value in state["sums"].values():
            float(value)  # or this is no such state
        self.sums.update(state["sums"])
        self.counts.update({name: int(count) for name, count in state["counts"].items()})
        for name, values in state["values"].items():
            self.values[name] = [values]

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write one log interval at an agent step, and histograms of what was collected.

        In metrics.jsonl, non-finite numbers become null. Then the next interval begins.

        Raises:
            WriteError: it cannot be written; the interval goes on.
        """
        self.last = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self._writing():
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
            for name, values in self.values.items():
                numbers = torch.cat(values)
                finite = numbers[numbers.isfinite()]  # it refuses others
                if len(finite):
                    self.writer.add_histogram(name, finite, step)
            self.writer.flush()  # or kill -9 would lose two minutes of it
            self.file.write(json.dumps({"step": step, **self.last}) + "\n")
        self.sums.clear()
        self.counts.clear()
        self.values.clear()

    def images(self, step: int, images: dict[str, bytes]) -> None:
        """Show images, PNG or GIF files, at an agent step in TensorBoard."""
        for name, content in images.items():
            with Image.open(BytesIO(content)) as image:
                size = {"width": image.width, "height": image.height, "colorspace": 3}
            shown = Summary.Image(encoded_image_string=content, **size)
            summary = Summary(value=[Summary.Value(tag=name, image=shown)])
            with self._writing():
                self.writer._get_file_writer().add_summary(summary, step)

    def close(self) -> None:
        """Flush and close everything; see `write`."""
        with self._writing(), self.file:
            self.writer.close()


class Clock:
    """Wall-clock speeds between two log lines, and each phase's share of the time."""

    def __init__(self, step: int) -> None:
        self.since, self.step = time.perf_counter(), step
        self.phases: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Time spent inside counts for the phase `name`."""
        start = time.perf_counter()
        yield
        self.phases[name] += time.perf_counter() - start

    def speeds(self, step: int, action_repeat: int) -> dict[str, float]:
        """The `speed/` metrics since the last call."""
        now = time.perf_counter()
        seconds = now - self.since
        rate = (step - self.step) / seconds
        speeds = {"speed/agent_steps_per_s": rate, "speed/frames_per_s": rate * action_repeat}
        speeds |= {f"speed/{name}_share": spent / seconds for name, spent in self.phases.items()}
        self.since, self.step = now, step
        self.phases.clear()
        return speeds
