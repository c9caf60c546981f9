"""Parallel Q-learning on curiosity: no replay memory, no target network.

Gallici, Fellows, Ellis, Pou, Masmitja, Foerster, Martin: Simplifying Deep Temporal Difference
Learning (2024): Q(lambda) returns of a rollout, learned in a few passes by a network with layer
normalisation, which keeps it stable.

Action values differ by less than a network can tell apart; advantage learning (Baird 1999;
Bellemare et al. 2016, operator T_AL) widens their gaps, as in `icm.agents.dqn`.
"""

from torch import Tensor

from icm.agents.base import Common
from icm.agents.on_policy import Batch, OnPolicy
from icm.agents.policy import ValuePolicy
from icm.config import PQNConfig
from icm.curiosity import MaskedMean
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
        self.qnetwork = qnetwork
        policy = ValuePolicy(agent.policy, agent.warmup_steps)
        heads = qnetwork.linear2.out_features
        super().__init__({"qnetwork": qnetwork}, policy, heads, memory, agent, common)

    def choose(self, states: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Action values, returned twice: `targets_of_rollout` needs those of all actions."""
        with self._autocast():
            q = self.qnetwork(self._input(states), previous).float()
        return q, q

    def targets_of_rollout(self) -> dict[str, Tensor]:
        """Q(lambda) returns, plus the term of advantage learning."""
        actions = self.stored(self.memory.actions).long().unsqueeze(2)
        best = self.values.amax(2, keepdim=True)
        gaps = self.values[:-1].gather(2, actions) - best[:-1]
        intrinsic, extrinsic = self.rewards()
        returns = self.returns_of(intrinsic + extrinsic, best.squeeze(2), self.discount())
        return {"returns": returns.unsqueeze(2) + self.config.advantage_learning * gaps}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the mean squared error of the chosen actions' values, and the signal's loss."""
        rollout = batch.rollout
        mean = MaskedMean(~rollout.reset)
        with self._autocast():
            seen = self._input(batch.replayed.states.flatten(0, 1))
            _, signal_loss, parts = self.signal_loss(seen, batch.replayed)
            x = self._input(rollout.states[:, :-1].flatten(0, 1))
            q = self.qnetwork(x, rollout.previous[:, :-1].flatten())
        q = q.float().unflatten(0, rollout.actions.shape)
        chosen = q.gather(2, rollout.actions.unsqueeze(2))
        loss = 0.5 * mean((chosen - batch.targets["returns"]).square().squeeze(2))
        parts["loss/q"] = loss.detach()
        parts["q/mean"] = mean(chosen.detach().squeeze(2))
        return loss + signal_loss, parts
