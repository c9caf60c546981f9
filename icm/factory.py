"""Puts an agent together from its settings."""

import torch

from icm.agents.dqn import DQN
from icm.compilation import Compiler, resolve_compile
from icm.config import Config
from icm.curiosity import ICM
from icm.device import resolve_precision
from icm.errors import UserError
from icm.memory import available_bytes, memory_device
from icm.models import Fnet, InputNorm, InverseNet, Phi, Qnetwork
from icm.replay import Replay


def build_agent(
    config: Config,
    state_shape: tuple[int, int, int],
    num_actions: int,
    device: torch.device,
    *,
    remember: bool = True,
) -> DQN:
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
    channels, height, width = state_shape
    curiosity, told = config.curiosity, config.agent.previous_action
    phi = Phi(state_shape)
    icm = ICM(
        phi,
        Fnet(phi.num_features, num_actions, curiosity.hidden, told),
        InverseNet(
            phi.num_features, num_actions, curiosity.hidden, curiosity.inverse_dropout, told
        ),
        beta=curiosity.beta,
        eta=curiosity.eta,
        reduction=curiosity.reduction,
        forward_scale=curiosity.forward_scale,
        inverse_scale=curiosity.inverse_scale,
        target_tau=curiosity.target_tau,
        normalize_features=curiosity.normalize_features,
        policy_prior=curiosity.policy_prior,
    )
    capacity = config.agent.replay_capacity if remember else 0
    needed, free = Replay.nbytes(capacity, (height, width), num_actions), available_bytes()
    kept_on = memory_device(needed, device)
    if kept_on.type == "cpu" and needed > free:
        fitting = int(0.5 * free / Replay.nbytes(1, (height, width), num_actions))
        raise UserError(
            f"agent.replay_capacity={capacity}: needs {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; {fitting} would fit"
        )
    updates = config.total_steps // config.agent.steps_per_update
    compiling = resolve_compile(config.compile, updates) if remember else "off"
    return DQN(
        Qnetwork(state_shape, num_actions, config.agent.hidden, told),
        icm,
        InputNorm(config.agent.input_norm, (height, width)),
        Replay(capacity, config.env.num_envs, (height, width), channels, num_actions, kept_on),
        config.agent,
        curiosity,
        device,
        resolve_precision(config.precision, device),
        Compiler(compiling, device),
        config.seed,
    )
