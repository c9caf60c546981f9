"""A window in which an agent or a person plays."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

os.environ["PYGAME_HIDE_SUPPORT_PROMPT"] = "1"  # it would be among the results
import pygame

from icm.agents.base import Agent
from icm.config import FASTEST, SLOWEST
from icm.errors import UserError
from icm.files import numbered
from icm.playing import Moment, Player
from icm.viz.mind import (
    BACKGROUND,
    CHOSEN,
    FAINT,
    FONT,
    HEIGHT,
    TEXT,
    WIDTH,
    MindPanel,
    beside,
    enlarged,
)
from icm.viz.video import FPS

BAR = 52  # pixels below the picture
USUAL_WIDTH = 768  # of an NES picture

BUTTONS = {
    pygame.K_RIGHT: "right",
    pygame.K_LEFT: "left",
    pygame.K_UP: "up",
    pygame.K_DOWN: "down",
    pygame.K_x: "A",
    pygame.K_z: "B",
}
"""Buttons of a person who plays, by key."""

HELP = "Space pause · N one step · + - speed · R restart · PgUp PgDn checkpoint · T you · Esc close"
HELP_OF_PERSON = "arrows, X is A, Z is B · T hands back · Space pause · R restart · Esc close"


class Window:
    """Shows a player, and obeys keys.

    Args:
        player: plays; it must be watched.
        path: its checkpoint; others of the same folder can be chosen.
        load: loads agent and agent step from a checkpoint; raises UserError.
        mind: whether to show what goes on in the agent.
        speed: of the game.

    Raises:
        UserError: no window can be opened.
    """

    def __init__(
        self,
        player: Player,
        path: Path,
        load: Callable[[Path], tuple[Agent, int]],
        mind: bool,
        speed: float,
    ) -> None:
        self.player, self.path, self.load, self.speed = player, path, load, speed
        self.panel = MindPanel(player.actions) if mind else None
        self.is_open, self.is_paused, self.person_plays = True, False, False
        self.steps = 0  # to play even if paused
        self.number = 0  # of the episode
        self.held: set[str] = set()  # buttons
        self.message = ""
        self.picture = np.zeros((HEIGHT, USUAL_WIDTH + (WIDTH if mind else 0), 3), np.uint8)
        self.commands: dict[int, Callable[[], None]] = {
            pygame.K_SPACE: self._pause,
            pygame.K_n: self._one_step,
            pygame.K_PLUS: lambda: self._change_speed(2),
            pygame.K_EQUALS: lambda: self._change_speed(2),
            pygame.K_KP_PLUS: lambda: self._change_speed(2),
            pygame.K_MINUS: lambda: self._change_speed(1 / 2),
            pygame.K_KP_MINUS: lambda: self._change_speed(1 / 2),
            pygame.K_r: self._restart,
            pygame.K_PAGEUP: lambda: self._choose(-1),
            pygame.K_PAGEDOWN: lambda: self._choose(1),
            pygame.K_t: self._take_over,
            pygame.K_ESCAPE: self._close,
        }
        try:
            pygame.display.init()
            if pygame.display.get_driver() == "offscreen" and "SDL_VIDEODRIVER" not in os.environ:
                raise pygame.error("the display does not answer")
            pygame.font.init()
            self.font = pygame.font.Font(FONT, 15)
            self._resize(self.picture.shape[1], HEIGHT)
        except pygame.error as error:
            raise UserError(f"render=human: no window can be opened here ({error})") from None
        pygame.display.set_caption("icm")
        self.clock = pygame.time.Clock()

    def play(self, episodes: int) -> Iterator[Moment]:
        """Play until the window is closed; pause after `episodes` episodes."""
        self.player.begin(self.number)
        while self._still_open():
            if self.is_paused and not self.steps:
                self._draw()
                self.clock.tick(FPS)
                continue
            self.steps = max(0, self.steps - 1)
            moment = self.player.move(self._action_of_person() if self.person_plays else None)
            self._show(moment)
            yield moment
            if moment.episode is not None:
                self.number += 1
                self.player.begin(self.number)
                if self.number == episodes:
                    self.is_paused = True
                    self.message = "all episodes have been played; Space goes on"

    def close(self) -> None:
        """Close it."""
        pygame.display.quit()

    # --- keys -----------------------------------------------------------------------------------

    def _still_open(self) -> bool:
        """Handle keys; False if the window was closed."""
        for event in pygame.event.get():
            if event.type == pygame.QUIT:
                self._close()
            elif event.type == pygame.KEYDOWN:
                if event.key in BUTTONS:
                    self.held.add(BUTTONS[event.key])
                elif event.key in self.commands:
                    self.message = ""
                    self.commands[event.key]()
            elif event.type == pygame.KEYUP:
                self.held.discard(BUTTONS.get(event.key, ""))
        return self.is_open

    def _action_of_person(self) -> int:
        """The action that presses most of the held buttons and no other."""
        presses = [set(name.split()) - {"NOOP"} for name in self.player.actions]
        possible = [action for action, buttons in enumerate(presses) if buttons <= self.held]
        return max(possible, key=lambda action: len(presses[action]))

    def _pause(self) -> None:
        self.is_paused = not self.is_paused

    def _one_step(self) -> None:
        self.is_paused, self.steps = True, self.steps + 1

    def _change_speed(self, factor: float) -> None:
        self.speed = min(max(self.speed * factor, SLOWEST), FASTEST)

    def _restart(self) -> None:
        self.player.begin(self.number)
        self.message = "restarted"

    def _choose(self, direction: int) -> None:
        """Switch to the next or previous checkpoint of the same folder."""
        found = numbered(self.path.parent, "step")
        steps = [path.name for path in found]
        if self.path.name in steps:
            at = steps.index(self.path.name) + direction
        else:  # latest.pt is the last of them
            at = len(found) - 1 + min(direction, 0)
        if not 0 <= at < len(found):
            self.message = "there is no other checkpoint in that direction"
            return
        try:
            self.player.take(*self.load(found[at]))
            self.path = found[at]
        except UserError as error:
            self.message = str(error)

    def _take_over(self) -> None:
        words = {word for name in self.player.actions for word in name.split()}
        if "NOOP" not in words or not words <= {"NOOP", *BUTTONS.values()}:
            self.message = "the actions of this game are no buttons"
            return
        self.person_plays = not self.person_plays

    def _close(self) -> None:
        self.is_open = False

    # --- drawing --------------------------------------------------------------------------------

    def _show(self, moment: Moment) -> None:
        """Show the frames of a moment at the speed of the game; not all if it is fast."""
        mind = self.panel.draw(moment) if self.panel else None
        shown = moment.frames[:: max(1, round(self.speed))]
        for frame in shown:
            self.picture = enlarged(frame) if mind is None else beside(frame, mind)
            self._draw()
            self.clock.tick(FPS * self.speed * len(shown) / len(moment.frames))

    def _resize(self, width: int, height: int) -> None:
        """Make room for a picture; the person may change the scale."""
        size = width, height + BAR
        self.screen = pygame.display.set_mode(size, pygame.SCALED | pygame.RESIZABLE)

    def _draw(self) -> None:
        height, width, _ = self.picture.shape
        if self.screen.get_size() != (width, height + BAR):
            self._resize(width, height)
        self.screen.fill(BACKGROUND)
        picture = pygame.image.frombuffer(self.picture.tobytes(), (width, height), "RGB")
        self.screen.blit(picture, (0, 0))
        state = [self.path.name, f"speed {self.speed:g}", "paused" if self.is_paused else ""]
        policy = "greedy" if self.player.greedy else "sampled"
        state.insert(1, "you play" if self.person_plays else policy)
        line = " · ".join(word for word in (*state, self.message) if word)
        self.screen.blit(self.font.render(line, True, TEXT), (12, height + 5))
        keys, colour = (HELP_OF_PERSON, CHOSEN) if self.person_plays else (HELP, FAINT)
        self.screen.blit(self.font.render(keys, True, colour), (12, height + 27))
        pygame.display.flip()
