"""What learners from rollouts share: what a rollout was worth, and in which order it is learned."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from icm.agents.base import Agent, Common
from icm.config import RolloutConfig
from icm.rollouts import Rollouts


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
    (the last state of an episode, where nothing is chosen) is worth what the next episode's start
    is worth. So where death is not terminal, dying leads back to the start. G - V is the advantage
    of Schulman et al. 2016.

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
    """B sequences of L consecutive steps of one environment each, and the state after the last."""

    states: Tensor  # uint8 (B, L + 1, C, H, W)
    previous: Tensor  # int64 (B, L + 1)
    actions: Tensor  # int64 (B, L)
    probabilities: Tensor  # float32 (B, L, actions), the policy the actions were drawn from
    reset: Tensor  # bool (B, L)
    novelty: Tensor  # float32 (B, L), 0 where the signal has nothing to learn
    returns: Tensor  # float32 (B, L, heads)
    advantages: Tensor  # float32 (B, L)


class OnPolicy(Agent):
    """Learns from the newest rollout, in `epochs` passes, while the next one is made."""

    memory: Rollouts
    config: RolloutConfig

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        memory: Rollouts,
        agent: RolloutConfig,
        common: Common,
    ) -> None:
        super().__init__(networks, memory, agent, common)
        # of the full rollout
        self.returns = torch.zeros(memory.steps, common.num_envs, 1)
        self.advantages = torch.zeros(memory.steps, common.num_envs)
        # sequences still to be learned, by their number: (updates, batch_size)
        self.order = torch.empty(0, agent.batch_size, dtype=torch.int64)

    def remember(self, **step: Tensor) -> None:
        """Add a step to the rollout; a full one waits to be learned."""
        if self.memory.add(step):
            self.evaluate()
            self.plan()

    @abstractmethod
    def evaluate(self) -> None:
        """Set `returns` and `advantages` of the full rollout."""

    def returns_of(self, values: Tensor) -> Tensor:
        """Returns (T, N, heads) of the full rollout that build on values (T + 1, N, heads)."""
        rollout, curiosity, steps = self.memory.full, self.curiosity, slice(self.memory.steps)
        intrinsic = curiosity.coef * self.scale(rollout.surprise * rollout.novelty)
        rewards = intrinsic + curiosity.extrinsic_coef * rollout.rewards
        terminal = rollout.terminated & self.config.death_is_terminal
        given = (rewards, terminal, rollout.truncated, rollout.reset)
        rewards, terminal, truncated, reset = (x[steps].unsqueeze(2) for x in given)
        return lambda_returns(
            rewards, values, terminal, truncated, reset, self.config.discount, self.config.trace
        )

    def plan(self) -> None:
        """Draw the order in which the full rollout is learned."""
        sequences = self.memory.steps // self.config.sequence_length * self.num_envs
        self.order = torch.cat(
            [
                torch.randperm(sequences, generator=self.generator).view(-1, self.config.batch_size)
                for _ in range(self.config.epochs)
            ]
        )

    def measure_input(self) -> None:
        """See `Agent.measure_input`; what a random agent did is not learned."""
        super().measure_input()
        self.forget(self.warmup_steps)

    def forget(self, step: int) -> None:
        """See `Agent.forget`; the next rollout is learned."""
        self.memory.clear()
        self.order = self.order[:0]

    def due(self, step: int) -> int:
        """So many that a rollout is learned evenly, and all of it when the next one is full."""
        sequences = self.memory.steps // self.config.sequence_length * self.num_envs
        updates = self.config.epochs * sequences // self.config.batch_size
        left = updates - updates * self.memory.size // self.memory.steps
        return max(0, len(self.order) - left)

    def update(self) -> dict[str, Tensor]:
        """One gradient step, see `Agent.update`."""
        numbers, self.order = self.order[0], self.order[1:]
        return self.descend(self.batch(numbers))

    def batch(self, numbers: Tensor) -> Batch:
        """Sequences of the full rollout by their number, on the device."""
        rollout, length = self.memory.full, self.config.sequence_length
        envs = (numbers % self.num_envs).unsqueeze(1)
        slots = (numbers // self.num_envs * length).unsqueeze(1) + torch.arange(length + 1)
        at, ahead = (slots[:, :-1], envs), (slots, envs)
        batch = Batch(
            states=rollout.states[ahead],
            previous=rollout.previous[ahead],
            actions=rollout.actions[at],
            probabilities=rollout.probabilities[at],
            reset=rollout.reset[at],
            novelty=rollout.novelty[at],
            returns=self.returns[at],
            advantages=self.advantages[at],
        )
        return Batch(**{name: tensor.to(self.device) for name, tensor in vars(batch).items()})

    def signal_loss(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The curiosity signal's loss on network inputs (B * (L + 1), C, H, W), and its parts."""
        features = self.signal.encode(x).unflatten(0, batch.previous.shape)
        errors = self.signal(
            features[:, :-1].flatten(0, 1),
            batch.actions.flatten(),
            features[:, 1:].flatten(0, 1),
            batch.probabilities.flatten(0, 1),
            batch.previous[:, :-1].flatten(),
        )
        return self.signal.loss(errors, ((batch.novelty > 0) & ~batch.reset).flatten())

    def state_dict(self) -> dict[str, Any]:
        """See `Agent.state_dict`; what is still to be learned of a rollout is part of it."""
        state = super().state_dict()
        state["agent"] |= {
            "order": self.order.clone(),
            "returns": self.returns,
            "advantages": self.advantages,
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Agent.load_state_dict`."""
        super().load_state_dict(state)
        self.order = state["agent"]["order"]
        self.returns, self.advantages = state["agent"]["returns"], state["agent"]["advantages"]
