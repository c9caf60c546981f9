"""Stable-Baselines3 on the same game, as a baseline of speed.

`python -m icm.bench.sb3 ppo|dqn ACTION_REPEAT` runs until it is stopped, see `main`. The package is
the optional extra `bench`.

The wrappers are its usual ones (84x84, grey, 4 frames stacked), the settings those of its own tuned
collection for Atari games: 8 processes with one environment each for PPO, one environment for DQN.
Only PPO's rollouts and DQN's replay memory are shorter: as much work per step.
"""

import sys
from functools import partial

import gym_super_mario_bros  # noqa: F401 (registers the Mario environments)
import gymnasium as gym
from gym_super_mario_bros.actions import COMPLEX_MOVEMENT
from nes_py.wrappers import JoypadSpace
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv, WarpFrame
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack

from icm.bench.progress import Report
from icm.bench.tutorial import ENV_ID
from icm.envs.wrappers import Env

PPO_ENVS = 8
LEARNING_STARTS = 200  # agent steps of DQN without learning


def make_env(action_repeat: int) -> Env:
    """One environment."""
    env = JoypadSpace(gym.make(ENV_ID), COMPLEX_MOVEMENT)
    return WarpFrame(MaxAndSkipEnv(env, skip=action_repeat))


class Reporting(BaseCallback):
    """Reports after whole rounds of acting and learning only."""

    report: Report | None = None

    def _on_rollout_start(self) -> None:
        if self.num_timesteps > LEARNING_STARTS:
            self.report = self.report or Report(self.num_timesteps)
            self.report(self.num_timesteps)

    def _on_step(self) -> bool:
        return True


def ppo(action_repeat: int) -> BaseAlgorithm:
    """PPO in eight processes."""
    envs: VecEnv = SubprocVecEnv([partial(make_env, action_repeat)] * PPO_ENVS)
    return PPO(
        "CnnPolicy", VecFrameStack(envs, 4), n_steps=32, batch_size=256, n_epochs=4, device="cpu"
    )


def dqn(action_repeat: int) -> BaseAlgorithm:
    """DQN."""
    envs: VecEnv = DummyVecEnv([partial(make_env, action_repeat)])
    return DQN(
        "CnnPolicy",
        VecFrameStack(envs, 4),
        buffer_size=10_000,
        learning_starts=LEARNING_STARTS,
        batch_size=32,
        train_freq=4,
        gradient_steps=1,
        device="cpu",
    )


def main(algorithm: str, action_repeat: int) -> None:
    """Learn for ever; report on the speed now and then."""
    model = {"ppo": ppo, "dqn": dqn}[algorithm](action_repeat)
    model.learn(sys.maxsize, callback=Reporting())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
