"""Which worker steps which environments, so that all have done at the same time."""

from statistics import median

import numpy as np

WINDOW = 16  # steps after which environments are divided anew


class Balance:
    """Divides environments between workers that start a step early and some that start late.

    In the median of some steps both kinds should end at the same time; only environments between
    two episodes move.

    Args:
        num_envs: environments, numbered from 0; evenly divided at first.
        num_workers: workers, numbered from 0.
        late: how many of these, the last ones, start late.
    """

    def __init__(self, num_envs: int, num_workers: int, late: int) -> None:
        parts = np.array_split(np.arange(num_envs), num_workers)
        self.num_envs, self.num_workers = num_envs, num_workers
        self.rows = [part.tolist() for part in parts]  # of each worker
        self.early = range(num_workers - late)
        self.late = range(num_workers - late, num_workers)
        self.wanted = self._late_rows()  # environments of late workers
        self._gaps: list[float] = []
        self._costs: list[float] = []

    def measured(self, lead: float, seconds: list[float]) -> None:
        """Take in one step.

        Args:
            lead: seconds from the early to the late start.
            seconds: that each worker needed.
        """
        if not self.late:
            return
        end_early = max(seconds[worker] for worker in self.early)
        end_late = lead + max(seconds[worker] for worker in self.late)
        self._gaps.append(end_early - end_late)
        self._costs.append(sum(seconds) / self.num_envs)
        if len(self._gaps) == WINDOW:
            # moving one shortens one side and lengthens the other
            effect = median(self._costs) * (1 / len(self.early) + 1 / len(self.late))
            moved = self._late_rows() + round(median(self._gaps) / effect)
            self.wanted = min(max(moved, 0), self.num_envs)
            self._gaps, self._costs = [], []

    def move(self, free: np.ndarray) -> None:
        """Divide anew as far as `free`, bool (num_envs,), says that environments may move."""
        while (missing := self.wanted - self._late_rows()) != 0:
            givers, takers = (self.early, self.late) if missing > 0 else (self.late, self.early)
            able = [worker for worker in givers if free[self.rows[worker]].any()]
            if not able:
                return
            giver = max(able, key=lambda worker: len(self.rows[worker]))
            taker = min(takers, key=lambda worker: len(self.rows[worker]))
            row = next(row for row in self.rows[giver] if free[row])
            self.rows[giver].remove(row)
            self.rows[taker].append(row)

    def _late_rows(self) -> int:
        return sum(len(self.rows[worker]) for worker in self.late)
