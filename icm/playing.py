"""A checkpoint at play, one agent step at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from icm import checkpoint
from icm.agents.base import Agent
from icm.config import Config, GameConfig, parse_config
from icm.envs import action_count, action_names, make_env
from icm.envs.mario import CELL
from icm.envs.wrappers import Env
from icm.factory import build_agent
from icm.models import NO_ACTION


@dataclass
class Moment:
    """One agent step as the agent experienced it.

    frames: of the game, RGB uint8 (H, W, 3), if somebody watches.
    state: what it saw, uint8 (C, H, W).
    probabilities: of its actions, (actions,).
    action: the one that was taken.
    surprise: raw surprise of what followed.
    reward: scaled intrinsic reward of it.
    guess: action probabilities of the inverse model, (actions,); None if there is none.
    where: the place, in words.
    episode: if it ended, its `length`, `distance` and so on, its `game_reward` and, scaled and
        summed, `intrinsic_reward`.
    """

    frames: list[np.ndarray]
    state: np.ndarray
    probabilities: np.ndarray
    action: int
    surprise: float
    reward: float
    guess: np.ndarray | None
    where: str
    episode: dict[str, Any] | None


def load_agent(path: Path, device: torch.device, game: GameConfig) -> tuple[Agent, Config, int]:
    """Rebuild the agent of a checkpoint for playing: the agent, its settings, its agent step.

    Args:
        path: the checkpoint.
        device: where to compute.
        game: replacements for settings of its environment. Its libretro core is never the one that
            the checkpoint names: that is a program, and of the machine it was trained on.

    Raises:
        UserError: the file is no checkpoint, or its networks do not fit its settings or the game.
    """
    content = checkpoint.load(path)
    with checkpoint.restoring(path):
        changes = {name: value for name, value in vars(game).items() if value is not None}
        content["config"]["env"] |= {"core": "auto"} | changes
        config = parse_config(OmegaConf.create(content["config"]))
        env = make_env(config.env)
        shape: Any = env.observation_space.shape
        agent = build_agent(config, shape, action_count(env.action_space), device, remember=False)
        env.close()
        agent.load_to_play(content)
        return agent, config, content["step"]


class Player:
    """Plays the game of an agent in one environment; a context manager.

    Args:
        agent: acts, and judges what happens.
        config: its settings.
        step: the agent step whose schedules it follows.
        greedy: the best action instead of a sampled one.
        seed: of action sampling; episode k has the seed `seed` + k.
        is_watched: whether moments have frames.
    """

    def __init__(
        self, agent: Agent, config: Config, step: int, greedy: bool, seed: int, is_watched: bool
    ) -> None:
        self.greedy, self.seed = greedy, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.frames: list[np.ndarray] = []  # of the running agent step
        if is_watched:
            self.env = make_env(config.env, "rgb_array", self._keep)
        else:
            self.env = make_env(config.env)
        self.actions = action_names(self.env)
        self.take(agent, step)

    def take(self, agent: Agent, step: int) -> None:
        """Let another agent of the same game go on; its life begins now."""
        self.agent, self.step = agent, step
        self.novelty = agent.new_novelty(1)

    def begin(self, number: int) -> None:
        """Begin episode `number`."""
        self.opened_with = self.seed + number
        observation, _ = self.env.reset(seed=self.opened_with)
        self.state = torch.from_numpy(observation).unsqueeze(0)
        self.previous = torch.tensor([NO_ACTION])
        self._see(self.agent.novelty_features(self.state.to(self.agent.device)), True, False)
        self.intrinsic = 0.0
        self.frames.clear()

    def move(self, action: int | None = None) -> Moment:
        """Play an agent step, with the agent's action, or with another."""
        agent, state, previous = self.agent, self.state, self.previous
        probabilities = agent.probabilities(state, previous, self.step, self.greedy)
        if action is None:
            action = int(torch.multinomial(probabilities, 1, generator=self.generator))
        observation, _, _, _, info = self.env.step(action)
        next_state, taken = torch.from_numpy(observation).unsqueeze(0), torch.tensor([action])
        # the inverse model is told the policy, as in training, even if play is greedy
        policy = agent.probabilities(state, previous, self.step) if self.greedy else probabilities
        errors, places = agent.judge(state, previous, taken, next_state, policy)
        episode = info.get("episode")
        respawned = info.get("respawned", False)
        novelty = self._see(places, respawned, respawned)
        reward = float(agent.scale(agent.worth(errors.surprise.cpu(), novelty)))
        self.intrinsic += reward
        self.state, self.previous = next_state, taken
        if episode is not None:
            rewards = {"game_reward": episode.pop("reward"), "intrinsic_reward": self.intrinsic}
            episode = {**episode, "seed": self.opened_with, **rewards}
        frames = self.frames.copy()
        self.frames.clear()
        return Moment(
            frames=frames,
            state=state[0].numpy(),
            probabilities=probabilities[0].numpy(),
            action=action,
            surprise=float(errors.surprise),
            reward=reward,
            guess=None if errors.logits is None else errors.logits[0].softmax(0).cpu().numpy(),
            where=where(info),
            episode=episode,
        )

    def _see(self, places: Tensor, opens: bool, respawned: bool) -> Tensor:
        """How new a state is, see `EpisodicNovelty`."""
        return self.novelty(places, torch.tensor([opens]), torch.tensor([respawned]))

    def play(self, episodes: int) -> Iterator[Moment]:
        """Play whole episodes."""
        for number in range(episodes):
            self.begin(number)
            while (moment := self.move()).episode is None:
                yield moment
            yield moment

    def _keep(self, env: Env) -> None:
        self.frames.append(np.array(env.render()))

    def __enter__(self) -> "Player":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the game."""
        self.env.close()


def where(info: dict[str, Any]) -> str:
    """The place that a step has led to, in words; empty if unknown."""
    if "cell" not in info:
        return ""
    world, stage, _, x, _ = info["cell"].tolist()
    return f"{world}-{stage}, {x * CELL} pixels"
