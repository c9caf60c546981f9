"""Where episodes begin of environments that practise what is hard."""

from typing import NamedTuple

import numpy as np

from icm.envs.snapshots import EVERY, SELDOM

PERSISTENCE = 0.95  # how often an environment tries again where it died, or where it is farthest
REPEATING = 0.5  # share of the environments that practise that repeat the way of the others
BACK = 4, 41  # agent steps that it goes back, at random: from, below; and on to a snapshot


class Middle(NamedTuple):
    """A place in the middle of a running episode, where there is a snapshot.

    Without one, all environments would wait for steps that are played again.
    """

    other: int  # number of the environment whose episode it is
    done: int  # how many of its actions lead there
    knows: bool  # whether who begins there knows what the episode has seen up to there


class Practice:
    """Where an environment's next episode begins, by restoring an emulator (as in Go-Explore).

    Ecoffet et al. 2021. One half of those that practise try again:

    - nineteen times in twenty, after a death: some steps before it, but hardly before where this
      try began. What is hard is met more often;
    - else, and where it was stuck: in the episode of another that practises and has played for
      longer, not before where the try of that one began. Many are soon where one has come;
    - stuck where nobody has played for longer, nineteen times in twenty: here once more, or nobody
      would stay where it is hardest.

    What was seen on the way there stays known; what was tried in vain is as new as to any life that
    comes there. The other half repeat the way, or it would be forgotten: their episodes begin
    anywhere in that of one of the first half, as if nothing of it had been seen.

    Args:
        num_envs: environments, numbered from 0.
        practising: how many of these practise, the last ones.
        idle: actions without new ground after which an episode is cut. They are on no way.
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
        """Where the next episode of an environment begins; None: at a start of its own.

        Args:
            row: number of the environment.
            died: whether its episode ended with a death.
            cut: whether it was truncated. What ended in neither way is not practised.
            played: actions of the running episodes, for each environment.
            rng: what is left to chance.
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
        # or where lives are short it would be ever further back
        first = int(self.began_at[other]) - (EVERY * int(rng.integers(2)) if other == row else 0)
        return Middle(other, max(done, first), knows=True)
