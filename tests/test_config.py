"""Values out of their range are refused by name; test_scripts.py shows what a user sees of it."""

import copy
from dataclasses import asdict, fields

import pytest
from conftest import settings

from icm.agents.policy import ValuePolicy
from icm.bench.suite import BenchConfig
from icm.config import (
    AGENTS,
    CURIOSITIES,
    RANGES,
    Config,
    DQNConfig,
    EnvConfig,
    EvaluateConfig,
    PlayConfig,
    _check,
    _check_ranges,
    flat,
)
from icm.errors import UserError
from icm.soak.suite import SoakConfig


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("agent.discount=1.5", ["agent.discount=1.5", "at least 0 and below 1"]),
        (
            "agent=ppo agent.discount=[[0,0.9],[9,1]]",
            ["agent.discount=[[0, 0.9], [9, 1]]", "below 1"],
        ),
        ("agent=ppo agent.discount=[[5,0.9],[0,0.5]]", ["agent.discount", "in order"]),
        ("agent=ppo agent.discount=far", ["agent.discount=far", "a number"]),
        ("practice=1", ["practice=1.0", "below 1"]),
        ("practice=0.01", ["practice=0.01", "env.num_envs=32", "none would practise"]),
        ("agent.warmup_steps=0", ["agent.warmup_steps=0", "input_norm=standard"]),
        ("agent.advantage_learning=1", ["agent.advantage_learning=1.0", "below 1"]),
        ("agent.lr=nan", ["agent.lr=nan"]),
        ("agent.q_weight=nan", ["agent.q_weight=nan", "a finite number"]),
        ("curiosity.coef=inf", ["curiosity.coef=inf", "a finite number"]),
        ("agent.policy.epsilon=[[nan,0.1]]", ["agent.policy.epsilon", "knots in order"]),
        ("env.frame_stack=256", ["env.frame_stack=256", "at most 255"]),
        ("agent.lr_final=2", ["agent.lr_final=2.0", "between 0 and 1"]),
        ("curiosity.episodic_scale=0", ["curiosity.episodic_scale=0.0", "1e9, or null"]),
        ("curiosity.episodic_scale=1e39", ["curiosity.episodic_scale=1e+39", "1e9, or null"]),
        ("curiosity.reward_half_life=1e-323", ["curiosity.reward_half_life=", "1e-9"]),
        ("agent.batch_size=6251", ["agent.batch_size=6251", "at most 6250"]),
        ("agent=ppo agent.replayed=6251", ["agent.replayed=6251", "at most 6250"]),
        ("preset=whole_game", ["agent.discount: must be a single value here, not [[200000, 0.95]"]),
        ("curiosity.surprise_limit=0.5", ["curiosity.surprise_limit=0.5", "at least 1, or null"]),
        ("agent.policy.epsilon=1.1", ["agent.policy.epsilon=1.1", "between 0 and 1"]),
        ("agent.policy.epsilon=null", ["agent.policy.epsilon=None", "a number, or knots"]),
        ("env.noisy_tv=null", ["env.noisy_tv: must be a single value here, not null"]),
        (f"agent.policy.epsilon=[[{10**400},0.1]]", ["agent.policy.epsilon", "knots in order"]),
        ("agent.policy.epsilon=[[5,1],[0,1]]", ["agent.policy.epsilon", "in order"]),
        ("agent.policy.epsilon=[[0,1.5]]", ["agent.policy.epsilon=[[0, 1.5]]", "between 0 and 1"]),
        (
            "agent.policy.temperature=[[0,-1]]",
            ["agent.policy.temperature=[[0, -1]]", "between 0 and 1e9"],
        ),
        (f"agent.policy.temperature={10**400}", ["agent.policy.temperature", "between 0 and 1e9"]),
        ("agent.policy.temperature=[]", ["agent.policy.temperature=[]", "knots in order"]),
        (f"seed={2**63}", [f"seed={2**63}", "below 2**63"]),
        ("agent.replay_capacity=5", ["agent.replay_capacity=5", "at least"]),
        ("env.actions=all", ["env.actions=all", "complex"]),
        ("env.sticky_probability=1", ["env.sticky_probability=1.0", "below 1"]),
        ("env.crop=[1,2,3]", ["env.crop=[1, 2, 3]", "in pixels"]),
        ("env.size=8", ["env.size=8", "at least 16"]),
        ("env.size=257", ["env.size=257", "at most 256"]),
        ("curiosity.hidden=1000000", ["curiosity.hidden=1000000", "at most 16384"]),
        ("agent=ppo agent.convolutions=0", ["agent.convolutions=0", "at least 1"]),
    ],
)
def test_a_value_out_of_range_is_refused(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        settings("agent=dqn", *override.split())
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_every_range_is_of_a_setting_that_there_is() -> None:
    kinds = {"env": [EnvConfig], "agent": AGENTS.values(), "curiosity": CURIOSITIES.values()}
    known = set(flat(asdict(settings())))
    for group, classes in kinds.items():
        known |= {f"{group}.{field.name}" for kind in classes for field in fields(kind)}
    for script in (PlayConfig, EvaluateConfig, BenchConfig, SoakConfig):
        known |= {field.name for field in fields(script)}
    named = {name for names in RANGES.values() for name in names.split()}
    assert len(named) > 60
    assert named <= known


WEIGHTS = (
    *("agent.entropy_coef", "agent.value_coef", "agent.q_weight"),
    *("curiosity.coef", "curiosity.extrinsic_coef", "curiosity.eta"),
    *("curiosity.forward_scale", "curiosity.inverse_scale"),
)
"""Which may be negative."""


def check(config: Config) -> None:
    """What `parse_config` checks beyond types."""
    _check_ranges(config)
    _check(config)


@pytest.mark.parametrize("given", ["agent=dqn", "agent=ppo", "agent=pqn curiosity=disagreement"])
def test_no_other_number_may_be_negative(given: str) -> None:
    base = settings(*given.split())
    numbers = {name: value for name, value in flat(asdict(base)).items() if name not in WEIGHTS}
    for name, value in numbers.items():
        if type(value) in (int, float):
            config = copy.deepcopy(base)
            group, _, key = name.rpartition(".")
            setattr(getattr(config, group) if group else config, key, -1)
            with pytest.raises(UserError, match=f"^{name}=-1"):
                check(config)


def test_a_schedule_may_be_a_number() -> None:
    agent = settings("agent=dqn", "agent.policy.epsilon=0.1", "agent.policy.temperature=2").agent
    assert isinstance(agent, DQNConfig)
    assert ValuePolicy(agent.policy, warmup_steps=100).settings(100) == (2.0, 0.1)


def test_large_scale_goes_with_any_curiosity_but_none() -> None:
    for name in ("icm", "rnd", "disagreement"):
        assert settings("preset=large_scale", f"curiosity={name}").curiosity.name == name
    with pytest.raises(UserError, match=r"curiosity\.hidden"):
        settings("preset=large_scale", "curiosity=none")
