"""Which worker steps which environments, so that all finish at the same time."""

import numpy as np

WINDOW = 16  # steps between two redistributions


class Balance:
    """Divides environments between workers, some of which start a step late or are slow.

    By the median over some steps, all should finish together; only environments between two
    episodes move.

    Args:
        num_envs: environments, numbered from 0; evenly divided at first, the last ones to the
            first workers: the practising ones are last, and hardly ever between two episodes.
        num_workers: workers, numbered from 0.
        late: how many of these, the last ones, start late.
    """

    def __init__(self, num_envs: int, num_workers: int, late: int) -> None:
        parts = np.array_split(np.arange(num_envs)[::-1], num_workers)
        self.num_envs = num_envs
        self.rows = [part.tolist() for part in parts]  # of each worker
        self.early = range(num_workers - late)
        self.late = range(num_workers - late, num_workers)
        self.wanted = np.array([len(rows) for rows in self.rows], float)  # of each worker
        self._leads: list[float] = []
        self._costs: list[list[float]] = []

    def home(self, row: int) -> int:
        """The worker that steps an environment."""
        return next(worker for worker, rows in enumerate(self.rows) if row in rows)

    def measured(self, lead: float, seconds: list[float]) -> None:
        """Record one step.

        Args:
            lead: seconds from the early to the late start.
            seconds: needed by each worker.
        """
        usual = sum(seconds) / self.num_envs  # for workers with none
        counts = [len(rows) for rows in self.rows]
        self._leads.append(lead)
        self._costs.append([s / n if n else usual for s, n in zip(seconds, counts, strict=True)])
        if len(self._leads) == WINDOW:
            starts = np.zeros(len(counts))
            starts[self.late] = np.median(self._leads)
            self.wanted = shares(starts, np.median(self._costs, axis=0), self.num_envs)
            self._leads, self._costs = [], []

    def move(self, free: np.ndarray) -> None:
        """Redistribute environments; only those in `free`, bool (num_envs,), may move."""
        while True:
            surplus = np.array([len(rows) for rows in self.rows]) - self.wanted
            able = [worker for worker, rows in enumerate(self.rows) if free[rows].any()]
            if not able:
                return
            giver = max(able, key=lambda worker: surplus[worker])
            taker = surplus.argmin()
            if surplus[giver] - surplus[taker] <= 1:  # moving one would not help
                return
            row = next(row for row in self.rows[giver] if free[row])
            self.rows[giver].remove(row)
            self.rows[taker].append(row)


def shares(starts: np.ndarray, costs: np.ndarray, total: int) -> np.ndarray:
    """How many environments each worker steps if all end at the same time, as real numbers.

    Args:
        starts: seconds at which each begins, (workers,).
        costs: seconds that each needs for an environment, (workers,).
        total: environments.
    """
    taking = np.full(len(starts), True)
    while True:
        end = (total + (starts / costs)[taking].sum()) / (1 / costs[taking]).sum()
        if (starts[taking] < end).all():
            return np.where(taking, (end - starts) / costs, 0.0)
        taking &= starts < end  # the others would start after the end
