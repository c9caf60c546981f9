"""Deep Q-learning on curiosity.

Double Q-learning (van Hasselt et al. 2016) with n-step targets (Hessel et al. 2018) and a target
network that follows the learning one as a moving average (Lillicrap et al. 2016, section 3), on the
intrinsic reward of `icm.curiosity`, whose surprise is computed with the current signal whenever
transitions are sampled, never stored.

One action of a tenth of a second hardly changes the return: the values of different actions lie
closer together than a network can tell apart. Advantage learning (Baird 1999; Bellemare et al.
2016, operator T_AL) widens the gaps between them and keeps the value of the best action.

The target network also acts. A few updates of the learning network overturn its preferences
(policy churn, Schaul et al. 2022), so no checkpoint could keep the policy that it would follow
while it learns. Averaged values change slowly.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the usual name)

from icm.agents.base import Agent, Common
from icm.agents.policy import ValuePolicy
from icm.config import DQNConfig
from icm.curiosity import MaskedMean
from icm.device import sent
from icm.models import Qnetwork, soft_update
from icm.replay import Replay, Sequences


def n_step_targets(
    rewards: Tensor,
    values: Tensor,
    terminal: Tensor,
    truncated: Tensor,
    reset: Tensor,
    discount: float,
    n: int,
) -> Tensor:
    """n-step returns of every slot of a sequence, shorter where the sequence ends first.

    G(t, 0) = V(s_t) and G(t, k) = r_t + discount * G(t + 1, k - 1), except:
    a `terminal` transition has no future; a `truncated` one bootstraps at once from the state it
    reached; and a `reset` slot (the last state of an episode, where no action is chosen) has the
    value of the state that opens the next episode. So where death is not terminal, dying leads
    back to the start and has its value.

    Args:
        rewards: float (B, L).
        values: V(s), float (B, L + 1).
        terminal: bool (B, L), transitions after which nothing follows.
        truncated: bool (B, L), see above.
        reset: bool (B, L), see above.
        discount: per agent step.
        n: number of rewards before bootstrapping.

    Returns:
        float (B, L).
    """
    length = rewards.shape[1]
    slots = torch.arange(length, device=rewards.device).expand_as(reset)
    live = torch.where(reset, length, slots).flip(1).cummin(1).values.flip(1)  # first one from here

    def through_resets(returns: Tensor) -> Tensor:  # (B, L) -> (B, L + 1)
        extended = torch.cat((returns, values[:, -1:]), dim=1)
        return torch.cat((extended.gather(1, live), values[:, -1:]), dim=1)

    returns = through_resets(values[:, :-1])
    for _ in range(min(n, length)):
        future = torch.where(truncated, values[:, 1:], returns[:, 1:])
        returns = through_resets(rewards + discount * future.masked_fill(terminal, 0.0))
    return returns[:, :-1]


def bootstraps_at_end(terminal: Tensor, truncated: Tensor, reset: Tensor, n: int) -> Tensor:
    """Which n-step returns use the value of the state after the last slot, bool (B, L)."""
    rewards = torch.zeros(reset.shape, device=reset.device)
    values = F.pad(rewards, (0, 1))
    values[:, -1] = 1.0
    return n_step_targets(rewards, values, terminal, truncated, reset, 1.0, n) > 0


@dataclass
class Batch:
    """What an update learns from, all on the device."""

    sequences: Sequences  # (B, L)
    novelty: Tensor  # of their next states, scaled, float32 (B, L)
    usual: Tensor  # see `Interest.usual`; surprise is recomputed, so known transitions bore


class DQN(Agent[Batch]):
    """Q-learning from a replay memory.

    Args:
        qnetwork: action values; its copy is the target network.
        memory: a replay memory.
        agent: settings of the learner.
        common: everything else.
    """

    config: DQNConfig

    def __init__(
        self, qnetwork: Qnetwork, memory: Replay, agent: DQNConfig, common: Common
    ) -> None:
        self.qnetwork = qnetwork
        self.target = copy.deepcopy(qnetwork).requires_grad_(False)
        networks = {"qnetwork": self.qnetwork, "target": self.target}
        policy = ValuePolicy(agent.policy, agent.warmup_steps)
        super().__init__(networks, policy, memory, agent, common)

    def choose(self, states: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Action values of the target network, and the greatest of each state."""
        with self._autocast():
            q = self.target(self._input(states), previous).float()
        return q, q.amax(1, keepdim=True)

    def due(self, step: int) -> int:
        """One update per `agent.steps_per_update` agent steps, once enough is stored."""
        if not self.can_learn(step):
            return 0
        per_update = self.config.steps_per_update
        return step // per_update - (step - self.num_envs) // per_update

    def update(self) -> dict[str, Tensor]:
        """See `Agent.update`."""
        config = self.config
        drawn = self.memory.sample(config.batch_size, config.sequence_length, self.generator)
        return self.descend(
            Batch(
                sequences=drawn.to(self.device),
                novelty=sent(self.scale(drawn.novelty), self.device),
                usual=sent(self.interest.usual(), self.device),
            )
        )

    def update_targets(self) -> None:
        """See `Agent.update_targets`."""
        super().update_targets()
        soft_update(self.target, self.qnetwork, self.config.target_tau)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """lambda * L_Q + (1 - beta) L_I + beta L_F (Pathak et al. 2017, eq. 7), and its parts."""
        config, sequences = self.config, batch.sequences
        size, length = sequences.actions.shape
        valid = ~sequences.reset
        with self._autocast():
            x = self._input(sequences.states.flatten(0, 1))
            previous = sequences.previous.flatten()
            q = self.qnetwork(x, previous).unflatten(0, (size, length + 1)).float()
            errors, signal_loss, parts = self.signal_loss(x, sequences)
            with torch.no_grad():
                target_q = self.target(x, previous).unflatten(0, (size, length + 1)).float()
        surprise = errors.surprise.view(size, length)
        rewards = self.curiosity.coef * self.interest(surprise, batch.usual) * batch.novelty
        rewards = rewards + self.curiosity.extrinsic_coef * sequences.rewards

        with torch.no_grad():
            # the online network chooses, the target network judges
            values = target_q.gather(2, q.argmax(2, keepdim=True)).squeeze(2)
            terminal = sequences.terminated & config.death_is_terminal
            returns = n_step_targets(
                rewards,
                values,
                terminal,
                sequences.truncated,
                sequences.reset,
                config.discount,
                config.n_step,
            )
            advantages = target_q[:, :-1].gather(2, sequences.actions.unsqueeze(2)).squeeze(2)
            advantages = advantages - values[:, :-1]
            returns = returns + config.advantage_learning * advantages
            learnable = valid
            # where a sequence ends with a death, the start that this leads to may be missing; with
            # sequences of one step, no death would be learned
            if not config.death_is_terminal and length > 1:
                needs_end = bootstraps_at_end(
                    terminal, sequences.truncated, sequences.reset, config.n_step
                )
                blind = (sequences.terminated & valid)[:, -1:]
                learnable = valid & ~(blind & needs_end)
        chosen = q[:, :-1].gather(2, sequences.actions.unsqueeze(2)).squeeze(2)
        td_error = F.smooth_l1_loss(chosen, returns, reduction="none")
        q_loss = MaskedMean(learnable)(td_error)
        parts["loss/q"] = q_loss.detach()
        parts["q/mean"] = MaskedMean(valid)(chosen.detach())
        return config.q_weight * q_loss + signal_loss, parts
