"""The training loop this project grew from, as a baseline of speed: see `TutorialLoop`.

`python -m icm.bench.tutorial ACTION_REPEAT` runs until it is stopped, see `main`.
"""

import random
import sys
from collections import deque
from dataclasses import dataclass

import cv2
import gym_super_mario_bros  # noqa: F401 (registers the Mario environments)
import gymnasium as gym
import numpy as np
import torch
from gym_super_mario_bros.actions import COMPLEX_MOVEMENT
from nes_py.wrappers import JoypadSpace
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from icm.bench.progress import Report
from icm.envs.wrappers import Env
from icm.models import Fnet, InputNorm, InverseNet, Phi, Qnetwork

ENV_ID = "SuperMarioBros-1-1-v0"  # the level of the default configuration, for equal emulation
SIZE = 42  # height and width of a frame, pixels
FRAME_STACK = 3
ACTION_REPEAT = 6  # frames
BATCH_SIZE = 150
CAPACITY = 1_000  # transitions
SHUFFLE_EVERY = 500  # transitions
DISCOUNT, ETA, BETA, LAMBDA = 0.2, 1.0, 0.2, 0.1
FORWARD_SCALE, INVERSE_SCALE, Q_SCALE = 1.0, 1e4, 1e5
LEARNING_RATE = 1e-3
EPSILON, SOFTMAX_STEPS = 0.15, 1_000  # epsilon-greedy after so many agent steps of softmax
EPISODE_STEPS = 100  # agent steps

type Transition = tuple[Tensor, int, float, Tensor]
"""State, action, game reward, next state; states are float32 (1, 3, 42, 42)."""


def downscale(image: np.ndarray) -> np.ndarray:
    """Shrink and grey one uint8 image (H, W, 3) as the tutorial does: float64 (42, 42) in [0, 1].

    The tutorial's `skimage.transform.resize(image, (42, 42), anti_aliasing=True).max(axis=2)`, up
    to rounding: the same two steps in float64 (Gaussian blur, then bilinear), but in OpenCV, in
    less than half of skimage's time. So the baseline is faster than the tutorial was, and the
    multiple claimed over it smaller.
    """
    # skimage's width of the blur, and its cut-off at four standard deviations
    sigma_y, sigma_x = ((length / SIZE - 1) / 2 for length in image.shape[:2])
    kernel = (2 * round(4 * sigma_x) + 1, 2 * round(4 * sigma_y) + 1)
    border = cv2.BORDER_REFLECT_101
    blurred = cv2.GaussianBlur(image / 255, kernel, sigma_x, sigmaY=sigma_y, borderType=border)
    small = cv2.resize(blurred, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    return np.asarray(small).max(axis=2)


def prepare_frame(image: np.ndarray) -> Tensor:
    """Turn one image into a frame, float32 (1, 42, 42)."""
    return torch.from_numpy(downscale(image)).float().unsqueeze(0)


def prepare_initial_state(image: np.ndarray) -> Tensor:
    """The first image of an episode, three times: float32 (1, 3, 42, 42)."""
    return prepare_frame(image).repeat(FRAME_STACK, 1, 1).unsqueeze(0)


class ListReplay:
    """A list of transitions; once full, each new one replaces a random one."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.memory: list[Transition] = []
        self.added = 0
        self.random = random.Random(seed)
        self.numpy_random = np.random.default_rng(seed)

    def add(self, transition: Transition) -> None:
        """Store one transition; every 500th time the list is shuffled first."""
        self.added += 1
        if self.added % SHUFFLE_EVERY == 0:
            self.random.shuffle(self.memory)
        if len(self.memory) < self.capacity:
            self.memory.append(transition)
        else:
            self.memory[self.numpy_random.integers(self.capacity)] = transition

    def sample(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `size` distinct transitions: states (B, 3, 42, 42), actions (B,), next states."""
        indices = self.numpy_random.choice(len(self.memory), size, replace=False)
        batch = [self.memory[i] for i in indices]
        return (
            torch.cat([state for state, _, _, _ in batch]),
            torch.tensor([action for _, action, _, _ in batch]),
            torch.cat([next_state for _, _, _, next_state in batch]),
        )


@dataclass
class Losses:
    """Scaled losses of one update, detached scalars."""

    q: Tensor
    forward: Tensor
    inverse: Tensor


class TutorialLoop:
    """The tutorial's loop (after chapter 8 of Deep Reinforcement Learning in Action).

    One environment, all six repeated frames prepared one by one, one update of batch 150 per agent
    step, float32 on the CPU, torch's own choice of threads. Its mistakes (`docs/tutorial.md`) are
    kept where they shape the computation. Where costs differ, this code is cheaper: `downscale`,
    `Fnet` (its one-hot is one operation), indexing by tensors instead of lists, one reset per death
    instead of two.

    Args:
        env: a Mario environment with COMPLEX_MOVEMENT, not yet reset.
        batch_size: transitions per update.
        action_repeat: frames that an action is held.
        seed: of everything random but the game.
    """

    def __init__(
        self,
        env: Env,
        batch_size: int = BATCH_SIZE,
        action_repeat: int = ACTION_REPEAT,
        seed: int = 42,
    ) -> None:
        torch.manual_seed(seed)
        self.env, self.batch_size, self.action_repeat = env, batch_size, action_repeat
        shape = (FRAME_STACK, SIZE, SIZE)
        # the tutorial normalises within Phi and Qnetwork, so each pass pays for it anew
        phi, qnetwork = Phi(shape), Qnetwork(shape)
        phi.activation = qnetwork.activation = F.elu  # PyTorch's own
        self.encoder = nn.Sequential(InputNorm("stack", (SIZE, SIZE)), phi)
        self.qnetwork = nn.Sequential(InputNorm("stack", (SIZE, SIZE)), qnetwork)
        self.forward_model, self.inverse_model = Fnet(), InverseNet()
        networks = (self.qnetwork, self.encoder, self.forward_model, self.inverse_model)
        self.optimizer = torch.optim.Adam(
            [parameter for network in networks for parameter in network.parameters()],
            lr=LEARNING_RATE,
        )
        self.replay = ListReplay(CAPACITY, seed)
        self.frames: deque[Tensor] = deque(maxlen=FRAME_STACK)
        self.steps = 0
        self.state = self._reset()

    def _reset(self) -> Tensor:
        self.episode_steps = 0
        state = prepare_initial_state(self.env.reset()[0])
        self.frames.extend(state.unbind(1))  # or an early death would leave too few: it fails there
        return state

    def step(self) -> Losses | None:
        """One agent step and, once the replay holds a batch, one update."""
        self.optimizer.zero_grad()
        action = self._choose(self.qnetwork(self.state))
        self.steps += 1
        self.episode_steps += 1
        game_reward, ended = 0.0, False
        for _ in range(self.action_repeat):
            image, reward, terminated, truncated, _ = self.env.step(action)
            ended = terminated or truncated
            if ended:
                break
            game_reward += float(reward)
            self.frames.append(prepare_frame(image))
        next_state = torch.stack(list(self.frames), dim=1)
        self.replay.add((self.state, action, game_reward, next_state))
        # its check for progress compares a position with itself, so every long episode is cut
        ended = ended or self.episode_steps > EPISODE_STEPS
        self.state = self._reset() if ended else next_state
        if len(self.replay.memory) < self.batch_size:
            return None
        return self._update()

    def _choose(self, q: Tensor) -> int:
        if self.steps <= SOFTMAX_STEPS:
            return int(torch.multinomial(F.softmax(F.normalize(q), dim=1), 1))
        if torch.rand(1) < EPSILON:
            return int(torch.randint(0, 7, (1,)))  # 7 of 12, as there
        return int(torch.argmax(q))

    def _update(self) -> Losses:
        states, actions, next_states = self.replay.sample(self.batch_size)
        features, next_features = self.encoder(states), self.encoder(next_states)
        predicted = self.forward_model(features.detach(), actions)
        squared = F.mse_loss(predicted, next_features.detach(), reduction="none")
        forward_error = FORWARD_SCALE * squared.sum(1)
        guessed = F.softmax(self.inverse_model(features, next_features), dim=1)
        inverse_error = INVERSE_SCALE * F.cross_entropy(guessed, actions, reduction="none")

        reward = forward_error.detach() / ETA
        reward = reward + DISCOUNT * self.qnetwork(next_states).max()  # over the whole batch
        q = self.qnetwork(states)
        target = q.clone()
        target[torch.arange(self.batch_size), actions] = reward
        q_loss = Q_SCALE * F.mse_loss(F.normalize(q), F.normalize(target.detach()))

        # the weights are swapped there
        errors = (1 - BETA) * forward_error + BETA * inverse_error
        loss = errors.mean() + LAMBDA * q_loss
        loss.backward()
        self.optimizer.step()
        return Losses(q_loss.detach(), forward_error.detach().mean(), inverse_error.detach().mean())


def make_env() -> Env:
    """The tutorial's environment: the bare game with its 12 button combinations."""
    return JoypadSpace(gym.make(ENV_ID), COMPLEX_MOVEMENT)


def main(action_repeat: int) -> None:
    """Run the loop; once it learns, print a JSON line on its speed now and then."""
    loop = TutorialLoop(make_env(), action_repeat=action_repeat)
    for _ in range(BATCH_SIZE // 10):
        loop.step()
    loop.replay.memory *= 10  # a batch: its content does not change the time
    report = Report(loop.steps)
    while True:
        loop.step()
        report(loop.steps)


if __name__ == "__main__":
    main(int(sys.argv[1]))
