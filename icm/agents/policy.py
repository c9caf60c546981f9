"""From action values or logits to probabilities of actions."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icm.config import PolicyConfig

type Schedule = float | Sequence[Sequence[float]]
"""A constant, or knots [agent step, value]: linear in between, constant before and after."""


MIN_TEMPERATURE = 1e-6
"""Below it the policy is greedy: float32 cannot tell, and may overflow."""

TEMPERATURE_LR = 0.05  # per vector step: corrects one nat of missing entropy in about 20


def scheduled(schedule: Schedule, step: float) -> float:
    """Value of `schedule` at an agent step."""
    if isinstance(schedule, int | float):
        return float(schedule)
    steps, values = zip(*schedule, strict=True)
    return float(np.interp(step, steps, values))


def action_probabilities(q: Tensor, temperature: float, epsilon: float) -> Tensor:
    """Mixture (1 - epsilon) softmax(q / temperature) + epsilon / |A|, shape (batch, actions).

    A temperature of 0 stands for greedy, so (0, epsilon) is epsilon-greedy and (temperature, 0) is
    softmax sampling.
    """
    if temperature > MIN_TEMPERATURE:
        preferred = torch.softmax(q / temperature, dim=1)
    else:
        preferred = torch.zeros_like(q).scatter_(1, q.argmax(1, keepdim=True), 1.0)
    return (1 - epsilon) * preferred + epsilon / q.shape[1]


def entropy(probabilities: Tensor) -> Tensor:
    """Shannon entropy in nats of each row, (batch,)."""
    return torch.special.entr(probabilities).sum(1)


class Policy(ABC):
    """Turns what a network prefers into action probabilities.

    Args:
        warmup_steps: agent steps of uniformly random actions.
    """

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps

    @abstractmethod
    def __call__(self, preferences: Tensor, step: int, greedy: bool) -> Tensor:
        """Action probabilities at an agent step for preferences, both (batch, actions)."""

    def adapt(self, probabilities: Tensor, step: int) -> None:  # noqa: B027 (few do)
        """Adapt to the probabilities used to act at an agent step."""

    def statistics(self, step: int) -> dict[str, float]:
        """Settings at an agent step, under their names in the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, in plain containers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (few have a state)
        """Restore what `state_dict` gave."""


class LogitPolicy(Policy):
    """Softmax of the logits of a policy network."""

    def __call__(self, preferences: Tensor, step: int, greedy: bool) -> Tensor:
        """Action probabilities, see `Policy`."""
        epsilon = 0.0 if greedy or step >= self.warmup_steps else 1.0
        return action_probabilities(preferences, 0.0 if greedy else 1.0, epsilon)


class ValuePolicy(Policy):
    """The policy of a learner of action values: uniform at first, then (temperature, epsilon).

    Without a configured temperature, the temperature follows from the policy's target entropy.

    Args:
        config: the schedules.
        warmup_steps: agent steps of uniformly random actions.
    """

    def __init__(self, config: PolicyConfig, warmup_steps: int) -> None:
        super().__init__(warmup_steps)
        self.config = config
        self.temperature = 1.0

    def __call__(self, preferences: Tensor, step: int, greedy: bool) -> Tensor:
        """Action probabilities, see `Policy`."""
        if greedy:
            return action_probabilities(preferences, temperature=0.0, epsilon=0.0)
        return action_probabilities(preferences, *self.settings(step))

    def settings(self, step: int) -> tuple[float, float]:
        """Temperature and epsilon at an agent step."""
        if step < self.warmup_steps:
            return self.temperature, 1.0
        epsilon = scheduled(self.config.epsilon, step)
        if self.config.temperature is None:
            return self.temperature, epsilon
        return scheduled(self.config.temperature, step), epsilon

    def statistics(self, step: int) -> dict[str, float]:
        """Temperature and epsilon."""
        temperature, epsilon = self.settings(step)
        return {"policy/temperature": temperature, "policy/epsilon": epsilon}

    def adapt(self, probabilities: Tensor, step: int) -> None:
        """Move the temperature so that the policy's mean entropy follows its schedule.

        Gradient descent on log(temperature), as for the entropy constraint of soft actor-critic
        (Haarnoja et al. 2018, section 5). So exploration does not depend on the scale of values.
        """
        if self.config.temperature is not None or step < self.warmup_steps:
            return
        target = scheduled(self.config.entropy, step) * math.log(probabilities.shape[1])
        missing = target - entropy(probabilities).mean().item()
        self.temperature = max(
            MIN_TEMPERATURE, self.temperature * math.exp(TEMPERATURE_LR * missing)
        )

    def state_dict(self) -> dict[str, Any]:
        """The temperature."""
        return {"temperature": self.temperature}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.temperature = state["temperature"]
