"""Speed of emulators and environments, without an agent. Nothing here imports torch."""

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from nes_py import NESEnv

from icm.bench.apart import Measure, apart
from icm.config import EnvConfig
from icm.envs import action_count, make_env, make_vector_env
from icm.envs.wrappers import Env, GreyImage
from icm.errors import UserError

RIGHT_WITH_A_AND_B = (0x80, 0x81, 0x82, 0x83)  # buttons, as nes-py orders them
CHUNK = 10  # agent steps between looks at the clock


def repeated(do: Callable[[], int], seconds: float) -> float:
    """Rate of what `do` counts, per second."""
    do()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += do()
    return count / (time.perf_counter() - start)


def bare_frames(config: EnvConfig, skipping: bool) -> Measure:
    """Frames of the emulator alone, in the level of `config`.

    Args:
        config: the emulator and the game.
        skipping: draw only the frames that an agent looks at; for libretro cores.

    Raises:
        UserError: it is no NES game.
    """
    env = make_env(config)
    game: Any = env.unwrapped
    if not isinstance(game, NESEnv):
        raise UserError(f"env.id={config.id}: no NES game, and nothing else is measured")
    env.reset(seed=0)
    emulator = game._env
    emulator.backup()
    random = np.random.default_rng(0)

    def frames() -> int:
        emulator.restore()  # Mario lives
        for buttons in random.choice(RIGHT_WITH_A_AND_B, size=CHUNK).tolist():
            for frame in range(1, config.action_repeat + 1):
                if skipping:
                    emulator.draw = frame == config.action_repeat
                emulator.frame_advance(buttons)
        return CHUNK * config.action_repeat

    return lambda seconds: repeated(frames, seconds)


def environment_steps(config: EnvConfig, with_state: bool = True) -> Measure:
    """Agent steps of one environment with random actions; without the state: of the game alone."""
    env: Env = make_env(config)
    if not with_state:
        while not isinstance(env, GreyImage):
            env = env.env  # pyrefly: ignore[missing-attribute]
        env = env.env
    env.reset(seed=0)
    random = np.random.default_rng(0)
    actions = action_count(env.action_space)

    def steps() -> int:
        for action in random.integers(actions, size=CHUNK).tolist():
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return CHUNK

    return lambda seconds: repeated(steps, seconds)


@contextmanager
def vector_steps(config: EnvConfig) -> Generator[Measure]:
    """Agent steps of all environments of `config`, vectorised, with random actions."""
    envs = make_vector_env(config)
    try:
        envs.reset(seed=0)
        random = np.random.default_rng(0)
        actions = action_count(envs.single_action_space)

        def steps() -> int:
            envs.step(random.integers(actions, size=envs.num_envs))
            return envs.num_envs

        yield lambda seconds: repeated(steps, seconds)
    finally:
        envs.close()


def separate_steps(config: EnvConfig, processes: int) -> AbstractContextManager[Measure]:
    """Total agent steps of the processes, each with one environment and nothing else."""
    return apart(partial(environment_steps, config), processes)


def scaling(config: EnvConfig, cores: int, seconds: float) -> list[dict[str, Any]]:
    """Agent steps/s of 1, 2, 4, ... processes up to `cores`, with 1, 4 and 16 environments each."""
    found = []
    workers = 1
    while workers <= cores:
        for each in (1, 4, 16):
            several = replace(config, num_workers=workers, num_envs=workers * each)
            with vector_steps(several) as measure:
                rate = measure(seconds)
            found.append({"processes": workers, "envs": workers * each, "agent_steps_per_s": rate})
        workers *= 2
    return found
