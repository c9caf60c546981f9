"""Memory of the newest experience: one rollout that is being filled, and one that is learned from.

So that environments never wait for a learner that works through a whole rollout at once: while the
next rollout is filled, the one before is learned from, a little in every step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Rollout:
    """T consecutive steps of N environments, and the step after them; all on the CPU.

    A step whose `reset` is true holds the last state of an episode: nothing was chosen there, and
    the state after it opens the next episode. It is no transition, and no loss may treat it as one.
    """

    states: Tensor  # uint8 (T + 1, N, C, H, W)
    previous: Tensor  # int64 (T + 1, N), the action before each state, NO_ACTION at a start
    actions: Tensor  # int64 (T + 1, N)
    probabilities: Tensor  # float32 (T + 1, N, actions), the policy the actions were drawn from
    values: Tensor  # float32 (T + 1, N, heads), of the states
    rewards: Tensor  # float32 (T + 1, N), the game's
    terminated: Tensor  # bool (T + 1, N): the transition ended in a terminal state
    truncated: Tensor  # bool (T + 1, N): the transition was the last one before a cut
    reset: Tensor  # bool (T + 1, N)
    novelty: Tensor  # float32 (T + 1, N), of the state that followed, see `icm.replay.Sequences`
    surprise: Tensor  # float32 (T + 1, N), of the transition when it was seen

    @staticmethod
    def empty(
        steps: int, num_envs: int, state_shape: tuple[int, ...], actions: int, heads: int
    ) -> "Rollout":
        """One with room for `steps` steps and the one after them."""
        shape = (steps + 1, num_envs)
        return Rollout(
            states=torch.zeros((*shape, *state_shape), dtype=torch.uint8),
            previous=torch.zeros(shape, dtype=torch.int64),
            actions=torch.zeros(shape, dtype=torch.int64),
            probabilities=torch.zeros((*shape, actions)),
            values=torch.zeros((*shape, heads)),
            rewards=torch.zeros(shape),
            terminated=torch.zeros(shape, dtype=torch.bool),
            truncated=torch.zeros(shape, dtype=torch.bool),
            reset=torch.zeros(shape, dtype=torch.bool),
            novelty=torch.zeros(shape),
            surprise=torch.zeros(shape),
        )


class Rollouts:
    """Two rollouts that change places whenever the first is full.

    Args:
        steps: T, vector steps in a rollout.
        num_envs: N, environments side by side.
        state_shape: (C, H, W).
        actions: size of the action space.
        heads: values of a state.
    """

    def __init__(
        self, steps: int, num_envs: int, state_shape: tuple[int, ...], actions: int, heads: int
    ) -> None:
        self.steps = steps
        sizes = steps, num_envs, state_shape, actions, heads
        self.filling, self.full = Rollout.empty(*sizes), Rollout.empty(*sizes)
        self.size = 0  # steps filled
        self.finished = 0  # rollouts filled so far

    def add(self, step: dict[str, Tensor]) -> bool:
        """Add one step of every environment; whether that has completed a rollout, now `full`.

        A rollout is complete with the step after its last, which is also the first of the next.
        """
        self._write(step)
        if self.size <= self.steps:
            return False
        self.filling, self.full = self.full, self.filling
        self.finished += 1
        self.size = 0
        self._write(step)
        return True

    def _write(self, step: dict[str, Tensor]) -> None:
        for name, value in step.items():
            getattr(self.filling, name)[self.size] = value
        self.size += 1

    def clear(self) -> None:
        """Begin anew."""
        self.size = self.finished = 0

    def recent_frames(self, count: int) -> Tensor:
        """The newest frames of all environments, at most about `count`, uint8 (n, H, W)."""
        frames = self.filling.states[: self.size, :, -1]
        if self.finished:
            frames = torch.cat((self.full.states[: self.steps, :, -1], frames))
        return frames[-max(1, count // frames.shape[1]) :].flatten(0, 1)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs, in plain containers and tensors."""
        return {
            "size": self.size,
            "finished": self.finished,
            "filling": vars(self.filling),
            "full": vars(self.full),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: it was taken from rollouts of another shape; nothing has changed then.
        """
        pairs = [
            (name, value, state[which][name])
            for which, rollout in (("filling", self.filling), ("full", self.full))
            for name, value in vars(rollout).items()
        ]
        for name, value, found in pairs:
            if found.shape != value.shape:
                raise ValueError(
                    f"rollout ({name} {tuple(found.shape)}) does not fit {tuple(value.shape)}"
                )
        for _, value, found in pairs:
            value.copy_(found)
        self.size, self.finished = state["size"], state["finished"]

    def cut(self) -> None:
        """Close all running episodes: the environments will start new ones.

        The newest step's successor was never seen, so it becomes the last state of its episode and
        the transition into it a truncated one.
        """
        newest = self.filling
        if self.size:
            newest.reset[self.size - 1] = True
        if self.size > 1:
            before = self.size - 2
            newest.truncated[before] |= ~newest.reset[before] & ~newest.terminated[before]
