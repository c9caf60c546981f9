"""Replay memory that stores every frame once and hands out sequences of stacked states."""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from icm.collectives import own
from icm.device import sent
from icm.models import NO_ACTION


@dataclass
class Sequences:
    """B sequences of L consecutive slots of one environment each, and the state after the last.

    A slot whose `reset` is true holds the last state of an episode: nothing was chosen there, and
    the state after it opens the next episode. It is no transition, and no loss may treat it as one.
    """

    states: Tensor  # uint8 (B, L + 1, C, H, W)
    previous: Tensor  # int64 (B, L + 1), the action before each state, NO_ACTION at a start
    actions: Tensor  # int64 (B, L)
    behaviour: Tensor  # float32 (B, L, actions), the policy the actions were drawn from
    rewards: Tensor  # float32 (B, L), the game's
    terminated: Tensor  # bool (B, L): the transition ended in a terminal state
    truncated: Tensor  # bool (B, L): the transition was the last one before a cut
    reset: Tensor  # bool (B, L)
    novelty: Tensor  # float32 (B, L), of the state that followed, in its episode; 0 at a new life

    def to(self, device: torch.device) -> "Sequences":
        """The same sequences with every tensor on `device`."""
        return Sequences(**{name: sent(tensor, device) for name, tensor in vars(self).items()})


class Replay:
    """Ring buffer of (slots, environments); one uint8 frame a slot, stacks are rebuilt on sampling.

    Args:
        capacity: agent steps kept, all environments together.
        num_envs: environments that write side by side.
        frame_shape: (H, W) of one grey frame.
        frame_stack: frames in a state; at the start of an episode its first frame is repeated.
        num_actions: size of the action space.
        device: where all of it is kept, and sequences are assembled.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        frame_shape: tuple[int, int],
        frame_stack: int,
        num_actions: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.num_slots = capacity // num_envs
        self.num_envs = num_envs
        self.frame_stack = frame_stack
        self.history = max(frame_stack - 1, 1)  # slots before a state that belong to it
        shape = (self.num_slots, num_envs)
        zeros = partial(torch.zeros, device=device)
        self.frames = zeros((*shape, *frame_shape), dtype=torch.uint8)
        self.actions = zeros(shape, dtype=torch.uint8)
        self.behaviour = zeros((*shape, num_actions), dtype=torch.float32)
        self.rewards = zeros(shape, dtype=torch.float32)
        self.terminated = zeros(shape, dtype=torch.bool)
        self.truncated = zeros(shape, dtype=torch.bool)
        self.reset = zeros(shape, dtype=torch.bool)
        self.novelty = zeros(shape, dtype=torch.float32)
        # slots of the current episode before this one, as far as a state looks back
        self.age = zeros(shape, dtype=torch.uint8)
        self.head = 0  # slot written next
        self.size = 0  # slots filled

    @staticmethod
    def nbytes(capacity: int, frame_shape: tuple[int, int], num_actions: int) -> int:
        """Bytes that a memory of `capacity` agent steps takes."""
        return capacity * (frame_shape[0] * frame_shape[1] + 4 * num_actions + 13)

    def add(
        self,
        states: Tensor,
        actions: Tensor,
        behaviour: Tensor,
        rewards: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        reset: Tensor,
        novelty: Tensor,
    ) -> None:
        """Store one step of every environment.

        States are uint8 (num_envs, C, H, W), behaviour is (num_envs, actions), the rest
        (num_envs,), see `Sequences`; on any device. The state that follows is stored by the next
        call, so the newest slot has no successor yet.
        """
        previous = self.head - 1
        started = self.reset[previous] if self.size else torch.ones_like(self.reset[previous])
        age = (self.age[previous] + 1).clamp_max(self.history)
        self.age[self.head] = torch.where(started, 0, age)
        self.frames[self.head] = sent(states[:, -1], self.device)
        self.actions[self.head] = sent(actions, self.device)
        self.behaviour[self.head] = sent(behaviour, self.device)
        self.rewards[self.head] = sent(rewards, self.device)
        self.terminated[self.head] = sent(terminated, self.device)
        self.truncated[self.head] = sent(truncated, self.device)
        self.reset[self.head] = sent(reset, self.device)
        self.novelty[self.head] = sent(novelty, self.device)
        self.head = (self.head + 1) % self.num_slots
        self.size = min(self.size + 1, self.num_slots)

    def can_sample(self, length: int) -> bool:
        """Whether `length` slots, their successor and the first one's history are stored."""
        return self.size > length + self.history

    def sample(self, batch: int, length: int, generator: torch.Generator) -> Sequences:
        """Draw `batch` sequences of `length` slots uniformly (see `Sequences` for shapes).

        Every rank draws the same ones and gets its part of them.

        Raises:
            ValueError: too little is stored (see `can_sample`).
        """
        if not self.can_sample(length):
            raise ValueError(f"{self.size} slots stored, too few for sequences of {length}")
        # the history of the oldest states is already overwritten
        starts = torch.randint(self.history, self.size - length, (batch, 1), generator=generator)
        envs = torch.randint(self.num_envs, (batch, 1), generator=generator)
        return self.gather(self.head - self.size + own(starts), own(envs), length)

    def gather(self, starts: Tensor, envs: Tensor, length: int) -> Sequences:
        """Sequences of `length` slots of `envs` from `starts` on: both int64 (B, 1), on the CPU.

        Their successors and first states' history must be stored, see `sample`.
        """
        starts, envs = sent(starts, self.device), sent(envs, self.device)
        along = torch.arange(length + 1, device=self.device)
        slots = (starts + along) % self.num_slots  # (B, L + 1)
        look_back = torch.arange(self.frame_stack - 1, -1, -1, device=self.device)  # C-1 … 0
        age = self.age[slots, envs]
        back = torch.minimum(look_back, age.unsqueeze(-1))  # (B, L + 1, C)
        which = (slots.unsqueeze(-1) - back) % self.num_slots * self.num_envs + envs.unsqueeze(-1)
        # much faster than indexing, because whole frames are copied
        states = self.frames.flatten(0, 1).index_select(0, which.flatten())
        before = self.actions[(slots - 1) % self.num_slots, envs].long()
        at = (slots[:, :-1], envs)
        return Sequences(
            states=states.unflatten(0, which.shape),
            previous=torch.where(age > 0, before, NO_ACTION),
            actions=self.actions[at].long(),
            behaviour=self.behaviour[at],
            rewards=self.rewards[at],
            terminated=self.terminated[at],
            truncated=self.truncated[at],
            reset=self.reset[at],
            novelty=self.novelty[at],
        )

    def recent_frames(self, count: int) -> Tensor:
        """The newest frames of all environments, at most about `count`, uint8 (n, H, W)."""
        slots = min(self.size, max(1, count // self.num_envs))
        index = (self.head - 1 - torch.arange(slots, device=self.device)) % self.num_slots
        return self.frames[index].flatten(0, 1)

    def state_dict(self) -> dict[str, Any]:
        """The filled slots as tensors, not copied on the CPU, and the slot written next.

        The frames are compressed, to a seventh or less: uint8 (bytes,), as in a zstd file.
        """
        # via NumPy, because saving a slice of a tensor would save the whole tensor
        filled = {
            name: torch.from_numpy(value[: self.size].cpu().numpy())
            for name, value in self._tensors().items()
        }
        frames = filled["frames"].numpy()
        packed = np.frombuffer(zstandard.compress(frames.data, level=1), np.uint8)
        return {
            **filled,
            "frames": torch.from_numpy(packed.copy()),
            "frame_shape": list(frames.shape),
            "head": self.head,
            "num_slots": self.num_slots,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: the memory it was taken from has another shape; nothing has changed then.
        """
        tensors, packed = self._tensors(), state["frames"].numpy().data
        size, *frame = state["frame_shape"]
        shapes = {
            name: (size, *frame) if name == "frames" else state[name].shape for name in tensors
        }
        for name, value in tensors.items():
            found = (state["num_slots"], *shapes[name][1:])
            if found != tuple(value.shape) or shapes[name][0] != size:
                raise ValueError(
                    f"replay memory ({name} {found}) does not fit this one {tuple(value.shape)}"
                )
        fits = size <= self.num_slots and state["head"] in range(self.num_slots)
        if not fits or zstandard.frame_content_size(packed) != size * prod(frame):
            raise ValueError("replay memory does not fit its own size")
        self.head, self.size = state["head"], size
        # in place on a CPU: a copy would take as much memory again
        frames = self.frames[:size].cpu()
        with zstandard.ZstdDecompressor().stream_reader(packed) as unpacked:
            unpacked.readinto(frames.numpy().reshape(-1))
        self.frames[:size] = frames
        for name in tensors.keys() - {"frames"}:
            tensors[name][:size] = state[name]

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def cut(self) -> None:
        """Close all running episodes: the environments will start new ones.

        The newest slot's successor was never seen, so it becomes the last state of its episode and
        the transition into it a truncated one.
        """
        if self.size:
            self.reset[self.head - 1] = True
        if self.size > 1:
            before = self.head - 2
            self.truncated[before] |= ~self.reset[before] & ~self.terminated[before]


def since_opening(states: Tensor, age: Tensor) -> Tensor:
    """Stacked states without what was before their episodes opened; the first frame is repeated.

    The memory has them so. If one opens in the middle of another, its environment shows more.

    Args:
        states: uint8 (n, C, H, W).
        age: agent steps since the episodes opened, int64 (n,).
    """
    newest = states.shape[1] - 1
    young = (age < newest).nonzero()  # (rows, 1)
    back = torch.minimum(torch.arange(newest, -1, -1), age[young])  # (rows, C)
    return states.index_copy(0, young.squeeze(1), states[young, newest - back])
