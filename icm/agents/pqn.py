"""Parallel Q-learning on curiosity: no replay memory, no target network.

Gallici, Fellows, Ellis, Pou, Masmitja, Foerster, Martin: Simplifying Deep Temporal Difference
Learning (2024): Q(lambda) returns of a rollout, learned in a few passes by a network with layer
normalisation, which keeps it stable.

Actions differ by less than a network can tell apart; advantage learning (Baird 1999; Bellemare et
al. 2016, operator T_AL) widens the gaps between them, as in `icm.agents.dqn`.
"""

from typing import Any

from torch import Tensor

from icm.agents.base import Common
from icm.agents.on_policy import Batch, OnPolicy
from icm.agents.policy import ValuePolicy
from icm.config import PQNConfig
from icm.curiosity import masked_mean
from icm.models import Qnetwork
from icm.replay import Replay


class PQN(OnPolicy):
    """Q-learning from rollouts.

    Args:
        qnetwork: action values, with layer normalisation.
        memory: a replay memory.
        agent: settings of the learner.
        common: everything else.
    """

    config: PQNConfig

    def __init__(
        self, qnetwork: Qnetwork, memory: Replay, agent: PQNConfig, common: Common
    ) -> None:
        self.config = agent
        self.qnetwork = qnetwork
        super().__init__(
            {"qnetwork": qnetwork}, qnetwork.linear2.out_features, memory, agent, common
        )
        self.softmax = ValuePolicy(agent.policy, agent.warmup_steps)

    def choose(self, states: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Action values, twice."""
        with self._autocast():
            q = self.qnetwork(self._input(states), previous).float()
        return q, q

    def policy(self, preferences: Tensor, step: int, greedy: bool) -> Tensor:
        """Action probabilities, see `ValuePolicy`."""
        return self.softmax(preferences, step, greedy)

    def act(self, states: Tensor, previous: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Agent.act`; the temperature adapts."""
        actions, probabilities, values = super().act(states, previous, step)
        self.softmax.adapt(probabilities, step)
        return actions, probabilities, values

    def policy_statistics(self, step: int) -> dict[str, float]:
        """Temperature and epsilon."""
        return self.softmax.statistics(step)

    def evaluate(self) -> None:
        """Q(lambda) returns of the rollout, plus what widens the gaps between actions."""
        actions = self.stored(self.memory.actions).long().unsqueeze(2)
        best = self.values.amax(2, keepdim=True)
        gaps = self.values[:-1].gather(2, actions) - best[:-1]
        self.returns = self.returns_of(best) + self.config.advantage_learning * gaps

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the mean squared error of the chosen actions' values, and the signal's loss."""
        rollout = batch.rollout
        valid = ~rollout.reset
        with self._autocast():
            signal_loss, parts = self.signal_loss(batch.replayed)
            x = self._input(rollout.states[:, :-1].flatten(0, 1))
            q = self.qnetwork(x, rollout.previous[:, :-1].flatten())
        q = q.float().unflatten(0, rollout.actions.shape)
        chosen = q.gather(2, rollout.actions.unsqueeze(2))
        loss = 0.5 * masked_mean((chosen - batch.returns).square().squeeze(2), valid)
        parts["loss/q"] = loss.detach()
        parts["q/mean"] = masked_mean(chosen.detach().squeeze(2), valid)
        return loss + signal_loss, parts

    def state_dict(self) -> dict[str, Any]:
        """See `Agent.state_dict`; the temperature is part of it."""
        state = super().state_dict()
        state["agent"]["temperature"] = self.softmax.temperature
        return state

    def load_to_play(self, state: dict[str, Any]) -> None:
        """See `Agent.load_to_play`."""
        super().load_to_play(state)
        self.softmax.temperature = state["agent"]["temperature"]
