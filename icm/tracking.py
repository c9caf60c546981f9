"""Where numbers of a run go: TensorBoard, metrics.jsonl and the progress line."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Tracker:
    """Averages metrics over a log interval and writes them under their names.

    Args:
        folder: the run folder.
        step: agent steps already done.
        total_steps: agent steps of the whole run.
    """

    def __init__(self, folder: Path, step: int, total_steps: int) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=step or None)
        self.file = (folder / "metrics.jsonl").open("a", buffering=1)
        self.sums: dict[str, float | Tensor] = defaultdict(float)
        self.counts: dict[str, float | Tensor] = defaultdict(float)
        # None: quiet unless stderr is a terminal
        self.bar = tqdm(
            total=total_steps, initial=step, unit="step", disable=None, dynamic_ncols=True
        )

    def add(self, metrics: dict[str, Any], count: float | Tensor = 1.0) -> None:
        """Add sums over `count` samples; tensors stay where they are until `write`."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value
            self.counts[name] = self.counts[name] + count

    def averages(self) -> dict[str, float]:
        """Averages since the last call, in plain numbers."""
        result = {name: float(self.sums[name]) / float(self.counts[name]) for name in self.sums}
        self.sums.clear()
        self.counts.clear()
        return result

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write one log interval at an agent step; numbers that are not finite become null."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        clean = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self.file.write(json.dumps({"step": step, **clean}) + "\n")

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Show images, RGB uint8 (H, W, 3), at an agent step in TensorBoard."""
        for name, image in images.items():
            self.writer.add_image(name, image, step, dataformats="HWC")

    def progress(self, step: int, metrics: dict[str, float]) -> None:
        """Show the progress line."""
        self.bar.update(step - self.bar.n)
        shown = {
            "distance": metrics.get("episode/distance"),
            "best": metrics.get("explore/distance_max"),
            "q": metrics.get("loss/q"),
            "fwd": metrics.get("loss/forward"),
            "inv": metrics.get("loss/inverse"),
        }
        self.bar.set_postfix(
            {k: f"{v:.4g}" for k, v in shown.items() if v is not None and math.isfinite(v)},
            refresh=False,
        )

    def close(self) -> None:
        """Flush and close everything."""
        self.bar.close()
        self.writer.close()
        self.file.close()
