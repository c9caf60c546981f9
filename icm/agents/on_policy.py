"""Common to learners from rollouts: returns of a rollout, and the order in which it is learned."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from icm.agents.base import Agent, Common
from icm.agents.policy import Policy, scheduled
from icm.collectives import own
from icm.config import RolloutConfig
from icm.device import sent
from icm.replay import Replay, Sequences


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    terminal: Tensor,
    truncated: Tensor,
    reset: Tensor,
    discount: float,
    trace: float,
) -> Tensor:
    """TD(lambda) returns of every step of a rollout (Sutton and Barto 2018, eq. 12.18).

    G(t) = r_t + discount * ((1 - trace) V(s_t+1) + trace G(t + 1)), except:
    a `terminal` transition has no future; a `truncated` one has V(s_t+1) alone; and a `reset` step
    (the last state of an episode, where no action is chosen) has the return of the next episode's
    start. So where death is not terminal, dying leads back to the start; if that lies beyond the
    end, the last state's value stands in. G - V is the advantage of Schulman et al. 2016.

    Args:
        rewards: float (T, ...).
        values: V(s), float (T + 1, ...).
        terminal: bool (T, ...), transitions after which nothing follows.
        truncated: bool (T, ...), see above.
        reset: bool (T, ...), see above.
        discount: per agent step.
        trace: lambda.

    Returns:
        float (T, ...).
    """
    returns = torch.empty_like(rewards)
    ahead = value = values[-1]  # G and V of what follows
    for t in reversed(range(len(rewards))):
        future = torch.where(truncated[t], values[t + 1], value + trace * (ahead - value))
        here = rewards[t] + discount * future.masked_fill(terminal[t], 0.0)
        ahead = torch.where(reset[t], ahead, here)
        value = torch.where(reset[t], value, values[t])
        returns[t] = ahead
    return returns


@dataclass
class Batch:
    """What an update learns from, all on the device."""

    rollout: Sequences  # of the newest rollout, (B, L), for the learner
    targets: dict[str, Tensor]  # its part of `OnPolicy.targets_of_rollout`, (B, L, ...)
    replayed: Sequences  # from the whole memory, for the curiosity signal


class OnPolicy(Agent[Batch]):
    """Learns from the newest rollout, in `epochs` passes, while the next one is collected.

    So environments never wait until a whole rollout has been learned. Curiosity learns from the
    whole memory, so that what was once known does not surprise again.

    A rollout is `rollout_steps` (T) steps of every environment (N), and the step after them.
    """

    config: RolloutConfig

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        policy: Policy,
        heads: int,
        memory: Replay,
        agent: RolloutConfig,
        common: Common,
    ) -> None:
        super().__init__(networks, policy, memory, agent, common)
        shape = agent.rollout_steps + 1, common.num_envs
        self.collected = 0  # steps so far of the current rollout
        self.values = torch.zeros(*shape, heads)  # of its states, when acting
        self.raw = torch.zeros(shape)  # intrinsic rewards of its transitions, before scaling
        # of the rollout that is being learned
        self.first = 0  # its first slot in memory
        self.targets: dict[str, Tensor] = {}  # (T, N, ...), on the device
        # numbers of sequences still to be learned: (updates, batch_size)
        self.order = torch.empty(0, agent.batch_size, dtype=torch.int64)

    def remember(self, values: Tensor, raw: Tensor, **step: Tensor) -> None:
        """Add a step to memory; if it completes a rollout, prepare to learn that."""
        super().remember(values, raw, **step)
        self.values[self.collected] = values
        self.raw[self.collected] = raw
        self.collected += 1
        if self.collected < len(self.values):
            return
        self.first = (self.memory.head - self.collected) % self.memory.num_slots
        targets = self.targets_of_rollout()
        self.targets = {name: sent(target, self.device) for name, target in targets.items()}
        self.plan()
        # the step after the last is the first of the next rollout
        self.values[0], self.raw[0] = self.values[-1], self.raw[-1]
        self.collected = 1

    def discount(self) -> float:
        """See `Agent.discount`; follows the agent steps covered by updates so far."""
        return scheduled(self.config.discount, self.config.warmup_steps + self.learned_steps)

    @abstractmethod
    def targets_of_rollout(self) -> dict[str, Tensor]:
        """Learning targets of the complete rollout by name, float32 (T, N, ...) on the CPU."""

    def stored(self, tensor: Tensor) -> Tensor:
        """The rollout's part (T, N, ...) of one of the memory's tensors."""
        slots = (self.first + torch.arange(self.config.rollout_steps)) % self.memory.num_slots
        return tensor[slots.to(tensor.device)].cpu()

    def rewards(self) -> tuple[Tensor, Tensor]:
        """Weighted rewards of the rollout, (T, N) each: intrinsic and the game's."""
        curiosity = self.curiosity
        intrinsic = curiosity.coef * self.scale(self.raw[:-1])
        return intrinsic, curiosity.extrinsic_coef * self.stored(self.memory.rewards)

    def returns_of(self, rewards: Tensor, values: Tensor, discount: float) -> Tensor:
        """Returns (T, N) of the rollout from rewards (T, N) and values (T + 1, N)."""
        memory = self.memory
        return lambda_returns(
            rewards,
            values,
            self.stored(memory.terminated) & self.config.death_is_terminal,
            self.stored(memory.truncated),
            self.stored(memory.reset),
            discount,
            self.config.trace,
        )

    def plan(self) -> None:
        """Draw the order in which the rollout is learned."""
        self.order = torch.cat(
            [
                torch.randperm(self._sequences, generator=self.generator).view(
                    -1, self.config.batch_size
                )
                for _ in range(self.config.epochs)
            ]
        )

    @property
    def shape(self) -> list[int]:
        """Settings that a saved rollout depends on."""
        config = self.config
        made = [config.rollout_steps, self.num_envs]
        return [*made, config.sequence_length, config.batch_size, config.epochs]

    @property
    def _sequences(self) -> int:
        """Sequences per rollout."""
        return self.config.rollout_steps // self.config.sequence_length * self.num_envs

    def measure_input(self) -> None:
        """See `Agent.measure_input`; the policy does not learn from the random agent."""
        super().measure_input()
        self.restart()

    def forget(self, step: int) -> None:
        """See `Agent.forget`; only curiosity needs more than a new rollout."""
        super().forget(step)
        self.restart()

    def restart(self) -> None:
        """Begin a new rollout, and learn no more from earlier ones."""
        self.collected = 0
        self.order = self.order[:0]

    def due(self, step: int) -> int:
        """Enough to learn a rollout evenly, and all of it by the time the next one is full."""
        if not self.can_learn(step):
            return 0
        updates = self.config.epochs * self._sequences // self.config.batch_size
        left = updates - updates * self.collected // self.config.rollout_steps
        return max(0, len(self.order) - left)

    def update(self) -> dict[str, Tensor]:
        """See `Agent.update`."""
        numbers, self.order = self.order[0], self.order[1:]
        return self.descend(self.batch(numbers))

    def batch(self, numbers: Tensor) -> Batch:
        """This rank's part: sequences of the rollout by number, and some drawn from memory."""
        numbers = own(numbers)
        length = self.config.sequence_length
        envs = (numbers % self.num_envs).unsqueeze(1)
        starts = (numbers // self.num_envs * length).unsqueeze(1)
        at = sent(starts + torch.arange(length), self.device), sent(envs, self.device)
        replayed = self.memory.sample(self.config.replayed, length, self.generator)
        return Batch(
            rollout=self.memory.gather(self.first + starts, envs, length).to(self.device),
            targets={name: target[at] for name, target in self.targets.items()},
            replayed=replayed.to(self.device),
        )

    def state_dict(self) -> dict[str, Any]:
        """See `Agent.state_dict`; the rollouts are part of it."""
        state = super().state_dict()
        state["agent"] |= {
            "collected": self.collected,
            "values": self.values,
            "raw": self.raw,
            "first": self.first,
            "targets": {name: target.cpu() for name, target in self.targets.items()},
            "order": self.order.clone(),
            "shape": self.shape,
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Agent.load_state_dict`; a new rollout if settings differ."""
        super().load_state_dict(state)
        agent = state["agent"]
        # a smaller memory may have no room for it, and is filled anew anyway
        if agent["shape"] != self.shape or agent["first"] >= self.memory.num_slots:
            self.restart()
            return
        targets, order = agent["targets"], agent["order"]
        fits = (
            agent["values"].shape == self.values.shape
            and agent["raw"].shape == self.raw.shape
            and agent["collected"] in range(len(self.raw))
            and agent["first"] >= 0
            and order.shape[1:] == self.order.shape[1:]
            and ((order >= 0) & (order < self._sequences)).all()
            and all(target.shape[:2] == self.raw[:-1].shape for target in targets.values())
        )
        if not fits:
            raise ValueError("its rollouts do not fit its settings")
        for name in ("collected", "values", "raw", "first", "order"):
            setattr(self, name, agent[name])
        self.targets = {name: sent(target, self.device) for name, target in targets.items()}
