"""Proximal policy optimisation on curiosity.

Schulman, Wolski, Dhariwal, Radford, Klimov: Proximal Policy Optimization Algorithms (2017), the
learner of Burda et al. 2018. A rollout is learned while the next one is made, so its data is up to
one rollout old; the ratio is to the policy that acted, whose probabilities are stored.
"""

import torch
from torch import Tensor

from icm.agents.base import Common
from icm.agents.on_policy import Batch, OnPolicy
from icm.agents.policy import LogitPolicy
from icm.config import PPOConfig
from icm.curiosity import MaskedMean
from icm.models import ActorCritic
from icm.replay import Replay


class PPO(OnPolicy):
    """Policy gradient with a clipped ratio.

    Args:
        actor_critic: policy and value.
        memory: a replay memory.
        agent: settings of the learner.
        common: everything else.
    """

    config: PPOConfig

    def __init__(
        self, actor_critic: ActorCritic, memory: Replay, agent: PPOConfig, common: Common
    ) -> None:
        self.actor_critic = actor_critic
        policy = LogitPolicy(agent.warmup_steps)
        heads = actor_critic.value.out_features
        super().__init__({"actor_critic": actor_critic}, policy, heads, memory, agent, common)

    def choose(self, states: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the policy and the values."""
        with self._autocast():
            logits, values = self.actor_critic(self._input(states), previous)
        return logits.float(), values.float()

    def targets_of_rollout(self) -> dict[str, Tensor]:
        """Returns, and normalised advantages over the values at the time of acting.

        If the game's reward is learned too, it has its own discount and value head (Burda et al.
        2018b, section 2.3), and both advantages are added.
        """
        rewards, values = self.rewards(), self.values.unbind(2)
        discounts = self.discount(), self.config.extrinsic_discount
        returns = torch.stack(
            [self.returns_of(rewards[h], values[h], discounts[h]) for h in range(len(values))], 2
        )
        advantages = (returns - self.values[:-1]).sum(2)
        valid = advantages[~self.stored(self.memory.reset)]
        if len(valid) > 1:  # one has no deviation
            advantages = (advantages - valid.mean()) / (valid.std() + 1e-8)
        return {"returns": returns, "advantages": advantages}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """L_CLIP - c_1 L_VF + c_2 S of the paper's eq. 9, negated, and the signal's loss."""
        config = self.config
        rollout = batch.rollout
        mean, shape = MaskedMean(~rollout.reset), rollout.actions.shape
        with self._autocast():
            seen = self._input(batch.replayed.states.flatten(0, 1))
            _, signal_loss, parts = self.signal_loss(seen, batch.replayed)
            x = self._input(rollout.states[:, :-1].flatten(0, 1))
            logits, values = self.actor_critic(x, rollout.previous[:, :-1].flatten())
        log_policy = logits.float().log_softmax(1).unflatten(0, shape)
        values = values.float().unflatten(0, shape)
        chosen = rollout.actions.unsqueeze(2)
        log_ratio = log_policy.gather(2, chosen) - rollout.behaviour.gather(2, chosen).log()
        log_ratio = log_ratio.squeeze(2)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        advantages, returns = batch.targets["advantages"], batch.targets["returns"]
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        policy_loss = -mean(gain)
        value_loss = mean((values - returns).square().sum(2))
        entropy = mean(-(log_policy.exp() * log_policy).sum(2))
        loss = policy_loss + config.value_coef * value_loss - config.entropy_coef * entropy
        with torch.no_grad():
            parts |= {
                "loss/policy": policy_loss.detach(),
                "loss/value": value_loss.detach(),
                "policy/kl": mean(ratio - 1 - log_ratio).detach(),
                "policy/clipped": mean((ratio != clipped).float()).detach(),
                "value/mean": mean(values.sum(2)).detach(),
            }
        return loss + signal_loss, parts
