"""The window that an agent is watched in, without a display."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pygame
import pytest
import torch

from icm.agents.base import Agent
from icm.config import FASTEST, SLOWEST, GameConfig
from icm.errors import UserError
from icm.playing import Moment, Player, load_agent
from icm.viz.window import BAR, FPS, Window

pytestmark = pytest.mark.filterwarnings("ignore:no fast renderer")  # of the driver

# episodes are cut after 6 agent steps
GAME = GameConfig(None, stuck_steps=6, sticky_probability=None, emulator="libretro", core=None)


def load(path: Path) -> tuple[Agent, int]:
    agent, _, step = load_agent(path, torch.device("cpu"), GAME)
    return agent, step


@pytest.fixture
def window(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Window]:
    """A window on the latest checkpoint of a folder with two, and a damaged one before them."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    latest = trained / "checkpoints" / "latest.pt"
    for step in (64, 96):
        shutil.copy(latest, tmp_path / f"step_{step:09d}.pt")
    (tmp_path / "step_000000032.pt").write_text("damaged")
    agent, config, step = load_agent(latest, torch.device("cpu"), GAME)
    with Player(agent, config, step, greedy=True, seed=3, is_watched=True) as player:
        window = Window(player, tmp_path / "latest.pt", load, mind=True, speed=8)
        yield window
        window.close()


def press(*keys: int) -> None:
    for key in keys:
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))


def release(key: int) -> None:
    pygame.event.post(pygame.event.Event(pygame.KEYUP, key=key))


def test_a_window_shows_the_game_and_the_mind(window: Window) -> None:
    moments = window.play(1)
    moment = next(moments)
    assert len(moment.frames) == 6
    assert window.screen.get_size() == (1280, 720 + BAR)
    shown = pygame.surfarray.array3d(window.screen).swapaxes(0, 1)
    assert (shown[1:720:3, 1:768:3] == moment.frames[0]).all(2).mean() > 0.9
    assert shown[:720, 768:].std() > 10
    assert shown[720:].std() > 10


def test_a_pause_before_the_first_step_shows_that_it_is_one(window: Window) -> None:
    press(pygame.K_SPACE)
    assert window._still_open()
    window._draw()
    assert window.screen.get_size() == (1280, 720 + BAR)
    assert pygame.surfarray.array3d(window.screen)[:, 720:].std() > 10


def test_a_moment_takes_the_time_it_should(window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    monkeypatch.setattr(window, "clock", SimpleNamespace(tick=rates.append))
    for speed in (0.5, 1, 3, 4, 5, 8, 10):
        rates.clear()
        window.speed = speed
        next(window.play(1))
        assert sum(1 / rate for rate in rates) == pytest.approx(6 / (FPS * speed))
        assert max(rates) <= 2 * FPS  # no more pictures than a screen shows


def test_keys_pause_and_go_on_step_by_step(window: Window) -> None:
    moments, seen = window.play(9), list[Moment]()
    seen.append(next(moments))
    # a paused window yields nothing until it is told to step
    press(pygame.K_SPACE, pygame.K_n, pygame.K_n)
    seen += [next(moments), next(moments)]
    assert window.is_paused
    press(pygame.K_SPACE)
    seen.append(next(moments))
    assert not window.is_paused
    assert (seen[1].state[-1] == seen[2].state[-2]).all()


def test_a_paused_window_can_be_closed(window: Window) -> None:
    moments = window.play(9)
    next(moments)
    press(pygame.K_SPACE, pygame.K_ESCAPE)
    assert list(moments) == []
    pygame.event.clear()
    window.is_open = True
    pygame.event.post(pygame.event.Event(pygame.QUIT))
    assert list(window.play(9)) == []


def test_keys_change_the_speed_within_limits(window: Window) -> None:
    moments = window.play(9)
    for keys, speed in (
        ([pygame.K_MINUS], 4),
        ([pygame.K_PLUS, pygame.K_EQUALS], FASTEST),
        ([pygame.K_KP_MINUS] * 9, SLOWEST),
        ([pygame.K_KP_PLUS] * 9, FASTEST),
    ):
        press(*keys)
        next(moments)
        assert window.speed == speed


def test_a_restart_begins_the_same_episode_again(window: Window) -> None:
    moments = window.play(9)
    first = next(moments)
    next(moments)
    press(pygame.K_r)
    again = next(moments)
    assert (again.state == first.state).all()
    episodes = []
    while len(episodes) < 2:
        moment = next(moments)
        if moment.episode is not None:
            episodes.append(moment.episode)
    assert [episode["seed"] for episode in episodes] == [3, 4]


def test_after_its_episodes_it_pauses_and_goes_on_if_asked(window: Window) -> None:
    moments = window.play(1)
    while (moment := next(moments)).episode is None:
        pass
    assert moment.episode["length"] < 30
    press(pygame.K_SPACE)  # it has paused
    assert next(moments).episode is None
    assert not window.is_paused


def test_a_person_takes_over_and_hands_back(window: Window) -> None:
    moments = window.play(9)
    names = window.player.actions

    def taken() -> str:
        return names[next(moments).action]

    press(pygame.K_t)
    assert taken() == "NOOP"
    press(pygame.K_RIGHT)
    assert taken() == "right"
    press(pygame.K_x, pygame.K_z)
    assert taken() == "right A B"
    release(pygame.K_RIGHT)
    release(pygame.K_z)
    assert taken() == "A"
    press(pygame.K_DOWN)  # no action is both
    assert taken() in ("A", "down")
    press(pygame.K_t)
    moment = next(moments)
    assert moment.action == np.argmax(moment.probabilities)


def test_of_few_actions_the_one_that_fits_best_is_taken(window: Window) -> None:
    window.player.actions = ["NOOP", "right", "right A", "right B", "right A B"]
    press(pygame.K_t, pygame.K_x)
    moments = window.play(9)
    assert next(moments).action == 0  # A alone is not among them
    press(pygame.K_RIGHT)
    assert next(moments).action == 2


def test_other_games_are_not_played_by_hand(window: Window) -> None:
    window.player.actions = ["0", "1"]
    press(pygame.K_t)
    next(window.play(9))
    assert not window.person_plays
    assert "no buttons" in window.message


def test_checkpoints_of_the_folder_can_be_chosen(window: Window) -> None:
    moments = window.play(9)
    before = window.player.agent
    for key, name, words in (
        (pygame.K_PAGEUP, "step_000000064.pt", ""),
        (pygame.K_PAGEUP, "step_000000064.pt", "damaged"),
        (pygame.K_PAGEDOWN, "step_000000096.pt", ""),
        (pygame.K_PAGEDOWN, "step_000000096.pt", "no other"),
    ):
        press(key)
        next(moments)
        assert window.path.name == name
        assert words in window.message
    assert window.player.agent is not before


def test_a_window_that_cannot_be_opened_is_refused(
    window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise pygame.error("no such driver")

    monkeypatch.setattr(pygame.display, "set_mode", fail)
    with pytest.raises(UserError, match="no window can be opened here"):
        Window(window.player, window.path, load, mind=False, speed=1)
    monkeypatch.delenv("SDL_VIDEODRIVER")  # SDL's choice where no display answers:
    monkeypatch.setattr(pygame.display, "get_driver", lambda: "offscreen")
    with pytest.raises(UserError, match="the display does not answer"):
        Window(window.player, window.path, load, mind=False, speed=1)


def test_a_paused_window_waits_until_it_is_told_to_step(
    window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = 0

    def tick(rate: float) -> None:
        nonlocal waited
        waited += 1
        if waited % 3 == 0:
            press(pygame.K_n)

    monkeypatch.setattr(window, "_show", lambda moment: None)  # which ticks, too
    monkeypatch.setattr(window, "clock", SimpleNamespace(tick=tick))
    press(pygame.K_SPACE)
    moments = window.play(9)
    for pauses in (3, 6):
        next(moments)
        assert waited == pauses
