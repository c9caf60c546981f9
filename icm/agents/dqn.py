"""Deep Q-learning on curiosity.

Double Q-learning (van Hasselt et al. 2016) with n-step targets (Hessel et al. 2018) and a target
network that follows the learning one as a moving average (Lillicrap et al. 2016, section 3), on the
intrinsic reward of `icm.curiosity`, which is computed with the current ICM whenever transitions are
sampled, never stored.

One action of a tenth of a second hardly changes what the future is worth: the values of different
actions lie closer together than a network can tell apart. Advantage learning (Baird 1999; Bellemare
et al. 2016, operator T_AL) widens the gaps between them and leaves the value of the best alone.

The target network also acts. A few updates of the learning network turn its preferences over
(policy churn, Schaul et al. 2022): what it does while it learns is then no policy that a checkpoint
could keep. Averaged values change slowly.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from icm.agents.policy import MIN_TEMPERATURE, action_probabilities, entropy, scheduled
from icm.compilation import Compiler
from icm.config import AgentConfig, CuriosityConfig
from icm.curiosity import ICM, EpisodicNovelty, ICMErrors, RewardScale, masked_mean
from icm.errors import UserError
from icm.models import InputNorm, Qnetwork, follow
from icm.replay import Replay, Sequences

TEMPERATURE_LR = 0.05  # per vector step: one nat of missing entropy is mended in about 20


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
    reached; and a `reset` slot (the last state of an episode, where nothing is chosen) has the
    value of the state that opens the next episode. So where death is not terminal, dying leads
    back to the start and is worth what the start is worth.

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
    for _ in range(n):
        future = torch.where(truncated, values[:, 1:], returns[:, 1:])
        returns = through_resets(rewards + discount * future.masked_fill(terminal, 0.0))
    return returns[:, :-1]


def bootstraps_at_end(terminal: Tensor, truncated: Tensor, reset: Tensor, n: int) -> Tensor:
    """Which n-step returns use the value of the state after the last slot, bool (B, L)."""
    rewards = torch.zeros(reset.shape, device=reset.device)
    values = F.pad(rewards, (0, 1))
    values[:, -1] = 1.0
    return n_step_targets(rewards, values, terminal, truncated, reset, 1.0, n) > 0


class DQN:
    """The agent: acts, remembers, learns.

    Args:
        qnetwork: action values; its copy is the target network.
        icm: the curiosity module.
        input_norm: turns uint8 states into network input, shared by all networks.
        replay: memory.
        agent: settings of the learner.
        curiosity: settings of the reward.
        device: where networks and updates live.
        bf16: run the networks under bfloat16 autocast.
        compiler: of what is computed in every step.
        seed: of action sampling and replay sampling.
    """

    def __init__(
        self,
        qnetwork: Qnetwork,
        icm: ICM,
        input_norm: InputNorm,
        replay: Replay,
        agent: AgentConfig,
        curiosity: CuriosityConfig,
        device: torch.device,
        bf16: bool,
        compiler: Compiler,
        seed: int,
    ) -> None:
        self.config, self.curiosity = agent, curiosity
        self.device, self.bf16 = device, bf16
        # channels_last: a quarter less time per update on a CPU than the default layout
        self.qnetwork = qnetwork.to(device).to(memory_format=torch.channels_last)
        self.target = copy.deepcopy(self.qnetwork).requires_grad_(False)
        self.icm = icm.to(device).to(memory_format=torch.channels_last)
        self.input_norm = input_norm.to(device)
        self.replay = replay
        self.scale = RewardScale(
            replay.num_envs,
            agent.discount,
            curiosity.reward_half_life / replay.num_envs,
        )
        self.novelty = self.new_novelty(replay.num_envs)
        self._values = compiler(self.values)
        self._errors = compiler(self.errors)
        self._losses = compiler(self.losses)
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(self.qnetwork.parameters()), "lr": agent.lr},
                {"params": [p for p in icm.parameters() if p.requires_grad], "lr": curiosity.lr},
            ],
            fused=True,
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.temperature = 1.0
        self.updates = 0

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network under the name it has in a checkpoint."""
        return {
            "phi": self.icm.phi,
            "target_phi": self.icm.target_phi,
            "fnet": self.icm.fnet,
            "inverse": self.icm.inverse,
            "qnetwork": self.qnetwork,
            "target": self.target,
            "input_norm": self.input_norm,
        }

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _input(self, states: Tensor) -> Tensor:
        """Network input of uint8 states (batch, C, H, W)."""
        return self.input_norm(states).contiguous(memory_format=torch.channels_last)

    # --- acting ---------------------------------------------------------------------------------

    @torch.no_grad()
    def values(self, states: Tensor, previous: Tensor) -> Tensor:
        """Action values that decide what is done, float32 (batch, actions); all on the device."""
        with self._autocast():
            return self.target(self._input(states), previous).float()

    def probabilities(
        self, states: Tensor, previous: Tensor, step: int, greedy: bool = False
    ) -> Tensor:
        """Action probabilities (batch, actions) at an agent step.

        They are uniform during the warm-up, then follow the schedules of temperature and epsilon.

        Args:
            states: uint8 (batch, C, H, W).
            previous: the actions before, int64 (batch,), NO_ACTION at the start of an episode.
            step: agent step.
            greedy: all probability on the best action instead.
        """
        q = self._values(states.to(self.device), previous.to(self.device))
        if greedy:
            return action_probabilities(q, temperature=0.0, epsilon=0.0).cpu()
        return action_probabilities(q, *self.policy_settings(step)).cpu()

    def policy_settings(self, step: int) -> tuple[float, float]:
        """Temperature and epsilon of the policy at an agent step."""
        policy = self.config.policy
        if step < self.config.warmup_steps:
            return self.temperature, 1.0
        if policy.temperature is None:
            return self.temperature, scheduled(policy.epsilon, step)
        return scheduled(policy.temperature, step), scheduled(policy.epsilon, step)

    def _adapt_temperature(self, probabilities: Tensor, step: int) -> None:
        """Move the temperature so that the policy's mean entropy follows its schedule.

        Gradient descent on log(temperature), as for the entropy constraint of soft actor-critic
        (Haarnoja et al. 2018, section 5). So exploration does not depend on the scale of values.
        """
        share = scheduled(self.config.policy.entropy, step)
        target = share * math.log(probabilities.shape[1])
        missing = target - entropy(probabilities).mean().item()
        self.temperature = max(
            MIN_TEMPERATURE, self.temperature * math.exp(TEMPERATURE_LR * missing)
        )

    def act(self, states: Tensor, previous: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Draw one action per state at an agent step; see `probabilities` for the shapes.

        Returns:
            the actions, int64 (batch,), and the policy they were drawn from, (batch, actions).
        """
        probabilities = self.probabilities(states, previous, step)
        if self.config.policy.temperature is None and step >= self.config.warmup_steps:
            self._adapt_temperature(probabilities, step)
        actions = torch.multinomial(probabilities, 1, generator=self.generator).squeeze(1)
        return actions, probabilities

    @torch.no_grad()
    def errors(
        self,
        states: Tensor,
        previous: Tensor,
        actions: Tensor,
        next_states: Tensor,
        probabilities: Tensor,
    ) -> tuple[ICMErrors, Tensor]:
        """What `judge` returns, of tensors on the device."""
        with self._autocast():
            both = self._input(torch.cat((states, next_states)))
            features, next_features = self.icm.encode(both).chunk(2)
            errors = self.icm(features, actions, next_features, probabilities, previous)
            return errors, next_features[:, 1]

    def judge(
        self,
        states: Tensor,
        previous: Tensor,
        actions: Tensor,
        next_states: Tensor,
        probabilities: Tensor,
    ) -> tuple[ICMErrors, Tensor]:
        """The ICM's errors on transitions, and the features (batch, F) that it sees their ends by.

        Shapes as in `observe`.
        """
        self.icm.eval()
        given = (states, previous, actions, next_states, probabilities)
        return self._errors(*(tensor.to(self.device) for tensor in given))

    def new_novelty(self, num_envs: int) -> EpisodicNovelty:
        """The novelty of states in episodes of `num_envs` environments that begin now."""
        features = self.icm.phi.num_features
        return EpisodicNovelty(num_envs, features, self.curiosity.episodic_ridge)

    # --- remembering ----------------------------------------------------------------------------

    @torch.no_grad()
    def observe(
        self,
        states: Tensor,
        previous: Tensor,
        probabilities: Tensor,
        actions: Tensor,
        next_states: Tensor,
        rewards: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        reset: Tensor,
    ) -> dict[str, Tensor]:
        """Store one step of every environment, and judge the ICM on it before it learns from it.

        A transition seen here was never trained on, so its inverse loss is a held-out one.

        Args:
            states, next_states: uint8 (num_envs, C, H, W).
            previous: the actions before, int64 (num_envs,), NO_ACTION at the start of an episode.
            probabilities: the policy the actions were drawn from, (num_envs, actions).
            actions, rewards, terminated, truncated, reset: (num_envs,), see `icm.replay.Sequences`.

        Returns:
            sums over the valid transitions of each statistic, and their number `count`.
        """
        errors, seen = self.judge(states, previous, actions, next_states, probabilities)
        # what follows the last state of an episode opens the next one
        novelty = self.novelty(seen, reset)
        truncated = truncated & ~terminated
        self.replay.add(
            states, actions, probabilities, rewards, terminated, truncated, reset, novelty
        )
        valid = ~reset
        raw = self.icm.reward(errors).cpu() * novelty
        self.scale.update(raw, valid)
        hits = errors.logits.argmax(1).cpu() == actions
        per_env = {
            "reward/intrinsic": self.scale(raw),
            "reward/extrinsic": rewards,
            "icm/inverse_accuracy": hits.float(),
            "icm/inverse_heldout": errors.inverse.cpu(),
            "policy/entropy": entropy(probabilities),
        }
        sums = {name: (value * valid).sum() for name, value in per_env.items()}
        return {**sums, "count": valid.sum()}

    def measure_input(self) -> None:
        """Set the input statistics from the frames in memory (after warm-up: a random agent's)."""
        self.input_norm.measure(self.replay.recent_frames(10_000))

    # --- learning -------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether enough is stored for an update."""
        return self.replay.can_sample(self.config.sequence_length)

    def update(self) -> dict[str, Tensor]:
        """One gradient step.

        Returns:
            the parts of the loss, scalar tensors on the device, so that nothing waits for them.
        """
        config = self.config
        batch = self.replay.sample(config.batch_size, config.sequence_length, self.generator).to(
            self.device
        )
        self.icm.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss, parts = self._losses(batch, self.scale(batch.novelty))
        loss.backward()
        for group in self.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
        self.optimizer.step()
        self.updates += 1
        follow(self.target, self.qnetwork, config.target_tau)
        self.icm.update_target()
        # copies, because the next replay of a CUDA graph writes to the same memory
        return {name: value.clone() for name, value in parts.items()}

    def losses(self, batch: Sequences, worth: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss lambda * L_Q + (1 - beta) L_I + beta L_F (Pathak et al., eq. 7), and its parts.

        Args:
            batch: on the device.
            worth: what the surprise of each transition counts, float32 (B, L): the scaled novelty.
        """
        config = self.config
        size, length = batch.actions.shape
        valid = ~batch.reset
        with self._autocast():
            x = self._input(batch.states.flatten(0, 1))
            features = self.icm.encode(x).unflatten(0, (size, length + 1))
            previous = batch.previous.flatten()
            q = self.qnetwork(x, previous).unflatten(0, (size, length + 1)).float()
            errors = self.icm(
                features[:, :-1].flatten(0, 1),
                batch.actions.flatten(),
                features[:, 1:].flatten(0, 1),
                batch.behaviour.flatten(0, 1),
                batch.previous[:, :-1].flatten(),
            )
            with torch.no_grad():
                target_q = self.target(x, previous).unflatten(0, (size, length + 1)).float()
        surprise = self.icm.reward(errors).view(size, length)
        rewards = self.curiosity.coef * surprise * worth
        rewards = rewards + self.curiosity.extrinsic_coef * batch.rewards

        with torch.no_grad():
            # the online network chooses, the target network judges
            values = target_q.gather(2, q.argmax(2, keepdim=True)).squeeze(2)
            terminal = batch.terminated & config.death_is_terminal
            returns = n_step_targets(
                rewards,
                values,
                terminal,
                batch.truncated,
                batch.reset,
                config.discount,
                config.n_step,
            )
            advantages = target_q[:, :-1].gather(2, batch.actions.unsqueeze(2)).squeeze(2)
            advantages = advantages - values[:, :-1]
            returns = returns + config.advantage_learning * advantages
            # where the sequence breaks off at a death, the start it leads to is not in sight
            blind = (batch.terminated & ~terminal & valid)[:, -1:]
            needs_end = bootstraps_at_end(terminal, batch.truncated, batch.reset, config.n_step)
            learnable = valid & ~(blind & needs_end)
        chosen = q[:, :-1].gather(2, batch.actions.unsqueeze(2)).squeeze(2)
        td_error = F.smooth_l1_loss(chosen, returns, reduction="none")
        q_loss = masked_mean(td_error, learnable)
        loss = config.q_weight * q_loss + self.icm.loss(errors, valid.flatten())
        return loss, {
            "loss/q": q_loss.detach(),
            "loss/forward": masked_mean(errors.forward.detach(), valid.flatten()),
            "loss/inverse": masked_mean(errors.inverse.detach(), valid.flatten()),
            "q/mean": masked_mean(chosen.detach(), valid),
        }

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizer, reward scale and random state; the replay has a file of its own."""
        return {
            "models": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {"adam": self.optimizer.state_dict()},
            "curiosity": self.scale.state_dict(),
            "agent": {
                "updates": self.updates,
                "temperature": self.temperature,
                "generator": self.generator.get_state(),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, in new episodes."""
        self.novelty = self.new_novelty(self.replay.num_envs)
        self.load_networks(state["models"])
        self.optimizer.load_state_dict(state["optimizers"]["adam"])
        for group, lr in zip(
            self.optimizer.param_groups, (self.config.lr, self.curiosity.lr), strict=True
        ):
            group["lr"] = lr  # a resumed run may have another one
        self.scale.load_state_dict(state["curiosity"])
        self.updates = state["agent"]["updates"]
        self.temperature = state["agent"]["temperature"]
        self.generator.set_state(state["agent"]["generator"])

    def load_networks(self, models: dict[str, Any]) -> None:
        """Load the networks alone, as playing needs them.

        Raises:
            UserError: they are missing or of other sizes; nothing has been changed then.
        """
        for name, network in self.networks.items():
            needed = {k: tuple(v.shape) for k, v in network.state_dict().items()}
            found = {k: tuple(v.shape) for k, v in models.get(name, {}).items()}
            for key in needed | found:
                if needed.get(key) != found.get(key):
                    raise UserError(
                        f"{name}.{key} has size {found.get(key, 'none')} where this configuration "
                        f"needs {needed.get(key, 'none')}; use the settings it was trained with"
                    )
        for name, network in self.networks.items():
            network.load_state_dict(models[name])
