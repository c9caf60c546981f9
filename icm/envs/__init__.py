"""Environments: from a Gymnasium id to the agent's states, single or vectorised.

Nothing here imports torch, so worker processes stay small.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import gym_super_mario_bros  # noqa: F401 (registers the Mario environments)
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import (
    EnvSpec,
    find_highest_version,
    get_env_id,
    parse_env_id,
)
from nes_py.wrappers import JoypadSpace

from icm.config import EnvConfig, practising
from icm.envs.cores import find_core
from icm.envs.libretro import OnLibretro, nes_game, on_libretro
from icm.envs.local import LocalWorkers
from icm.envs.mario import (
    ACTION_SETS,
    LeanGame,
    MarioProgress,
    Scenery,
    Screen,
    StuckLimit,
    lean,
)
from icm.envs.practice import Practice
from icm.envs.vector import WorkerVectorEnv
from icm.envs.wrappers import (
    ActionRepeat,
    AgentView,
    Env,
    EpisodeStatistics,
    FrameStack,
    GreyImage,
    NoisyTV,
    NoopStart,
    StickyActions,
)
from icm.errors import UserError
from icm.ranks import CORES, RANK, WORLD_SIZE


def make_env(
    config: EnvConfig,
    render_mode: str | None = None,
    on_frame: Callable[[Env], None] | None = None,
    scenery: bool = False,
) -> Env:
    """Build one environment whose observations are states, uint8 (frame_stack, size, size).

    `info` has `cell`, `life_lost` and `respawned` (Mario games) at every step, `scenery` if
    requested and new, and `episode` at the last step, see `icm.envs.wrappers.EpisodeStatistics` and
    `icm.envs.mario`.

    Args:
        config: the settings.
        render_mode: passed on to the game.
        on_frame: called after every emulator frame, see `ActionRepeat`.
        scenery: whether `info` may have it.

    Raises:
        UserError: the id is unknown, the environment has no image observations or no discrete
            actions, or the emulator cannot run it.
    """
    env = _make_game(config, render_mode)
    game: Any = env.unwrapped
    is_mario = isinstance(game, LeanGame)
    if is_mario:
        env = JoypadSpace(env, ACTION_SETS[config.actions])
    _check_spaces(config.id, env)
    if config.sticky_probability:
        env = StickyActions(env, config.sticky_probability)
    if config.noop_max:
        env = NoopStart(env, config.noop_max)
    # when rendering, every frame is drawn
    draw = game.draw if isinstance(game, OnLibretro) and render_mode is None else None
    env = ActionRepeat(env, config.action_repeat, on_frame, draw)
    if is_mario:
        env = Screen(env)
        if scenery:
            env = Scenery(env)
        if config.stuck_steps:
            env = StuckLimit(env, config.stuck_steps, config.stuck_distance)
        env = MarioProgress(env)
    top, bottom, left, right = config.crop
    env = GreyImage(env, config.size, (top, bottom, left, right))
    if config.noisy_tv != "none":
        env = NoisyTV(env, switched=config.noisy_tv == "switched")
    env = FrameStack(env, config.frame_stack)
    spec = EnvSpec(
        f"icm/{config.id.replace(':', '/').replace('/', '-')}",
        entry_point="icm.envs:make_env",
        kwargs={"config": config, "scenery": scenery},
        order_enforce=False,
        disable_env_checker=True,
    )
    seen = "cell", "life_lost", "respawned", "scenery", "episode"
    return AgentView(EpisodeStatistics(env), seen, spec)


def make_vector_env(
    config: EnvConfig,
    busy_cores: int = 0,
    scenery: bool = False,
    collector: str = "local",
    practice: float = 0.0,
) -> WorkerVectorEnv:
    """Build this rank's part of `num_envs` environments in `num_workers` workers.

    See `WorkerVectorEnv`, and `icm.ranks`.

    Args:
        config: the settings.
        busy_cores: how many cores the caller needs between `step_async` and `step_wait`.
        scenery: see `make_env`.
        collector: where the workers run: `local`, in processes on this machine, or `ray`.
        practice: share of all environments that practise: the last ones, never the first one.

    Raises:
        UserError: see `make_env` and `icm.envs.on_ray.RayWorkers`; or Ray is not installed.
    """
    num_envs = config.num_envs // WORLD_SIZE
    make = partial(make_env, config, scenery=scenery)
    if collector == "ray":
        try:
            from icm.envs.on_ray import RayWorkers  # only if needed: it takes two seconds
        except ModuleNotFoundError as error:
            raise UserError(
                f"collector=ray: there is no {error.name}; "
                "pip install -e .[ray] or uv run --extra ray … installs it"
            ) from None
        start: Any = partial(RayWorkers, make, config.num_workers, num_envs, busy_cores)
    else:
        workers = min(config.num_workers or CORES, num_envs)
        late = min(max(workers + busy_cores - CORES, 0), workers - 1)
        start = partial(LocalWorkers, make, workers, late)
    first = RANK * num_envs
    others = config.num_envs - practising(practice, config.num_envs)  # the first ones of all
    its_practising = num_envs - min(max(others - first, 0), num_envs)
    practised = Practice(num_envs, its_practising, idle=config.stuck_steps or 0)
    return WorkerVectorEnv(make, num_envs, start, first=first, practice=practised)


def describe_emulator(config: EnvConfig) -> str | None:
    """One line: what runs an NES game, and what would be faster; None for other environments.

    The environment must be known to exist, see `make_env`.

    Raises:
        UserError: no core was found.
    """
    if config.emulator == "libretro":
        return f"emulator: libretro core {find_core(config.core)}"
    if nes_game(_find_spec(config.id)) is None:
        return None
    return (
        "emulator: nes_py; nearly twice as fast: "
        "uv run --extra fast scripts/train.py env.emulator=libretro (docs/manual.md says more)"
    )


def core_name(config: EnvConfig) -> str | None:
    """The libretro core that runs the game, without its folder; None if none does.

    Raises:
        UserError: no core was found.
    """
    return find_core(config.core).stem if config.emulator == "libretro" else None


def _make_game(config: EnvConfig, render_mode: str | None) -> Env:
    try:
        spec = _find_spec(config.id)
        if config.emulator == "libretro":
            spec = on_libretro(spec, find_core(config.core))
        if (game := nes_game(spec)) is not None:
            spec = lean(spec, game)
        return gym.make(spec, render_mode=render_mode)
    except (gym.error.Error, ImportError) as error:
        said = str(error).splitlines()[0]
        raise UserError(
            f"env.id={config.id}: {said}{'' if said.endswith(('.', '?')) else '.'} "
            "Registered are for instance SuperMarioBros-1-1-v0 (world 1-8, stage 1-4), "
            "SuperMarioBros-v0, SuperMarioBros2-v0, SuperMarioBros2USA-v0, SuperMarioBros3-v0; "
            "another package's environment is named package:id."
        ) from None


def _find_spec(env_id: str) -> EnvSpec:
    """As in `gym.make`: also from another package; the latest version if none is named."""
    module, _, full_name = env_id.rpartition(":")
    if module.startswith("."):
        raise ModuleNotFoundError(f"{module} is no name of a package.")
    if module:
        importlib.import_module(module)
    namespace, name, version = parse_env_id(full_name)
    if version is None:
        version = find_highest_version(namespace, name)
    return gym.spec(get_env_id(namespace, name, version))


def _check_spaces(env_id: str, env: Env) -> None:
    space = env.observation_space
    is_image = (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and (len(space.shape) == 2 or (len(space.shape) == 3 and space.shape[2] in (1, 3)))
    )
    if not is_image:
        raise UserError(
            f"env.id={env_id}: observations are {space}; needed are "
            "uint8 images, (H, W, 3) or (H, W)"
        )
    actions = env.action_space
    # actions are stored as bytes
    if not isinstance(actions, spaces.Discrete) or actions.start != 0 or actions.n > 256:
        raise UserError(
            f"env.id={env_id}: actions are {actions}; needed is Discrete(n), n at most 256"
        )


def action_count(space: spaces.Space[Any]) -> int:
    """Number of actions of a discrete action space."""
    assert isinstance(space, spaces.Discrete)
    return int(space.n)


def action_names(env: Env) -> list[str]:
    """Names of an environment's actions: their buttons if known, else their numbers."""
    if env.has_wrapper_attr("get_action_meanings"):
        return [str(name) for name in env.get_wrapper_attr("get_action_meanings")()]
    return [str(action) for action in range(action_count(env.action_space))]


def episodes_in(infos: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The `episode` statistics of episodes that ended in this vector step, by environment number.

    An episode truncated by a worker's failure has none.
    """
    return {
        row: {k: v[row] for k, v in infos["episode"].items() if not k.startswith("_")}
        for row in np.flatnonzero(infos.get("_episode", ())).tolist()
    }
