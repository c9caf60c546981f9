"""Types of all settings, and checks beyond types; the values are in `conf/`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icm.errors import UserError
from icm.ranks import WORLD_SIZE

if TYPE_CHECKING:
    from omegaconf import DictConfig

SETTINGS = ".hydra/config.yaml"
"""In a run folder."""

SLOWEST, FASTEST = 0.1, 10.0
"""Playback speeds, as multiples of the game's own."""

INPUT_NORMS = ("standard", "contrast", "scale", "stack")
"""See `icm.models.InputNorm`; here, so that checking settings needs no PyTorch."""


type Range = tuple[str, Callable[[Any], bool]]
"""A requirement in words, and its check of a value."""


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
    emulator: str
    core: str
    num_workers: int | None
    noisy_tv: str


@dataclass
class PolicyConfig:
    """Schedules of `icm.agents.policy`; a temperature of None adapts."""

    temperature: Any
    entropy: Any
    epsilon: Any


@dataclass
class AgentConfig(ABC):
    """Common to all learners, see `conf/agent/`."""

    name: str
    input_norm: str
    previous_action: bool
    hidden: int
    lr: float
    lr_final: float
    discount: float
    batch_size: int
    sequence_length: int
    replay_capacity: int
    warmup_steps: int
    max_grad_norm: float
    death_is_terminal: bool
    # checkpoints from before these settings were made with these values
    accumulate: int = field(default=1, kw_only=True)
    convolutions: int = field(default=4, kw_only=True)

    @property
    @abstractmethod
    def steps_between_updates(self) -> float:
        """Agent steps per update."""


@dataclass
class DQNConfig(AgentConfig):
    """See `conf/agent/dqn.yaml`."""

    n_step: int
    advantage_learning: float
    steps_per_update: int
    target_tau: float
    q_weight: float
    policy: PolicyConfig

    @property
    def steps_between_updates(self) -> float:
        """Agent steps per update."""
        return self.steps_per_update


@dataclass
class RolloutConfig(AgentConfig):
    """Common to learners from rollouts; `discount` may be a schedule of `icm.agents.policy`."""

    discount: Any
    rollout_steps: int
    epochs: int
    trace: float
    # checkpoints from before this setting were made with this value
    replayed: int = field(default=6, kw_only=True)

    @property
    def steps_between_updates(self) -> float:
        """Agent steps per update."""
        return self.batch_size * self.sequence_length / self.epochs


@dataclass
class PPOConfig(RolloutConfig):
    """See `conf/agent/ppo.yaml`."""

    clip: float
    entropy_coef: float
    value_coef: float
    # checkpoints from before this setting were made with this value
    extrinsic_discount: float = 0.95


@dataclass
class PQNConfig(RolloutConfig):
    """See `conf/agent/pqn.yaml`."""

    advantage_learning: float
    policy: PolicyConfig


@dataclass
class CuriosityConfig:
    """Common to all signals, see `conf/curiosity/`."""

    name: str
    coef: float
    extrinsic_coef: float
    lr: float
    reward_half_life: float
    episodic_scale: float | None
    surprise_limit: float | None


@dataclass
class PredictorConfig(CuriosityConfig):
    """Common to signals that learn to predict, see `conf/curiosity/`."""

    hidden: int


@dataclass
class ICMConfig(PredictorConfig):
    """See `conf/curiosity/icm.yaml`."""

    beta: float
    eta: float
    reduction: str
    forward_scale: float
    inverse_scale: float
    target_tau: float | None
    normalize_features: bool
    policy_prior: bool
    inverse_dropout: float
    # checkpoints from before this setting were made with this value
    inverse_layer_norm: bool = False


@dataclass
class DisagreementConfig(PredictorConfig):
    """See `conf/curiosity/disagreement.yaml`."""

    ensemble: int


AGENTS: dict[str, type[AgentConfig]] = {"dqn": DQNConfig, "ppo": PPOConfig, "pqn": PQNConfig}
CURIOSITIES: dict[str, type[CuriosityConfig]] = {
    "icm": ICMConfig,
    "random_features": PredictorConfig,
    "rnd": PredictorConfig,
    "disagreement": DisagreementConfig,
    "none": CuriosityConfig,
}


@dataclass
class CheckpointConfig:
    """When to save, and how many of the checkpoints named by their step to keep."""

    every: int
    keep: int = 20  # missing in checkpoints from before this setting


@dataclass
class LogConfig:
    """When to log."""

    every: int


@dataclass
class DrawingConfig:
    """When to draw; 0: never."""

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
    compile: str
    # missing in checkpoints from before these settings
    collector: str = "local"
    practice: float = 0.0
    map: DrawingConfig = field(default_factory=lambda: DrawingConfig(50_000))
    video: DrawingConfig = field(default_factory=lambda: DrawingConfig(50_000))
    report: DrawingConfig = field(default_factory=lambda: DrawingConfig(25_000))


@dataclass
class GameConfig:
    """Settings of `EnvConfig` that may be replaced after training; see `conf/game.yaml`."""

    id: str | None
    stuck_steps: int | None
    sticky_probability: float | None
    emulator: str | None
    core: str | None


@dataclass
class ExportConfig:
    """See `conf/export.yaml`."""

    ckpt: str
    out: str
    env: GameConfig


@dataclass
class EvaluateConfig:
    """See `conf/evaluate.yaml`."""

    ckpt: str
    episodes: int
    seed: int
    device: str
    env: GameConfig


@dataclass
class PlayConfig:
    """See `conf/play.yaml`."""

    ckpt: str
    episodes: int
    greedy: bool
    render: str
    out: str | None
    mind: bool
    speed: float
    seed: int
    device: str
    env: GameConfig


def parse_config(settings: "DictConfig") -> Config:
    """Turn composed settings into typed ones.

    Raises:
        UserError: a value is of the wrong type or out of its range.
    """
    config = checked(settings, Config)
    _check(config)
    return config


def checked[T](settings: "DictConfig", kind: type[T]) -> T:
    """What `typed` gives, each value within its range.

    Raises:
        UserError: a value is missing, of the wrong type or out of its range, or a key is unknown.
    """
    found = typed(settings, kind)
    _check_ranges(found)
    return found


def typed[T](settings: "DictConfig", kind: type[T]) -> T:
    """Turn composed settings into the dataclass `kind`: all of its fields, no other key.

    Raises:
        UserError: a value is missing or of the wrong type, or a key is unknown.
    """
    # here, because environment workers import this module, too, and parse nothing
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

    keys = [str(key) for key in settings if key != "hydra"]
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(special(kind, settings)), OmegaConf.masked_copy(settings, keys)
        )
        result = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: must be given, as {error.full_key}=VALUE") from None
    except ConfigKeyError as error:
        group = str(error.full_key).partition(".")[0]
        name = OmegaConf.select(settings, f"{group}.name")
        of_group = f" of {group}={name}" if name else ""
        raise UserError(f"{error.full_key}: there is no such setting{of_group}") from None
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        if "is not a ListConfig" in reason:
            reason = f"must be a list, as in {error.full_key}=[A,B]"
        if "of type 'ListConfig'" in reason or "value 'None'" in reason:
            given = OmegaConf.select(settings, str(error.full_key))
            reason = f"must be a single value here, not {'null' if given is None else given}"
        raise UserError(f"{error.full_key}: {reason}") from None
    assert isinstance(result, kind)
    return result


def settings_of(run: Path) -> "DictConfig":
    """The settings of a run folder, which may be those of an older version.

    Raises:
        OSError: they cannot be read.
        UserError: they are damaged.
    """
    from omegaconf import DictConfig, OmegaConf  # see `typed`

    try:
        settings = OmegaConf.load(run / SETTINGS)
    except OSError:
        raise
    except Exception:  # YAML's
        settings = None
    if isinstance(settings, DictConfig):
        known: Any = OmegaConf.to_container(settings)
        # Hydra writes these last: a file that was cut off lacks one
        if {"env.id", "agent.name", "curiosity.name"} <= flat(known).keys():
            return settings
    raise UserError(f"{run / SETTINGS}: damaged; a full disk may be why")


ELSEWHERE = frozenset({"collector", "env.num_workers", "env.core"})
"""Settings of the machine that environments run on: results do not depend on them, though they do
on which core it is (`icm.envs.core_name`)."""


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings as one dict by name, such as `env.id`."""
    named: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            named |= {f"{name}.{key}": inner for key, inner in flat(value).items()}
        else:
            named[name] = value
    return named


def special(kind: type, settings: "DictConfig") -> type:
    """`kind` with its `agent` and `curiosity`, if any, of the types that `settings` name.

    Raises:
        UserError: a name is unknown.
    """
    from omegaconf import OmegaConf  # see `typed`

    types = []
    for group, kinds in (("agent", AGENTS), ("curiosity", CURIOSITIES)):
        if group in {setting.name for setting in fields(kind)}:
            name = OmegaConf.select(settings, f"{group}.name")
            if name not in kinds:
                raise UserError(f"{group}.name={name}: must be one of {', '.join(kinds)}")
            types.append((group, kinds[name]))
    return make_dataclass(kind.__name__, types, bases=(kind,))


def _at_least(least: int) -> Range:
    return f"must be at least {least}", lambda value: value >= least


def _at_most(most: int) -> Range:
    return f"must be at most {most}", lambda value: value <= most


def _one_of(*choices: str) -> Range:
    return f"must be one of {', '.join(choices)}", lambda value: value in choices


RANGES: dict[Range, str] = {
    _at_least(1): """
        total_steps checkpoint.every checkpoint.keep log.every env.num_envs env.num_workers
        env.action_repeat env.frame_stack env.stuck_distance agent.hidden agent.n_step
        agent.batch_size agent.sequence_length agent.steps_per_update agent.rollout_steps
        agent.epochs agent.replayed agent.accumulate agent.convolutions curiosity.hidden
        curiosity.ensemble episodes rounds""",
    (
        f"must be a multiple of {WORLD_SIZE}, the world size",
        lambda value: value % WORLD_SIZE == 0,
    ): ("env.num_envs agent.batch_size agent.replayed"),
    _at_least(0): """
        map.every video.every report.every env.noop_max env.stuck_steps agent.warmup_steps kills
        stops files worker_kills worker_hangs""",
    # others PyTorch or Gymnasium would not accept
    ("must be at least 0 and below 2**63", lambda value: 0 <= value < 2**63): "seed",
    _at_least(16): "env.size",
    _at_most(255): "env.frame_stack",
    _at_most(256): "env.size",  # the games' pictures have no more
    _at_most(16_384): "agent.hidden curiosity.hidden",
    _at_most(100): "curiosity.ensemble",
    ("must be a positive number", lambda value: 0 < value < math.inf): """
        agent.lr agent.max_grad_norm agent.clip agent.target_tau curiosity.lr
        curiosity.target_tau seconds minutes""",
    ("must be between 1e-9 and 1e9", lambda value: 1e-9 <= value <= 1e9): (
        "curiosity.reward_half_life"
    ),
    ("must be a finite number", math.isfinite): """
        agent.entropy_coef agent.value_coef agent.q_weight curiosity.coef curiosity.extrinsic_coef
        curiosity.eta curiosity.forward_scale curiosity.inverse_scale""",
    ("must be between 1e-9 and 1e9, or null", lambda value: 1e-9 <= value <= 1e9): (
        "curiosity.episodic_scale"
    ),
    ("must be at least 1, or null", lambda value: 1 <= value < math.inf): (
        "curiosity.surprise_limit"
    ),
    ("must be between 0 and 1", lambda value: 0 <= value <= 1): """
        agent.lr_final agent.extrinsic_discount agent.trace agent.target_tau curiosity.target_tau
        curiosity.beta curiosity.inverse_dropout""",
    ("must be at least 0 and below 1", lambda value: 0 <= value < 1): """
        agent.advantage_learning env.sticky_probability practice""",
    _one_of("right_only", "simple", "complex"): "env.actions",
    _one_of("nes_py", "libretro"): "env.emulator",
    _one_of("none", "always", "switched"): "env.noisy_tv",
    _one_of(*INPUT_NORMS): "agent.input_norm",
    _one_of("mean", "sum"): "curiosity.reduction",
    _one_of("auto", "float32", "bf16"): "precision",
    _one_of("auto", "on", "off"): "compile",
    _one_of("local", "ray"): "collector",
    _one_of("auto", "human", "video", "none"): "render",
    (
        f"must be between {SLOWEST:g} and {FASTEST:g}, times the game's own",
        lambda value: SLOWEST <= value <= FASTEST,
    ): "speed",
}
"""Of single settings of any script: checked where they exist, and are not null."""


def _check_ranges(settings: Any) -> None:
    for (words, holds), names in RANGES.items():
        for name in names.split():
            group, _, key = name.rpartition(".")
            section = getattr(settings, group, None) if group else settings
            value = getattr(section, key, None)
            if value is not None and not holds(value):
                raise UserError(f"{name}={value}: {words}")


def _check(config: Config) -> None:
    """Refuse settings that do not fit each other."""
    env, agent = config.env, config.agent
    if not all(0 <= value < 1 for value in _values_of("agent.discount", agent.discount)):
        raise UserError(f"agent.discount={agent.discount}: must be at least 0 and below 1")
    if agent.input_norm == "standard" and agent.warmup_steps == 0:
        raise UserError(
            "agent.warmup_steps=0: must be at least 1 for agent.input_norm=standard, which is "
            "measured then"
        )
    if config.practice and not practising(config.practice, env.num_envs):
        raise UserError(
            f"practice={config.practice}: too small a share of env.num_envs={env.num_envs}: none "
            "would practise"
        )
    if len(env.crop) != 4 or min(env.crop) < 0:
        raise UserError(f"env.crop={env.crop}: must be [top, bottom, left, right] in pixels")
    history = max(env.frame_stack, 2)
    if isinstance(agent, RolloutConfig):
        if agent.rollout_steps % agent.sequence_length:
            raise UserError(
                f"agent.rollout_steps={agent.rollout_steps}: must be a multiple of "
                f"agent.sequence_length={agent.sequence_length}"
            )
        sequences = env.num_envs * agent.rollout_steps // agent.sequence_length
        if sequences % agent.batch_size:
            raise UserError(
                f"agent.batch_size={agent.batch_size}: must divide the {sequences} sequences of a "
                "rollout, env.num_envs * agent.rollout_steps / agent.sequence_length"
            )
        smallest, why = 2 * agent.rollout_steps + 1 + history, "(2 * agent.rollout_steps + 1"
        drawn = "replayed"
    else:
        smallest, why = agent.sequence_length + history, "(agent.sequence_length"
        drawn = "batch_size"
    if agent.replay_capacity < env.num_envs * smallest:
        raise UserError(
            f"agent.replay_capacity={agent.replay_capacity}: must be at least "
            f"{env.num_envs * smallest}, env.num_envs * {why} + max(env.frame_stack, 2))"
        )
    most = agent.replay_capacity // agent.sequence_length
    if getattr(agent, drawn) > most:
        raise UserError(
            f"agent.{drawn}={getattr(agent, drawn)}: must be at most {most}, "
            "agent.replay_capacity / agent.sequence_length"
        )
    if isinstance(agent, DQNConfig | PQNConfig):
        policy = agent.policy
        temperature = 1 if policy.temperature is None else policy.temperature
        for key, schedule, greatest, words in (
            ("temperature", temperature, 1e9, "between 0 and 1e9"),
            ("entropy", policy.entropy, 1, "between 0 and 1"),
            ("epsilon", policy.epsilon, 1, "between 0 and 1"),
        ):
            name = f"agent.policy.{key}"
            if not all(0 <= value <= greatest for value in _values_of(name, schedule)):
                raise UserError(f"{name}={schedule}: values must be {words}")


def practising(share: float, num_envs: int) -> int:
    """How many of `num_envs` practise; at least one does not."""
    return num_envs - max(1, round((1 - share) * num_envs))


def _values_of(name: str, schedule: Any) -> list[float]:
    """The values of a schedule of `icm.agents.policy`.

    Raises:
        UserError: it is none.
    """
    if isinstance(schedule, int | float):
        return [schedule]
    has_knots = isinstance(schedule, list) and all(
        isinstance(knot, list)
        and len(knot) == 2
        and all(isinstance(x, int | float) for x in knot)
        and abs(knot[0]) < 2**63
        for knot in schedule
    )
    steps = [step for step, _ in schedule] if has_knots else []
    if not steps or steps != sorted(steps):
        raise UserError(
            f"{name}={schedule}: must be a number, or knots in order, such as "
            "[[0, 1.0], [20000, 0.05]]"
        )
    return [value for _, value in schedule]
