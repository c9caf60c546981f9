"""Types of every setting and the checks that types cannot make; values stand in `conf/`."""

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from icm.errors import UserError


@dataclass
class EnvConfig:
    """See `conf/env/`."""

    id: str
    num_envs: int
    action_repeat: int
    actions: str
    frame_stack: int
    size: int
    crop: list[int]
    noop_max: int
    sticky_probability: float
    stuck_steps: int
    stuck_distance: int
    # checkpoints from before these settings were made with these values
    emulator: str = "nes_py"
    core: str = "auto"
    num_workers: int | None = None


@dataclass
class PolicyConfig:
    """Schedules as knots [agent step, value], see `icm.agents.policy`."""

    temperature: list[Any] | None
    entropy: list[Any]
    epsilon: list[Any]


@dataclass
class AgentConfig:
    """See `conf/agent/`."""

    name: str
    input_norm: str
    previous_action: bool
    hidden: int
    lr: float
    discount: float
    n_step: int
    advantage_learning: float
    batch_size: int
    sequence_length: int
    steps_per_update: int
    replay_capacity: int
    warmup_steps: int
    target_tau: float
    max_grad_norm: float
    q_weight: float
    death_is_terminal: bool
    policy: PolicyConfig


@dataclass
class CuriosityConfig:
    """See `conf/curiosity/`."""

    name: str
    coef: float
    extrinsic_coef: float
    lr: float
    beta: float
    eta: float
    reduction: str
    forward_scale: float
    inverse_scale: float
    target_tau: float
    normalize_features: bool
    policy_prior: bool
    hidden: int
    inverse_dropout: float
    reward_half_life: float
    episodic_ridge: float | None


@dataclass
class CheckpointConfig:
    """When to save."""

    every: int


@dataclass
class LogConfig:
    """When to log."""

    every: int


@dataclass
class Config:
    """All settings of a run."""

    preset: str
    seed: int
    device: str
    precision: str
    total_steps: int
    resume: str | None
    env: EnvConfig
    agent: AgentConfig
    curiosity: CuriosityConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    compile: str = "off"  # checkpoints from before this setting do not have it


@dataclass
class EvaluateConfig:
    """See `conf/evaluate.yaml`."""

    ckpt: str
    episodes: int
    seed: int
    stuck_steps: int | None
    device: str


@dataclass
class PlayConfig:
    """See `conf/play.yaml`."""

    ckpt: str
    episodes: int
    greedy: bool
    render: str
    out: str | None
    seed: int
    device: str


def parse_config(settings: DictConfig) -> Config:
    """Turn composed settings into typed ones.

    Raises:
        UserError: a value is of the wrong type or out of its range.
    """
    config = typed(settings, Config)
    _check(config)
    return config


def typed[T](settings: DictConfig, kind: type[T]) -> T:
    """Turn composed settings into the dataclass `kind`, every field of it and no other key.

    Raises:
        UserError: a value is missing or of the wrong type, or a key is unknown.
    """
    keys = [str(key) for key in settings if key != "hydra"]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.masked_copy(settings, keys))
        result = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: must be given, as {error.full_key}=VALUE") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(result, kind)
    return result


def _check(config: Config) -> None:
    env, agent, curiosity = config.env, config.agent, config.curiosity
    for name, value, least in (
        ("seed", config.seed, 0),
        ("total_steps", config.total_steps, 1),
        ("checkpoint.every", config.checkpoint.every, 1),
        ("log.every", config.log.every, 1),
        ("env.num_envs", env.num_envs, 1),
        ("env.num_workers", 1 if env.num_workers is None else env.num_workers, 1),
        ("env.action_repeat", env.action_repeat, 1),
        ("env.frame_stack", env.frame_stack, 1),
        ("env.size", env.size, 16),
        ("env.noop_max", env.noop_max, 0),
        ("env.stuck_steps", env.stuck_steps, 0),
        ("env.stuck_distance", env.stuck_distance, 1),
        ("agent.hidden", agent.hidden, 1),
        ("agent.n_step", agent.n_step, 1),
        ("agent.batch_size", agent.batch_size, 1),
        ("agent.sequence_length", agent.sequence_length, 1),
        ("agent.steps_per_update", agent.steps_per_update, 1),
        ("agent.warmup_steps", agent.warmup_steps, 0),
        ("curiosity.hidden", curiosity.hidden, 1),
    ):
        if value < least:
            raise UserError(f"{name}={value}: must be at least {least}")
    for name, number in (
        ("agent.lr", agent.lr),
        ("agent.max_grad_norm", agent.max_grad_norm),
        ("curiosity.lr", curiosity.lr),
        ("curiosity.reward_half_life", curiosity.reward_half_life),
        ("agent.target_tau", agent.target_tau),
        ("curiosity.target_tau", curiosity.target_tau),
    ):
        if not 0 < number < math.inf:
            raise UserError(f"{name}={number}: must be a positive number")
    if curiosity.episodic_ridge is not None and not 0 < curiosity.episodic_ridge < math.inf:
        raise UserError(
            f"curiosity.episodic_ridge={curiosity.episodic_ridge}: must be positive, or null"
        )
    for name, share in (
        ("agent.discount", agent.discount),
        ("agent.target_tau", agent.target_tau),
        ("curiosity.target_tau", curiosity.target_tau),
        ("curiosity.beta", curiosity.beta),
        ("curiosity.inverse_dropout", curiosity.inverse_dropout),
        ("env.sticky_probability", env.sticky_probability),
    ):
        if not 0 <= share <= 1:
            raise UserError(f"{name}={share}: must be between 0 and 1")
    if not 0 <= agent.advantage_learning < 1:
        raise UserError(
            f"agent.advantage_learning={agent.advantage_learning}: must be at least 0 and below 1"
        )
    for name, choice, choices in (
        ("env.actions", env.actions, ("right_only", "simple", "complex")),
        ("env.emulator", env.emulator, ("nes_py", "libretro")),
        ("agent.input_norm", agent.input_norm, ("standard", "scale", "stack")),
        ("curiosity.reduction", curiosity.reduction, ("mean", "sum")),
        ("precision", config.precision, ("auto", "float32", "bf16")),
        ("compile", config.compile, ("auto", "on", "off")),
    ):
        if choice not in choices:
            raise UserError(f"{name}={choice}: must be one of {', '.join(choices)}")
    if len(env.crop) != 4 or min(env.crop) < 0:
        raise UserError(f"env.crop={env.crop}: must be [top, bottom, left, right] in pixels")
    smallest = env.num_envs * (agent.sequence_length + max(env.frame_stack, 2))
    if agent.replay_capacity < smallest:
        raise UserError(
            f"agent.replay_capacity={agent.replay_capacity}: must be at least {smallest}, "
            "env.num_envs * (agent.sequence_length + max(env.frame_stack, 2))"
        )
    for name, schedule in (
        ("agent.policy.temperature", agent.policy.temperature or [[0, 1]]),
        ("agent.policy.entropy", agent.policy.entropy),
        ("agent.policy.epsilon", agent.policy.epsilon),
    ):
        _check_schedule(name, schedule)


def _check_schedule(name: str, schedule: list[Any]) -> None:
    knots_are_pairs = bool(schedule) and all(
        isinstance(knot, list) and len(knot) == 2 and all(isinstance(x, int | float) for x in knot)
        for knot in schedule
    )
    if not knots_are_pairs or sorted(k[0] for k in schedule) != [k[0] for k in schedule]:
        raise UserError(
            f"{name}={schedule}: must be knots in order, such as [[0, 1.0], [20000, 0.05]]"
        )
