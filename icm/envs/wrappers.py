"""Wrappers that turn any image environment with discrete actions into states for the networks.

None of them knows a game; Super Mario's are in `icm.envs.mario`. `changing` names the attributes
that a wrapper changes when it steps, for `icm.envs.snapshots`.
"""

from collections.abc import Callable
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from icm.errors import UserError

type Env = gym.Env[Any, Any]


class StickyActions(gym.wrappers.StickyAction[Any, Any]):
    """With a fixed probability a frame executes the previous action (Machado et al. 2018, 5.2)."""

    changing = ("last_action",)  # a step leaves all else in it unchanged


class ActionRepeat(gym.Wrapper[Any, Any, Any, Any]):
    """Holds an action for `repeat` frames, or until the episode ends; rewards add up.

    Args:
        env: to step frame by frame.
        repeat: frames.
        on_frame: called with `env` after every frame: a video needs them all.
        draw: told before every frame whether to draw it: only the last one is looked at.
    """

    def __init__(
        self,
        env: Env,
        repeat: int,
        on_frame: Callable[[Env], None] | None = None,
        draw: Callable[[bool], None] | None = None,
    ) -> None:
        super().__init__(env)
        self.repeat = repeat
        self.on_frame = on_frame
        self.draw = draw

    def step(self, action: Any) -> Any:
        """Step `repeat` frames."""
        total = 0.0
        for frame in range(1, self.repeat + 1):
            if self.draw is not None:
                self.draw(frame == self.repeat)
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if self.on_frame is not None:
                self.on_frame(self.env)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


class NoopStart(gym.Wrapper[Any, Any, Any, Any]):
    """Begins each episode with 0 to `noop_max` frames of action 0 (Mnih et al. 2015)."""

    def __init__(self, env: Env, noop_max: int) -> None:
        super().__init__(env)
        self.noop_max = noop_max

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Reset, then wait."""
        observation, info = self.env.reset(seed=seed, options=options)
        for _ in range(self.np_random.integers(self.noop_max + 1)):
            observation, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                observation, info = self.env.reset(options=options)
        return observation, info


class GreyImage(gym.ObservationWrapper[Any, Any, Any]):
    """Crops an image, shrinks it by area averaging and turns it grey: uint8 (size, size).

    Grey is the maximum of a pixel's channels, as in the tutorial, not its luminance: at 42 x 42,
    Mario differs from the sky of level 1-1 by up to 88 of 255, in luminance by at most 20.

    Args:
        env: with uint8 observations (H, W, 3) or (H, W).
        size: height and width of the result, pixels.
        crop: pixels cut off at the top, bottom, left and right of the original image.

    Raises:
        UserError: nothing is left of the image.
    """

    def __init__(self, env: Env, size: int, crop: tuple[int, int, int, int]) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Box)
        height, width = env.observation_space.shape[:2]
        top, bottom, left, right = crop
        if top + bottom >= height or left + right >= width:
            raise UserError(f"env.crop={list(crop)}: nothing is left of images of {height}x{width}")
        self.rows = slice(top, height - bottom)
        self.columns = slice(left, width - right)
        self.size = size
        self.observation_space = spaces.Box(0, 255, (size, size), np.uint8)

    def observation(self, observation: Any) -> Any:
        """Turn one image into one frame. The result is a copy, never a view of the emulator."""
        image = np.ascontiguousarray(observation[self.rows, self.columns])
        small = cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA)
        if small.ndim == 2:
            return small
        red, green, blue = np.moveaxis(small, 2, 0)
        return np.maximum(np.maximum(red, green), blue)  # in a tenth of small.max(2)'s time


class NoisyTV(gym.Wrapper[Any, Any, Any, Any]):
    """Shows unpredictable noise in a corner of the image (Burda et al. 2018, section 5).

    A control for curiosity: an agent paid for what it cannot predict may look at it for ever.

    Args:
        env: with observations uint8 (H, W).
        switched: whether the noise changes only with action 0, instead of at every step.
    """

    changing = ("noise",)

    def __init__(self, env: Env, switched: bool) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Box)
        height, width = env.observation_space.shape
        self.shape = height // 3, width // 3
        self.switched = switched

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Reset and show noise."""
        image, info = self.env.reset(seed=seed, options=options)
        self.noise = self._noise()
        return self._show(image), info

    def step(self, action: Any) -> Any:
        """Step and show noise."""
        image, reward, terminated, truncated, info = self.env.step(action)
        if action == 0 or not self.switched:
            self.noise = self._noise()
        return self._show(image), reward, terminated, truncated, info

    def _noise(self) -> np.ndarray:
        return self.np_random.integers(0, 256, self.shape, dtype=np.uint8)

    def _show(self, image: np.ndarray) -> np.ndarray:
        image[: self.shape[0], : self.shape[1]] = self.noise
        return image


class FrameStack(gym.wrappers.FrameStackObservation[Any, Any, Any]):
    """Observes the latest images, uint8 (stack_size, H, W), oldest first.

    A new episode repeats its first image.
    """

    changing = ("obs_queue",)


class EpisodeStatistics(gym.Wrapper[Any, Any, Any, Any]):
    """Adds `info["episode"]` to an episode's last step: its length, game reward and progress.

    What a game-specific wrapper below left in `info["game_progress"]` is copied into it.
    """

    changing = ("length", "reward")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Start counting."""
        self.length, self.reward = 0, 0.0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        """Count."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.length += 1
        self.reward += float(reward)
        progress = info.pop("game_progress", {})
        if terminated or truncated:
            info["episode"] = {"length": self.length, "reward": self.reward, **progress}
        return observation, reward, terminated, truncated, info


class AgentView(gym.Wrapper[Any, Any, Any, Any]):
    """The outermost wrapper: keeps only the named info keys, and has a spec to make it again.

    A game's info has dozens of keys, and each would cross a process boundary at every step.
    """

    def __init__(self, env: Env, keys: tuple[str, ...], spec: EnvSpec) -> None:
        super().__init__(env)
        self.keys = keys
        self._cached_spec = spec  # what Wrapper.spec returns

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Reset with a short info."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, self._short(info)

    def step(self, action: Any) -> Any:
        """Step with a short info."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, self._short(info)

    def _short(self, info: dict[str, Any]) -> dict[str, Any]:
        return {key: info[key] for key in self.keys if key in info}
