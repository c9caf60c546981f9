"""Common to all learners: acting, judging transitions by curiosity, and saving."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from icm.agents.policy import Policy, entropy
from icm.collectives import all_rows, average_, gathered, own
from icm.compilation import Compiler
from icm.config import AgentConfig, CuriosityConfig
from icm.curiosity import (
    EpisodicNovelty,
    Errors,
    Interest,
    RewardScale,
    Signal,
    random_features,
)
from icm.device import sent
from icm.errors import UserError
from icm.models import InputNorm, Phi, contrast_normalised
from icm.ranks import WORLD_SIZE
from icm.replay import Replay, Sequences

MOST_STEPS_SKIPPED = 50  # optimizer steps skipped in a row at which training is given up


class BrokenDownError(UserError):
    """The agent's numbers are not finite, and will not recover."""


@dataclass(kw_only=True)
class Common:
    """What an agent of any kind is built from.

    signal: the curiosity signal.
    novelty_phi: encoder whose features tell new states from known ones; it is never trained. None:
        every state is new.
    input_norm: turns uint8 states into network input, shared by all networks.
    curiosity: settings of the reward.
    num_envs: environments that it acts in, in parallel.
    device: where networks and updates live.
    bf16: run the networks under bfloat16 autocast.
    compiler: compiles what each step computes.
    seed: of action sampling and of drawing from memory.
    total_steps: agent steps of the whole run.
    """

    signal: Signal
    novelty_phi: Phi | None
    input_norm: InputNorm
    curiosity: CuriosityConfig
    num_envs: int
    device: torch.device
    bf16: bool
    compiler: Compiler
    seed: int
    total_steps: int


class Agent[Batch](ABC):
    """Acts, observes and learns from one `Batch` per update.

    A subclass defines its preferences (`choose`) and its learning (`due`, `update`, `losses`).

    Args:
        networks: the learner's own, by their names in a checkpoint; trainable ones have the
            learning rate `agent.lr`.
        policy: turns preferences into probabilities.
        memory: replay memory.
        agent: settings of the learner.
        common: everything else.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        policy: Policy,
        memory: Replay,
        agent: AgentConfig,
        common: Common,
    ) -> None:
        signal, curiosity, num_envs = common.signal, common.curiosity, common.num_envs
        device, compiler = common.device, common.compiler
        self.config, self.curiosity, self.num_envs = agent, curiosity, num_envs
        self.device, self.bf16 = device, common.bf16
        # channels_last: a quarter less time per update on a CPU than the default layout
        for network in networks.values():
            network.to(device).to(memory_format=torch.channels_last)
        self.signal = signal.to(device).to(memory_format=torch.channels_last)
        self.input_norm = common.input_norm.to(device)
        self.networks = {**signal.networks, **networks, "input_norm": self.input_norm}
        self.novelty_phi = common.novelty_phi
        if self.novelty_phi is not None:
            self.novelty_phi.to(device).to(memory_format=torch.channels_last).requires_grad_(False)
            self.networks["novelty_phi"] = self.novelty_phi
        self.policy, self.memory = policy, memory
        half_life = curiosity.reward_half_life / num_envs
        self.interest = Interest(curiosity.surprise_limit, half_life)
        self.scale = RewardScale(num_envs, half_life)
        self.novelty = self.new_novelty(num_envs)
        self.encoded: list[Tensor] = []  # this rank's latest next states, and their features
        self._choose = compiler(self.choose)
        self._errors = compiler(self.errors)
        self._losses = compiler(self.loss_and_parts, alone=False)
        is_whole = WORLD_SIZE == 1  # ranks exchange gradients between loss and step
        # by whether a batch begins and whether it completes an optimizer step
        self._steps: dict[tuple[bool, bool], Callable[[Batch], tuple[list[str], Tensor]]] = {}
        for begins in (True, False):
            for completes in (True, False):
                step = partial(self.gradient_step, begins, completes)
                self._steps[begins, completes] = compiler.recorded(step) if is_whole else step
        self.learning = nn.ModuleList(networks.values()), signal
        self.total_steps = common.total_steps
        # two, because a step may be observed before or after the next actions are drawn
        drawn, acted = np.random.SeedSequence(common.seed).generate_state(2).tolist()
        self.generator = torch.Generator().manual_seed(drawn)
        self.action_generator = torch.Generator().manual_seed(acted)
        self.learn_from = agent.warmup_steps
        self.updates = 0
        self.learned_steps = 0.0  # agent steps that these updates account for
        self.waiting = 0  # batches whose gradients are accumulated for the next optimizer step
        self.skipped = torch.zeros((), device=device)  # non-finite optimizer steps
        self.skipped_running = torch.zeros((), device=device)  # of these, the latest in a row

    @cached_property
    def optimizer(self) -> torch.optim.Adam:
        """Adam for what learns, in two groups; `descend` sets their learning rates.

        Created on first use: a process's first optimizer imports PyTorch's compiler, which takes
        three seconds, and playing needs none.
        """
        groups = [[p for p in of.parameters() if p.requires_grad] for of in self.learning]
        rate = partial(torch.zeros, (), device=self.device)  # a tensor, to be set within a graph
        return torch.optim.Adam(
            [{"params": parameters, "lr": rate()} for parameters in groups],
            fused=True,
            capturable=self.device.type == "cuda",
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _sent(self, *tensors: Tensor) -> Iterator[Tensor]:
        return (sent(tensor, self.device) for tensor in tensors)

    def _input(self, states: Tensor) -> Tensor:
        """Network input of uint8 states (batch, C, H, W)."""
        return self.input_norm(states).contiguous(memory_format=torch.channels_last)

    # --- acting ---------------------------------------------------------------------------------

    @abstractmethod
    def choose(self, states: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Action preferences and values of states, on the device.

        Args:
            states: uint8 (batch, C, H, W).
            previous: previous actions, int64 (batch,), NO_ACTION at the start of an episode.

        Returns:
            logits or action values, float32 (batch, actions), and values, float32 (batch, heads).
        """

    @torch.no_grad()
    def probabilities(
        self, states: Tensor, previous: Tensor, step: int, greedy: bool = False
    ) -> Tensor:
        """Action probabilities (batch, actions) at an agent step, on the CPU.

        They are uniform during the warm-up.

        Args:
            states: uint8 (batch, C, H, W).
            previous: previous actions, int64 (batch,), NO_ACTION at the start of an episode.
            step: agent step.
            greedy: all probability on the best action instead.

        Raises:
            BrokenDownError: they are not finite.
        """
        preferences, _ = self._choose(*self._sent(states, previous))
        return self._probabilities(preferences, step, greedy)

    def _probabilities(self, preferences: Tensor, step: int, greedy: bool) -> Tensor:
        probabilities = self.policy(preferences, step, greedy).cpu()
        if not probabilities.isfinite().all():
            raise BrokenDownError("the policy is not finite")
        return probabilities

    @torch.no_grad()
    def act(self, states: Tensor, previous: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw one action per state at an agent step; see `probabilities` for the shapes.

        Returns:
            the actions, int64 (batch,); the policy they were drawn from, (batch, actions); and the
            values of the states, (batch, heads).

        Raises:
            BrokenDownError: the policy is not finite.
        """
        given = self._sent(own(states), own(previous))
        preferences, values = gathered(self._choose(*given))
        probabilities = self._probabilities(preferences, step, False)
        self.policy.adapt(probabilities, step)
        actions = torch.multinomial(probabilities, 1, generator=self.action_generator).squeeze(1)
        return actions, probabilities, values.cpu()

    @torch.no_grad()
    def errors(
        self,
        features: Tensor,
        previous: Tensor,
        actions: Tensor,
        next_states: Tensor,
        probabilities: Tensor,
    ) -> tuple[Errors, Tensor, Tensor]:
        """`judge` for tensors on the device; also returns the features of the next states."""
        next_features = self.encode(next_states)
        with self._autocast():
            errors = self.signal(features, actions, next_features, probabilities, previous)
            return errors, self.novelty_features(next_states), next_features

    @torch.no_grad()
    def encode(self, states: Tensor) -> Tensor:
        """The signal's features of uint8 states (batch, C, H, W) on the device."""
        with self._autocast():
            return self.signal.encode(self._input(states))

    def judge(
        self,
        states: Tensor,
        previous: Tensor,
        actions: Tensor,
        next_states: Tensor,
        probabilities: Tensor,
    ) -> tuple[Errors, Tensor]:
        """The signal's errors on transitions, and `novelty_features` of the next states.

        Shapes as in `observe`. If `states` are the next states of the previous call, their
        features are reused: those of phi before its latest updates.
        """
        self.signal.eval()
        states, next_states = own(states), own(next_states)
        if self.encoded and torch.equal(self.encoded[0], states):
            features = self.encoded[1]
        else:
            features = self.encode(*self._sent(states))
        given = own(previous), own(actions), next_states, own(probabilities)
        errors, places, next_features = self._errors(features, *self._sent(*given))
        # a copy, because the next replay of a CUDA graph writes to the same memory
        self.encoded = [next_states, next_features.clone()]
        found = {name: value for name, value in vars(errors).items() if value is not None}
        *whole, places = gathered([*found.values(), places])
        return Errors(**dict(zip(found, whole, strict=True))), places

    def novelty_features(self, states: Tensor) -> Tensor:
        """Features (batch, F) of uint8 states (batch, C, H, W), to measure novelty by.

        F is 0 if every state counts as new.
        """
        if self.novelty_phi is None:
            return torch.empty((len(states), 0), device=states.device)
        x = contrast_normalised(states).contiguous(memory_format=torch.channels_last)
        return random_features(self.novelty_phi, x)

    def new_novelty(self, num_envs: int) -> EpisodicNovelty:
        """A novelty measure for `num_envs` environments, with lives that begin now."""
        size = 0 if self.novelty_phi is None else self.novelty_phi.num_features
        return EpisodicNovelty(num_envs, size, self.curiosity.episodic_scale, self.device)

    def worth(self, surprise: Tensor, novelty: Tensor) -> Tensor:
        """Raw intrinsic rewards from surprise and novelty, (batch,) on the CPU."""
        return self.interest(surprise, self.interest.usual()) * novelty

    # --- remembering ----------------------------------------------------------------------------

    @torch.no_grad()
    def observe(
        self,
        states: Tensor,
        previous: Tensor,
        probabilities: Tensor,
        values: Tensor,
        actions: Tensor,
        next_states: Tensor,
        rewards: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        reset: Tensor,
        respawned: Tensor,
        origin: Tensor,
        undone: Tensor,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Store a step of every environment; the signal is evaluated on it before learning from it.

        A transition seen here was never trained on, so its inverse loss is a held-out one.

        Args:
            states, next_states: uint8 (num_envs, C, H, W).
            previous: previous actions, int64 (num_envs,), NO_ACTION at the start of an episode.
            probabilities, values: as `act` returned them.
            actions, rewards, terminated, truncated, reset: (num_envs,), see `icm.replay.Sequences`.
            respawned: bool (num_envs,), whether a life was lost and the game has gone on: the next
                state, of a new life or after the last, does not follow from the action, so it is
                not rewarded, and its surprise is not learned.
            origin: int64 (num_envs,), if a reset opens an episode that continues an environment's,
                the number of that, else -1. The life goes on, and remembers what it saw.
            undone: int64 (num_envs,), how many of that environment's latest actions are undone.

        Returns:
            statistics, each over the transitions it applies to, (transitions,); and the surprise of
            each transition, (num_envs,) on the CPU, nan at resets and respawns.
        """
        errors, places = self.judge(states, previous, actions, next_states, probabilities)
        # what follows the last state of an episode opens the next one
        opens = reset & (origin < 0) | respawned & ~truncated
        self.novelty.inherit(origin, undone)
        novelty = self.novelty(places, opens, respawned)
        surprise = errors.surprise.cpu()
        valid = ~reset
        judged = valid & ~respawned
        self.interest.update(surprise[judged])
        raw = self.worth(surprise, novelty)
        self.scale.update(raw, valid, self.discount())
        self.remember(
            values,
            raw,
            states=states,
            behaviour=probabilities,
            actions=actions,
            rewards=rewards,
            terminated=terminated,
            truncated=truncated & ~terminated,
            reset=reset,
            novelty=novelty,
        )
        undecided = entropy(probabilities)
        samples = {
            "reward/intrinsic": self.scale(raw)[valid],
            "reward/extrinsic": rewards[valid],
            "policy/entropy": undecided[valid],
        }
        if errors.logits is not None and errors.inverse is not None:
            hits = errors.logits.argmax(1).cpu() == actions
            inverse = errors.inverse.cpu()
            samples["icm/inverse_accuracy"] = hits[judged].float()
            samples["icm/inverse_heldout"] = inverse[judged]
            # not the entropy, the mean of -log p: the gain would vary more
            chosen = probabilities.gather(1, actions.unsqueeze(1)).squeeze(1)
            samples["icm/inverse_gain"] = (-chosen.log() - inverse)[judged]
        return samples, surprise.masked_fill(~judged, torch.nan)

    def remember(self, values: Tensor, raw: Tensor, **step: Tensor) -> None:
        """Keep one step of every environment: arguments of `Replay.add`, values, raw rewards."""
        self.memory.add(**step)

    def measure_input(self) -> None:
        """Set the input statistics from the frames in memory (after warm-up: a random agent's)."""
        self.input_norm.measure(self.memory.recent_frames(10_000))
        self.encoded = []

    def begin_lives(self) -> None:
        """Begin new episodes in all environments."""
        self.novelty = self.new_novelty(self.num_envs)
        self.memory.cut()

    def forget(self, step: int) -> None:
        """Begin without memory at an agent step: a resumed run whose memory is lost."""
        self.learn_from = step + self.config.warmup_steps

    # --- learning -------------------------------------------------------------------------------

    def can_learn(self, step: int) -> bool:
        """Whether the warm-up is over by an agent step, and enough is remembered."""
        return step >= self.learn_from and self.memory.can_sample(self.config.sequence_length)

    @abstractmethod
    def due(self, step: int) -> int:
        """Updates to make during the step that starts at agent step `step`."""

    @abstractmethod
    def update(self) -> dict[str, Tensor]:
        """Learn from one batch, see `descend`.

        Returns:
            the parts of the loss, scalar tensors on the device, so that nothing waits for them.
        """

    @abstractmethod
    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch on the device, and its parts."""

    def loss_and_parts(self, batch: Batch) -> tuple[Tensor, list[str], Tensor]:
        """What `losses` returns, with the parts as names and one tensor (parts,).

        As separate tensors, a part that equals the loss (without curiosity) would be the same
        tensor as the loss to the compiler (PyTorch 2.15), and the loss would have no gradient.
        """
        loss, parts = self.losses(batch)
        return loss, list(parts), torch.stack(list(parts.values()))

    def signal_loss(self, x: Tensor, batch: Sequences) -> tuple[Errors, Tensor, dict[str, Tensor]]:
        """The signal on sequences with network inputs x (B * (L + 1), C, H, W).

        Returns:
            its errors on their transitions, (B * L,) each; its loss; and the loss's parts.
        """
        features = self.signal.encode(x).unflatten(0, batch.previous.shape)
        errors = self.signal(
            features[:, :-1].flatten(0, 1),
            batch.actions.flatten(),
            features[:, 1:].flatten(0, 1),
            batch.behaviour.flatten(0, 1),
            batch.previous[:, :-1].flatten(),
        )
        learnable = ((batch.novelty > 0) & ~batch.reset).flatten()
        return errors, *self.signal.loss(errors, learnable)

    def discount(self) -> float:
        """Current intrinsic discount, per agent step."""
        return self.config.discount

    def learning_rate(self) -> float:
        """Current rate of the learner's networks: linear from `lr` to `lr * lr_final`.

        By the agent steps that updates cover; the warm-up has none, so it ends a bit higher.
        """
        done = min(self.learned_steps / self.total_steps, 1.0)
        return self.config.lr * (1 - done * (1 - self.config.lr_final))

    def descend(self, batch: Batch) -> dict[str, Tensor]:
        """Learn from a batch for `losses`; return the parts of the loss.

        Every `accumulate`-th batch makes an optimizer step. If loss or gradients are not finite,
        no trainable weights change.
        """
        learner, signal = self.optimizer.param_groups
        learner["lr"].fill_(self.learning_rate())
        signal["lr"].fill_(self.curiosity.lr)
        self.signal.train()
        begins = self.waiting == 0
        self.waiting = (self.waiting + 1) % self.config.accumulate
        names, parts = self._steps[begins, self.waiting == 0](batch)
        self.updates += 1
        self.learned_steps += self.config.steps_between_updates
        # a copy, because the next replay of a CUDA graph writes to the same memory
        return dict(zip(names, parts.clone(), strict=True))

    def gradient_step(
        self, begins: bool, completes: bool, batch: Batch
    ) -> tuple[list[str], Tensor]:
        """The device part of `descend`; returns names and values (parts,) of loss parts.

        Args:
            begins: whether the batch is the first of those whose gradients are averaged.
            completes: whether it is the last of them.
            batch: see `losses`.
        """
        count = self.config.accumulate
        if begins:
            # what CUDA graphs add to must stay in place
            self.optimizer.zero_grad(set_to_none=count == 1)
        loss, names, parts = self._losses(batch)
        loss.backward()
        loss = loss.detach()
        gradients = [p.grad for p in self.learned if p.grad is not None]
        average_([*(gradients if completes else ()), loss, parts])
        if not completes:
            return names, parts
        if count > 1:
            torch._foreach_div_(gradients, count)
        # without curiosity, a group has no parameters, and its norm would be on the CPU
        groups = [group["params"] for group in self.optimizer.param_groups]
        norms = [nn.utils.clip_grad_norm_(g, self.config.max_grad_norm) for g in groups if g]
        finite = torch.stack((loss, *norms)).isfinite().all()
        # as `torch.amp.GradScaler` lets a fused optimizer skip a step, on its device: nothing waits
        skipped = 1.0 - finite.float()
        self.optimizer.found_inf = skipped  # pyrefly: ignore[missing-attribute]
        self.optimizer.step()
        self.skipped += skipped
        self.skipped_running.add_(skipped).mul_(skipped)
        self.update_targets()
        return names, parts

    def update_targets(self) -> None:
        """Update averaged weights after an optimizer step."""
        self.signal.update_target()

    def check_updates(self) -> None:
        """Check whether optimizer steps keep failing; waits for the device.

        Raises:
            BrokenDownError: they do.
        """
        if (skipped := int(self.skipped_running.item())) >= MOST_STEPS_SKIPPED:
            raise BrokenDownError(
                f"loss or gradients of the last {skipped} steps of the optimizer were not finite"
            )

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizer, reward scale and random state; the memory has a file of its own."""
        return {
            "models": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {"adam": self.optimizer.state_dict()},
            "curiosity": {
                "scale": self.scale.state_dict(),
                "surprise": self.interest.moments.state_dict(),
            },
            "agent": {
                "updates": self.updates,
                "learned_steps": self.learned_steps,
                "skipped": self.skipped,
                "learn_from": self.learn_from,
                "generator": self.generator.get_state(),
                "action_generator": self.action_generator.get_state(),
                "waiting": self.waiting,
                "gradients": self.waiting_gradients(),
                "encoded": [all_rows(tensor.cpu()) for tensor in self.encoded],
                **self.policy.state_dict(),
            },
        }

    def waiting_gradients(self) -> list[Tensor | None]:
        """Gradients of all that learns, while an optimizer step awaits more batches."""
        if self.waiting == 0:
            return []
        gradients = [None if p.grad is None else p.grad.clone() for p in self.learned]
        average_([gradient for gradient in gradients if gradient is not None])
        return gradients

    @property
    def learned(self) -> list[nn.Parameter]:
        """All parameters that learn."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave; generators missing from it stay as they are.

        Raises:
            Exception: of any kind, if this is no such state.
        """
        self.load_to_play(state)
        # its settings stay those of this run
        groups = self.optimizer.state_dict()["param_groups"]
        moments = state["optimizers"]["adam"]["state"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for parameter, its in self.optimizer.state.items():
            # the optimizer does not check: it would read and write beyond a smaller one
            if not its["exp_avg"].shape == its["exp_avg_sq"].shape == parameter.shape:
                raise ValueError("the optimizer's moments do not fit the networks")
        agent = state["agent"]
        self.updates, self.learned_steps = agent["updates"], agent["learned_steps"]
        self.learn_from = agent["learn_from"]
        self.skipped.copy_(agent["skipped"])
        for name in ("generator", "action_generator"):
            if name in agent:
                getattr(self, name).set_state(agent[name])
        encoded = agent["encoded"]
        if encoded and len(encoded[0]) == self.num_envs:
            self.encoded = [own(encoded[0]), own(encoded[1]).to(self.device)]
        # if too many for a smaller `accumulate`, these batches are lost
        self.waiting = agent["waiting"] if agent["waiting"] < self.config.accumulate else 0
        if self.waiting:
            for parameter, gradient in zip(self.learned, agent["gradients"], strict=True):
                parameter.grad = None if gradient is None else gradient.to(self.device)

    def load_to_play(self, state: dict[str, Any]) -> None:
        """Load only what acting and judging need."""
        self.load_networks(state["models"])
        self.scale.load_state_dict(state["curiosity"]["scale"])
        self.interest.moments.load_state_dict(state["curiosity"]["surprise"])
        self.policy.load_state_dict(state["agent"])

    def memory_dict(self) -> dict[str, Any]:
        """The memory, and what the running lives have seen."""
        return {**self.memory.state_dict(), "lives": self.novelty.state_dict()}

    def load_memory(self, state: dict[str, Any]) -> None:
        """Restore what `memory_dict` gave."""
        self.memory.load_state_dict(state)
        self.novelty.load_state_dict(state["lives"])

    def load_networks(self, models: dict[str, Any]) -> None:
        """Load only the networks.

        Raises:
            UserError: some are missing, of other sizes or not finite; nothing has changed then.
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
            for key, value in models[name].items():
                if not value.isfinite().all():
                    raise UserError(f"{name}.{key} is not finite; take an older checkpoint")
        for name, network in self.networks.items():
            network.load_state_dict(models[name])
