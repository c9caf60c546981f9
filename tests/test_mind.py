"""The panel beside the game in videos."""

from dataclasses import replace

import numpy as np

from icm.playing import Moment
from icm.viz.mind import CHOSEN, GUESS, HEIGHT, SURPRISE, USUAL, WIDTH, MindPanel, beside

NAMES = ["NOOP", "right", "right A B"]


def moment(surprise: float, guess: bool = True) -> Moment:
    return Moment(
        frames=[],
        state=np.full((4, 42, 42), 77, np.uint8),
        probabilities=np.array([0.1, 0.6, 0.3]),
        action=2,
        surprise=surprise,
        reward=0.5,
        guess=np.array([0.0, 0.25, 0.75]) if guess else None,
        where="1-1, 320 pixels",
        episode=None,
    )


def count(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((image == colour).all(2).sum())


def test_a_panel_shows_what_the_agent_sees_wants_and_feels() -> None:
    panel = MindPanel(NAMES)
    image = panel.draw(moment(0.5))
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert image.dtype == np.uint8
    size = 108
    assert count(image, (77, 77, 77)) == 4 * size**2
    usual = (image == USUAL).all(2)
    widths = sorted({int(row.sum()) for row in usual if row.sum() > 5})
    assert widths == [37, 220]  # a tenth and six tenths of the room for bars
    assert 30 * 110 > count(image, CHOSEN) > 110 * 10  # three tenths, and its name
    assert count(image, GUESS) > 300
    assert count(MindPanel(NAMES).draw(moment(0.5, guess=False)), GUESS) == 0
    # the curve of surprise: a peak two steps ago
    for surprise in (1.0, 0.1, 0.1):
        image = panel.draw(moment(surprise))
    rows, columns = np.nonzero((image == SURPRISE).all(2)[528:])  # below its title
    assert WIDTH - 16 - 3 * 3 < columns[rows.argmin()] < WIDTH - 16 - 3


def test_very_many_actions_get_thin_bars() -> None:
    for actions in (26, 90):
        chances = np.full(actions, 1 / actions)
        shown = replace(moment(0.5), probabilities=chances, guess=chances)
        image = MindPanel([str(action) for action in range(actions)]).draw(shown)
        assert count(image, USUAL) > actions


def test_a_game_is_scaled_to_the_panel() -> None:
    game = np.zeros((240, 256, 3), np.uint8)
    game[:, :128] = 200
    both = beside(game, MindPanel(NAMES).draw(moment(0.5)))
    assert both.shape == (HEIGHT, 768 + WIDTH, 3)
    assert (both[:, 383] == 200).all()
    assert (both[:, 384] == 0).all()
    assert both.shape[0] % 16 == both.shape[1] % 16 == 0
