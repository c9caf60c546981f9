"""Which worker steps which environments."""

import numpy as np
import pytest

from icm.envs.balance import WINDOW, Balance

ALL = np.ones(32, np.bool)


def run(balance: Balance, lead: float, cost: float, steps: int) -> None:
    """Steps of a machine on which an environment takes `cost` seconds, and learning `lead`."""
    for _ in range(steps):
        balance.measured(lead, [cost * len(rows) for rows in balance.rows])
        balance.move(ALL)


def sizes(balance: Balance) -> list[int]:
    return [len(rows) for rows in balance.rows]


@pytest.mark.parametrize(
    ("workers", "late", "lead", "expected"),
    [
        (2, 1, 0.0, [16, 16]),
        (2, 1, 10.0, [21, 11]),  # 21 = 10 + 11
        (2, 1, 50.0, [32, 0]),  # learning takes longer than all environments
        (4, 2, 8.0, [12, 12, 4, 4]),
        (4, 1, 8.0, [10, 10, 10, 2]),
    ],
)
def test_all_end_at_the_same_time(
    workers: int, late: int, lead: float, expected: list[int]
) -> None:
    balance = Balance(32, workers, late)
    assert sizes(balance) == [32 // workers] * workers
    run(balance, lead, 1.0, 6 * WINDOW)
    assert sizes(balance) == expected
    assert sorted(row for rows in balance.rows for row in rows) == list(range(32))
    run(balance, 0.0, 1.0, 6 * WINDOW)  # and back again
    assert sizes(balance) == [32 // workers] * workers


def test_slow_workers_step_fewer() -> None:
    balance = Balance(32, 4, 1)
    costs = 1.0, 2.0, 1.0, 2.0
    for _ in range(6 * WINDOW):
        seconds = [cost * len(rows) for cost, rows in zip(costs, balance.rows, strict=True)]
        balance.measured(6.0, seconds)
        balance.move(ALL)
    assert sizes(balance) == [12, 6, 11, 3]  # 11.7 seconds, the last one after 6


def test_single_long_steps_change_nothing() -> None:
    balance = Balance(32, 2, 1)
    for step in range(4 * WINDOW):
        pause = 1000.0 if step % 3 == 0 else 0.0
        balance.measured(10.0 + pause, [26.0, 16.0])
        balance.move(ALL)
    assert sizes(balance) == [16, 16]


def test_small_differences_move_nothing() -> None:
    balance = Balance(32, 4, 0)
    for step in range(8 * WINDOW):
        noise = 0.03 * np.sin(step * np.arange(1, 5))
        balance.measured(0.0, [*(8.0 + noise)])
        balance.move(ALL)
    assert balance.rows == Balance(32, 4, 0).rows


def test_only_free_environments_move() -> None:
    balance = Balance(6, 2, 1)
    balance.wanted = np.array([6.0, 0.0])
    balance.move(np.zeros(6, np.bool))
    assert sizes(balance) == [3, 3]
    balance.move(np.arange(6) == 1)
    assert balance.rows == [[5, 4, 3, 1], [2, 0]]
    balance.wanted = np.array([2.0, 4.0])
    balance.move(np.arange(6) == 4)
    assert balance.rows == [[5, 3, 1], [2, 0, 4]]


def test_environments_that_hardly_move_are_where_most_are_wanted() -> None:
    """Those that practise, the last ones: seldom between episodes, and late workers want few."""
    balance = Balance(32, 2, 1)
    balance.wanted = np.array([26.0, 6.0])
    balance.move(np.arange(32) < 16)
    assert sizes(balance) == [26, 6]
