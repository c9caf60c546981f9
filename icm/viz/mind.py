"""The agent's mind beside its game: what it sees, what it wants, what surprises it."""

from collections import deque
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from icm.playing import Moment

WIDTH, HEIGHT = 512, 720
MARGIN = 16
REMEMBERED = 160  # agent steps that the curves show
FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")

BACKGROUND, TEXT, FAINT = (18, 20, 26), (235, 235, 235), (110, 115, 125)
CHOSEN, USUAL, GUESS = (255, 176, 59), (70, 120, 190), (120, 220, 140)
SURPRISE, REWARD = (235, 90, 100), (250, 220, 110)


class MindPanel:
    """Draws moments, one after the other, RGB uint8 (HEIGHT, WIDTH, 3).

    Args:
        actions: their names.
    """

    def __init__(self, actions: list[str]) -> None:
        self.actions = actions
        self.surprises: deque[float] = deque(maxlen=REMEMBERED)
        self.rewards: deque[float] = deque(maxlen=REMEMBERED)
        self.title, self.text, self.small = (ImageFont.truetype(FONT, n) for n in (22, 15, 13))

    def draw(self, moment: Moment) -> np.ndarray:
        """Draw the next moment."""
        self.surprises.append(moment.surprise)
        self.rewards.append(moment.reward)
        image = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
        pen = ImageDraw.Draw(image)
        pen.text((MARGIN, 12), moment.where, TEXT, self.title)
        self._see(image, pen, moment.state, 52)
        self._want(pen, moment, 196)
        bottom = HEIGHT - MARGIN - 8
        self._curve(pen, "surprise", self.surprises, SURPRISE, bottom - 168, bottom - 96)
        self._curve(pen, "intrinsic reward", self.rewards, REWARD, bottom - 72, bottom)
        return np.asarray(image)

    def _see(self, image: Image.Image, pen: ImageDraw.ImageDraw, state: np.ndarray, y: int) -> None:
        """The frames of a state, the newest at the right."""
        pen.text((MARGIN, y), "what it sees, the newest at the right", FAINT, self.small)
        size = max(min((WIDTH - MARGIN) // len(state) - MARGIN, 120), 1)
        for number, frame in enumerate(state):
            large = cv2.resize(frame, (size, size), interpolation=cv2.INTER_NEAREST)
            at = MARGIN + number * (size + MARGIN), y + 22
            image.paste(Image.fromarray(large).convert("RGB"), at)

    def _want(self, pen: ImageDraw.ImageDraw, moment: Moment, y: int) -> None:
        """Probabilities of the actions, the chosen one, and the guess of the inverse model."""
        pen.text((MARGIN, y), "what it may do, and does", FAINT, self.small)
        if moment.guess is not None:
            guessed = "what the inverse model takes it for"
            pen.text((WIDTH - MARGIN, y), guessed, GUESS, self.small, anchor="ra")
        left, right = 130, WIDTH - MARGIN
        row = min(24, 276 // len(self.actions))
        y += 24
        for action, name in enumerate(self.actions):
            is_chosen = action == moment.action
            top = y + action * row
            pen.text((MARGIN, top), name, CHOSEN if is_chosen else TEXT, self.text)
            end = left + float(moment.probabilities[action]) * (right - left)
            low = max(top + row - 8, top + 3)  # thin bars for very many actions
            pen.rectangle((left, top + 3, end, low), CHOSEN if is_chosen else USUAL)
            if moment.guess is not None:
                end = left + float(moment.guess[action]) * (right - left)
                pen.rectangle((left, low + 1, end, low + 3), GUESS)

    def _curve(
        self,
        pen: ImageDraw.ImageDraw,
        name: str,
        values: deque[float],
        colour: tuple[int, int, int],
        top: int,
        bottom: int,
    ) -> None:
        """The latest values, the newest at the right, from 0 to the greatest of them."""
        pen.text((MARGIN, top - 18), name, colour, self.small)
        pen.text((WIDTH - MARGIN, top - 18), f"{values[-1]:.2f}", colour, self.small, anchor="ra")
        pen.line((MARGIN, bottom, WIDTH - MARGIN, bottom), FAINT)
        scale = (bottom - top) / max(*values, 1e-9)
        step = (WIDTH - 2 * MARGIN) / (REMEMBERED - 1)
        first = WIDTH - MARGIN - (len(values) - 1) * step
        points = [(first + i * step, bottom - v * scale) for i, v in enumerate(values)]
        pen.line(points, colour, 2)


def enlarged(game: np.ndarray) -> np.ndarray:
    """A picture of a game, RGB uint8 (H, W, 3), scaled to the height of a panel."""
    width = round(game.shape[1] * HEIGHT / game.shape[0] / 16) * 16
    return cv2.resize(game, (width, HEIGHT), interpolation=cv2.INTER_NEAREST)


def beside(game: np.ndarray, panel: np.ndarray) -> np.ndarray:
    """An enlarged picture of a game and a panel at its right."""
    return np.hstack((enlarged(game), panel))
