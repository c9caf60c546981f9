"""Where environments that practise hard parts begin episodes."""

from typing import NamedTuple

import numpy as np

from icm.envs.snapshots import EVERY, SELDOM

PERSISTENCE = 0.95  # probability of trying again where an environment died, or is farthest
REPEATING = 0.5  # share of the practising environments that repeat the way of the others
BACK = 4, 41  # agent steps to go back, at random: from, below; then on to a snapshot


class Middle(NamedTuple):
    """A place in the middle of a running episode, where there is a snapshot.

    Without one, all environments would wait while steps are replayed.
    """

    other: int  # number of the environment whose episode it is
    done: int  # how many of its actions lead there
    knows: bool  # whether the new episode knows what that one has seen up to there


class Practice:
    """Where an environment's next episode begins: at a restored state, as in Go-Explore.

    Ecoffet et al. 2021. Half of the practising environments try again:

    - after a death, nineteen times in twenty: some steps before it, but at most one snapshot
      before this try's start. Hard parts are met more often;
    - otherwise, and after being stuck: in the episode of another practising one that has played
      for longer, not before that try's start. Many are soon where one has got to;
    - stuck when none has played for longer, nineteen times in twenty: here once more, or none
      would stay at the hardest part.

    What was seen on the way there stays known; what was tried in vain after it is new again. The
    other half repeat the way, or it would be forgotten: their episodes begin anywhere in one of the
    first half, as if nothing of it had been seen.

    Args:
        num_envs: environments, numbered from 0.
        practising: how many of these practise, the last ones.
        idle: actions without new ground after which an episode is truncated; not part of a way.
    """

    def __init__(self, num_envs: int, practising: int, idle: int) -> None:
        numbers = np.arange(num_envs)
        self.practises = numbers >= num_envs - practising
        self.began_at = np.zeros(num_envs, np.int64)  # actions that running episodes began with
        self._repeats = numbers >= num_envs - int(REPEATING * practising)
        self._idle = idle

    def begin(
        self, row: int, died: bool, cut: bool, played: list[list[int]], rng: np.random.Generator
    ) -> Middle | None:
        """Where the next episode of an environment begins; None: with a reset.

        Args:
            row: number of the environment.
            died: whether its episode ended with a death.
            cut: whether it was truncated; if it ended in neither way, a reset follows.
            played: actions of the running episodes, for each environment.
            rng: source of randomness.
        """
        practised = self.practises[row] and (died or cut)
        middle = self._middle(row, died, played, rng) if practised else None
        self.began_at[row] = 0 if middle is None else middle.done
        return middle

    def _middle(
        self, row: int, died: bool, played: list[list[int]], rng: np.random.Generator
    ) -> Middle | None:
        """See `begin`."""
        if self._repeats[row]:
            first = int(rng.choice(np.flatnonzero(self.practises & ~self._repeats)))
            places = len(played[first]) // SELDOM + 1
            return Middle(first, SELDOM * int(rng.integers(places)), knows=False)
        others = self.practises.copy()
        others[row] = False
        lengths = np.array([len(actions) for actions in played])
        longer = others & (lengths > lengths[row])  # has a longer way, as far as one can tell
        if (died or not longer.any()) and rng.random() < PERSISTENCE:
            other = row
        elif others.any():
            other = int(rng.choice(np.flatnonzero(longer if longer.any() else others)))
        else:
            return None
        end = len(played[other]) - (0 if died and other == row else self._idle)
        done = max(0, end - int(rng.integers(*BACK)))
        done -= done % EVERY
        # else, with short lives, it would go ever further back
        first = int(self.began_at[other]) - (EVERY * int(rng.integers(2)) if other == row else 0)
        return Middle(other, max(done, first), knows=True)
