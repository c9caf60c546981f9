"""Rollouts of an agent and their statistics."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from icm.agents.base import Agent
from icm.config import Config
from icm.envs import action_count, episodes_in, make_vector_env
from icm.models import NO_ACTION
from icm.uncertainty import standard_error

THRESHOLDS = (200, 400, 600, 948)
"""Pixels; the share of episodes beyond each is reported; 948 is 30 % of level 1-1."""


def rollouts(
    agent: Agent | None, config: Config, step: int, episodes: int, greedy: bool, seed: int
) -> Iterator[dict[str, Any]]:
    """Play whole episodes in parallel environments; yields their statistics as they end.

    Every environment plays a fixed number of episodes: taking the first to finish would favour
    short ones.

    Args:
        agent: the player; None plays uniformly at random.
        config: its settings.
        step: the agent step whose schedules the sampled policy follows.
        episodes: how many.
        greedy: the best action instead of a sampled one.
        seed: of environments and action sampling.
    """
    num_envs = min(episodes, config.env.num_envs)
    left = np.array([episodes // num_envs + (i < episodes % num_envs) for i in range(num_envs)])
    generator = torch.Generator().manual_seed(seed)
    env_config = replace(config.env, num_envs=num_envs)
    envs = make_vector_env(env_config)
    try:
        observations, _ = envs.reset(seed=seed)
        num_actions = action_count(envs.single_action_space)
        uniform = torch.full((num_envs, num_actions), 1.0 / num_actions)
        previous = torch.full((num_envs,), NO_ACTION)
        reset = torch.zeros(num_envs, dtype=torch.bool)
        while left.any():
            states = torch.from_numpy(observations)
            probabilities = (
                agent.probabilities(states, previous, step, greedy) if agent else uniform
            )
            actions = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
            observations, _, terminated, truncated, infos = envs.step(actions.numpy())
            previous = actions.masked_fill(reset, NO_ACTION)  # a reset has opened an episode
            reset = torch.from_numpy(terminated | truncated)
            for i, episode in episodes_in(infos).items():
                left[i] -= 1
                yield episode
            envs.rest(np.flatnonzero(left == 0).tolist())
    finally:
        envs.close()


def summary(episodes: list[dict[str, Any]], policy: str) -> dict[str, Any]:
    """Statistics of a list of episodes, in plain JSON types.

    Keys: `policy`, `episodes`, mean and (of several episodes) standard error of `length` and game
    `reward`; for games with progress also of `distance`, `past_<pixels>` (share of episodes beyond
    it), `flag_rate` and `levels` (all seen).
    """
    result: dict[str, Any] = {"policy": policy, "episodes": len(episodes)}
    for name in ("distance", "length", "reward"):
        values = np.array([float(e[name]) for e in episodes if name in e])
        if len(values):
            result[f"{name}_mean"] = float(values.mean())
        if len(values) > 1:
            result[f"{name}_stderr"] = float(standard_error(values))
    if "distance" in episodes[0]:
        distances = np.array([float(e["distance"]) for e in episodes])
        result |= {f"past_{x}": float((distances > x).mean()) for x in THRESHOLDS}
        result["flag_rate"] = float(np.mean([bool(e["flag"]) for e in episodes]))
        result["levels"] = sorted({level for e in episodes for level in e["levels"].split()})
    return result


def table(summaries: list[dict[str, Any]]) -> str:
    """Summaries side by side, one line per statistic."""
    names = [name for name in summaries[0] if name != "policy" and not name.endswith("_stderr")]
    lines = ["".join([f"{'':16}", *(f" {s['policy']:>17}" for s in summaries)])]
    for name in names:
        cells = []
        for s in summaries:
            value, error = s[name], s.get(name.removesuffix("_mean") + "_stderr")
            if name.endswith("_mean"):
                cells.append(f"{value:.1f}" + ("" if error is None else f" ± {error:.1f}"))
            elif isinstance(value, list):
                cells.append(" ".join(value))
            else:
                cells.append(f"{value:.2f}" if isinstance(value, float) else str(value))
        lines.append("".join([f"{name.removesuffix('_mean'):16}", *(f" {c:>17}" for c in cells)]))
    return "\n".join(lines)
