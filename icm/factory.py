"""Builds an agent from its settings."""

import torch

from icm.agents.base import Agent, Common
from icm.agents.dqn import DQN
from icm.agents.ppo import PPO
from icm.agents.pqn import PQN
from icm.compilation import Compiler, resolve_compile
from icm.config import (
    Config,
    CuriosityConfig,
    DisagreementConfig,
    DQNConfig,
    ICMConfig,
    PPOConfig,
    PQNConfig,
    PredictorConfig,
)
from icm.curiosity import (
    ICM,
    RND,
    Disagreement,
    EpisodicNovelty,
    NoCuriosity,
    RandomFeatures,
    Signal,
)
from icm.device import resolve_precision
from icm.errors import UserError
from icm.memory import available_bytes, memory_device
from icm.models import ActorCritic, Fnet, InputNorm, InverseNet, Phi, Qnetwork
from icm.ranks import LOCAL_WORLD_SIZE
from icm.replay import Replay

MOST = 0.8  # share of the free memory that the replay memory may take: the rest needs some, too


def build_agent(
    config: Config,
    state_shape: tuple[int, int, int],
    num_actions: int,
    device: torch.device,
    *,
    remember: bool = True,
) -> Agent:
    """Build the agent of a configuration.

    Args:
        config: all settings.
        state_shape: (C, H, W).
        num_actions: size of the action space.
        device: where it computes.
        remember: False for an agent that only plays: it gets no memory and is not compiled.

    Raises:
        UserError: the replay memory would not fit.
    """
    torch.manual_seed(config.seed)
    agent, told = config.agent, config.agent.previous_action
    updates = int(config.total_steps / agent.steps_between_updates)
    common = Common(
        signal=build_signal(config.curiosity, state_shape, num_actions, told),
        novelty_phi=None if config.curiosity.episodic_scale is None else Phi(state_shape),
        input_norm=InputNorm(agent.input_norm, state_shape[1:]),
        curiosity=config.curiosity,
        num_envs=config.env.num_envs,
        device=device,
        bf16=resolve_precision(config.precision, device),
        compiler=Compiler(resolve_compile(config.compile, updates) if remember else "off", device),
        seed=config.seed,
        total_steps=config.total_steps,
    )
    replay = build_replay(config, state_shape, num_actions, common, remember)
    body = state_shape, num_actions, agent.hidden, told, agent.convolutions
    if isinstance(agent, PPOConfig):
        heads = 2 if config.curiosity.extrinsic_coef else 1  # the game's reward has one of its own
        return PPO(ActorCritic(*body, heads), replay, agent, common)
    qnetwork = Qnetwork(*body, layer_norm=isinstance(agent, PQNConfig))
    if isinstance(agent, PQNConfig):
        return PQN(qnetwork, replay, agent, common)
    assert isinstance(agent, DQNConfig)
    return DQN(qnetwork, replay, agent, common)


def build_signal(
    config: CuriosityConfig, state_shape: tuple[int, int, int], num_actions: int, told: bool
) -> Signal:
    """Build a curiosity signal; `told` if its models get the previous action."""
    if not isinstance(config, PredictorConfig):
        return NoCuriosity()
    phi, hidden = Phi(state_shape), config.hidden

    def fnet() -> Fnet:
        return Fnet(phi.num_features, num_actions, hidden, told)

    if config.name == "rnd":
        return RND(phi, Phi(state_shape), hidden)
    if config.name == "random_features":
        return RandomFeatures(phi, fnet())
    if isinstance(config, DisagreementConfig):
        return Disagreement(phi, [fnet() for _ in range(config.ensemble)])
    assert isinstance(config, ICMConfig)
    return ICM(
        phi,
        fnet(),
        InverseNet(
            phi.num_features,
            num_actions,
            hidden,
            config.inverse_dropout,
            told,
            config.inverse_layer_norm,
        ),
        beta=config.beta,
        eta=config.eta,
        reduction=config.reduction,
        forward_scale=config.forward_scale,
        inverse_scale=config.inverse_scale,
        target_tau=config.target_tau,
        normalize_features=config.normalize_features,
        policy_prior=config.policy_prior,
    )


def build_replay(
    config: Config,
    state_shape: tuple[int, int, int],
    num_actions: int,
    common: Common,
    remember: bool,
) -> Replay:
    """Build a replay memory, where it fits beside what the running lives have seen.

    Raises:
        UserError: it fits nowhere.
    """
    channels, *size = state_shape
    frame = size[0], size[1]
    capacity = config.agent.replay_capacity if remember else 0
    needed = Replay.nbytes(capacity, frame, num_actions)
    free = available_bytes() // LOCAL_WORLD_SIZE
    if common.novelty_phi is not None and common.device.type == "cpu":
        free -= EpisodicNovelty.nbytes(config.env.num_envs, common.novelty_phi.num_features)
    kept_on = memory_device(needed, common.device)
    # also for one on a GPU, which is saved and loaded by way of the CPU
    if capacity and needed > MOST * free:
        fitting = max(0, int(MOST * free / Replay.nbytes(1, frame, num_actions)))
        raise UserError(
            f"agent.replay_capacity={capacity}: needs {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; {fitting} would fit"
        )
    return Replay(capacity, config.env.num_envs, frame, channels, num_actions, kept_on)
