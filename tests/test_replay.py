"""The replay memory against a simulation that keeps every state whole."""

import io
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from conftest import through_a_file
from torch import Tensor

from icm.memory import memory_device
from icm.models import NO_ACTION
from icm.replay import Replay, Sequences

FRAME = (6, 5)
ACTIONS = 12
SLOT = ("actions", "behaviour", "rewards", "terminated", "truncated", "reset", "novelty")
"""What is stored with a frame."""


def make_replay(
    capacity: int,
    num_envs: int,
    frame: tuple[int, int],
    frame_stack: int,
    num_actions: int = ACTIONS,
) -> Replay:
    return Replay(capacity, num_envs, frame, frame_stack, num_actions, torch.device("cpu"))


class Simulation:
    """Environments with episodes of random length that reset on the step after an episode's end.

    A frame tells where it comes from: pixels 0 to 3 of its first row hold the environment, the
    episode (of that environment) and the time in two bytes; the rest is noise.

    Everything that happens is kept in lists that are indexed by time: `states[t][e]` and so on.
    """

    def __init__(self, num_envs: int, frame_stack: int, seed: int, longest: int = 9) -> None:
        self.num_envs, self.frame_stack, self.longest = num_envs, frame_stack, longest
        self.rng = np.random.default_rng(seed)
        self.episode = [-1] * num_envs
        self.left = [0] * num_envs
        self.stack: list[list[np.ndarray]] = [[] for _ in range(num_envs)]
        self.ended = [True] * num_envs
        self.states: list[np.ndarray] = []
        self.previous: list[list[int]] = []
        self.actions: list[np.ndarray] = []
        self.behaviour: list[np.ndarray] = []
        self.rewards: list[np.ndarray] = []
        self.terminated: list[np.ndarray] = []
        self.truncated: list[np.ndarray] = []
        self.reset: list[np.ndarray] = []
        self.novelty: list[np.ndarray] = []

    @property
    def time(self) -> int:
        return len(self.states)

    def _frame(self, env: int) -> np.ndarray:
        frame = self.rng.integers(0, 256, FRAME).astype(np.uint8)
        frame[0, :4] = env, self.episode[env], self.time // 256, self.time % 256
        return frame

    def restart(self) -> None:
        """What a new process does: every environment begins an episode."""
        self.ended = [True] * self.num_envs

    def step(self) -> dict[str, Tensor]:
        """The next step of all environments, as `Replay.add` wants it."""
        n = self.num_envs
        self.previous.append(
            [NO_ACTION if over else int(self.actions[-1][e]) for e, over in enumerate(self.ended)]
        )
        reset, terminated, truncated = (np.zeros(n, dtype=bool) for _ in range(3))
        for e in range(n):
            if self.ended[e]:  # the state at hand opens an episode
                self.episode[e] += 1
                self.left[e] = int(self.rng.integers(1, self.longest + 1))
                self.stack[e] = [self._frame(e)] * self.frame_stack
            else:
                self.stack[e] = [*self.stack[e][1:], self._frame(e)]
            reset[e] = self.left[e] == 0  # the last state of the episode, its action is ignored
            if self.left[e] == 1:
                terminated[e] = self.rng.random() < 0.6
                truncated[e] = not terminated[e]
            self.left[e] -= 1
            self.ended[e] = bool(reset[e])
        self.states.append(np.stack([np.stack(stack) for stack in self.stack]))
        self.actions.append(self.rng.integers(0, ACTIONS, n))
        self.behaviour.append(self.rng.dirichlet(np.ones(ACTIONS), n).astype(np.float32))
        self.rewards.append(self.rng.normal(size=n).astype(np.float32))
        self.terminated.append(terminated)
        self.truncated.append(truncated)
        self.reset.append(reset)
        self.novelty.append(self.rng.random(n).astype(np.float32))
        names = ("states", *SLOT)
        return {name: torch.from_numpy(getattr(self, name)[-1].copy()) for name in names}


def fill(replay: Replay, simulation: Simulation, steps: int) -> None:
    for _ in range(steps):
        replay.add(**simulation.step())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def origins(frames: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Environment, episode and time of frames (..., H, W)."""
    code = frames[..., 0, :4].numpy().astype(np.int64)
    return code[..., 0], code[..., 1], code[..., 2] * 256 + code[..., 3]


def compare(found: Sequences, simulation: Simulation, length: int) -> tuple[set[int], set[int]]:
    """Assert that sequences are the simulation's; returns the first and last times drawn."""
    batch = found.actions.shape[0]
    assert found.states.shape == (batch, length + 1, simulation.frame_stack, *FRAME)
    assert found.states.dtype == torch.uint8
    assert found.actions.dtype == torch.int64
    assert found.rewards.dtype == torch.float32
    envs, episodes, times = origins(found.states)  # each (B, L + 1, C)
    assert (envs == envs[:, :1, :1]).all()
    assert (episodes == episodes[:, :, :1]).all(), "a stack mixes episodes"
    assert (times[:, :, -1] == times[:, :1, -1] + np.arange(length + 1)).all()
    firsts, lasts = set(), set()
    for b in range(batch):
        env, start = envs[b, 0, 0], times[b, 0, -1]
        ahead = range(start, start + length)
        expected = [simulation.states[t][env] for t in range(start, start + length + 1)]
        assert np.array_equal(found.states[b].numpy(), np.stack(expected))
        before = [simulation.previous[t][env] for t in range(start, start + length + 1)]
        assert found.previous[b].tolist() == before
        for name in SLOT:
            values = getattr(found, name)
            assert values.shape[:2] == (batch, length)
            happened = [getattr(simulation, name)[t][env].tolist() for t in ahead]
            assert values[b].tolist() == happened, name
        firsts.add(int(start))
        lasts.add(int(start) + length)
    return firsts, lasts


# --- what is sampled ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [9, 20, 39, 40, 41, 47, 80, 131])
@pytest.mark.parametrize(("frame_stack", "length"), [(4, 5), (3, 1), (1, 4), (2, 8)])
def test_sequences_are_what_happened(steps: int, frame_stack: int, length: int) -> None:
    """Before, at and after the ring of 40 slots is full; episodes of 1 to 9 steps."""
    first = max(frame_stack - 1, 1)  # a state has its stack and the action before it
    steps = max(steps, first + 1 + length)
    simulation = Simulation(num_envs=3, frame_stack=frame_stack, seed=steps)
    replay = make_replay(120, 3, FRAME, frame_stack)
    fill(replay, simulation, steps)
    firsts, lasts = compare(replay.sample(400, length, generator()), simulation, length)
    assert max(lasts) == steps - 1  # the newest state is a successor, never more
    oldest = max(0, steps - 40)
    # all that is complete is drawn: from the first state whose whole stack is certainly there
    assert firsts == set(range(oldest + first, steps - length))


def test_sequences_are_right_while_the_memory_is_being_filled() -> None:
    simulation = Simulation(num_envs=2, frame_stack=3, seed=5)
    replay = make_replay(50, 2, FRAME, 3)
    draws = generator(1)
    for step in range(90):
        replay.add(**simulation.step())
        if step + 1 >= 6 + 3:
            compare(replay.sample(12, 6, draws), simulation, 6)


def test_episode_begins_with_its_first_frame_repeated() -> None:
    simulation = Simulation(num_envs=2, frame_stack=4, seed=3)
    replay = make_replay(60, 2, FRAME, 4)
    fill(replay, simulation, 75)
    found = replay.sample(300, 3, generator())
    opens = torch.cat((found.reset, torch.zeros(300, 1, dtype=torch.bool)), 1).roll(1, dims=1)
    opens[:, 0] = False
    states = found.states[opens]
    assert len(states) > 50
    assert torch.equal(states, states[:, -1:].expand_as(states))
    # two steps on there are three different frames: first, first, second, third
    second = opens.roll(2, dims=1) & ~opens.roll(1, dims=1)
    second[:, :2] = False
    inside = second & ~torch.cat((found.reset, found.reset[:, -1:]), 1).roll(1, dims=1)
    assert inside.any()
    for stack in found.states[inside]:
        assert torch.equal(stack[0], stack[1])
        assert not torch.equal(stack[1], stack[2])
        assert not torch.equal(stack[2], stack[3])


def test_slot_after_an_episodes_end_is_its_last_state() -> None:
    simulation = Simulation(num_envs=3, frame_stack=3, seed=7)
    replay = make_replay(300, 3, FRAME, 3)
    fill(replay, simulation, 100)
    found = replay.sample(500, 4, generator())
    _, episodes, _ = origins(found.states[:, :, -1])
    ended = found.terminated | found.truncated
    assert not (found.terminated & found.truncated).any()
    assert torch.equal(found.reset[:, 1:], ended[:, :-1])
    assert torch.equal(torch.from_numpy(np.diff(episodes, axis=1)) == 1, found.reset)
    assert found.reset.any()
    assert found.terminated.any()
    assert found.truncated.any()


@pytest.mark.parametrize("extra", [0, 1, 2, 39])
def test_every_slot_is_overwritten_in_turn(extra: int) -> None:
    """The tutorial's memory never replaced its last entry."""
    simulation = Simulation(num_envs=2, frame_stack=2, seed=1)
    replay = make_replay(80, 2, FRAME, 2)
    fill(replay, simulation, 80 + extra)
    assert replay.size == 40
    envs, _, times = origins(replay.recent_frames(10**6))
    kept = sorted(zip(times.tolist(), envs.tolist(), strict=True))
    assert kept == [(t, e) for t in range(40 + extra, 80 + extra) for e in range(2)]
    _, _, last = origins(replay.frames[39])
    assert last.tolist() == [79, 79] if extra < 39 else [119, 119]


def test_starts_are_uniform() -> None:
    simulation = Simulation(num_envs=2, frame_stack=3, seed=4)
    replay = make_replay(40, 2, FRAME, 3)
    fill(replay, simulation, 33)
    found = replay.sample(15_000, 3, generator(3))
    envs, _, times = origins(found.states[:, 0, -1])
    starts = list(range(33 - 20 + 2, 33 - 3))
    assert len(starts) == 15
    counts = np.array([[((times == t) & (envs == e)).sum() for e in range(2)] for t in starts])
    assert counts.sum() == 15_000
    # 500 expected in each cell, with a standard deviation of 22
    assert counts.min() > 400
    assert counts.max() < 600


def test_same_seed_same_samples() -> None:
    simulation = Simulation(num_envs=2, frame_stack=3, seed=6)
    replay = make_replay(80, 2, FRAME, 3)
    fill(replay, simulation, 60)
    one, same, other = (replay.sample(16, 4, generator(seed)) for seed in (8, 8, 9))
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(same, name)), name
    assert not torch.equal(one.states, other.states)
    draws = generator(8)
    replay.sample(16, 4, draws)
    assert not torch.equal(replay.sample(16, 4, draws).states, one.states)


def test_samples_are_copies() -> None:
    simulation = Simulation(num_envs=2, frame_stack=3, seed=6)
    replay = make_replay(40, 2, FRAME, 3)
    fill(replay, simulation, 20)
    found = replay.sample(30, 4, generator())
    kept = {name: value.clone() for name, value in vars(found).items()}
    fill(replay, simulation, 20)
    for name, value in kept.items():
        assert torch.equal(value, getattr(found, name)), name


@pytest.mark.parametrize(("frame_stack", "length"), [(1, 1), (3, 5), (4, 16)])
def test_too_little_to_sample(frame_stack: int, length: int) -> None:
    simulation = Simulation(num_envs=2, frame_stack=frame_stack, seed=0)
    replay = make_replay(100, 2, FRAME, frame_stack)
    with pytest.raises(ValueError, match="too few"):
        replay.sample(1, length, generator())
    for _ in range(length + max(frame_stack - 1, 1)):
        assert not replay.can_sample(length)
        replay.add(**simulation.step())
    with pytest.raises(ValueError, match="too few"):
        replay.sample(1, length, generator())
    replay.add(**simulation.step())
    assert replay.can_sample(length)
    compare(replay.sample(20, length, generator()), simulation, length)


def test_smallest_ring_that_can_be_sampled() -> None:
    """`length + frame_stack` slots, as the settings demand at least for stacks of 2 or more."""
    simulation = Simulation(num_envs=2, frame_stack=3, seed=2)
    replay = make_replay(2 * (4 + 3), 2, FRAME, 3)
    for step in range(40):
        replay.add(**simulation.step())
        if step >= 6:
            assert compare(replay.sample(8, 4, generator()), simulation, 4) == ({step - 4}, {step})


def test_sequences_move_to_a_device() -> None:
    simulation = Simulation(num_envs=2, frame_stack=3, seed=6)
    replay = make_replay(40, 2, FRAME, 3)
    fill(replay, simulation, 20)
    found = replay.sample(5, 4, generator())
    moved = found.to(torch.device("meta"))
    assert {value.device.type for value in vars(moved).values()} == {"meta"}
    compare(found.to(torch.device("cpu")), simulation, 4)


# --- memory ---------------------------------------------------------------------------------------


def tensor_bytes(replay: Replay) -> int:
    return sum(v.numel() * v.element_size() for v in vars(replay).values() if torch.is_tensor(v))


def test_default_memory_is_small() -> None:
    assert Replay.nbytes(100_000, (42, 42), 12) < 250_000_000
    for capacity, num_envs, frame, stack in ((960, 16, (42, 42), 4), (50, 1, FRAME, 3)):
        replay = make_replay(capacity, num_envs, frame, stack)
        assert tensor_bytes(replay) == Replay.nbytes(capacity, frame, ACTIONS)
        assert replay.num_slots * replay.num_envs == capacity


def test_capacity_that_the_environments_do_not_divide() -> None:
    replay = make_replay(47, 3, FRAME, 2)
    assert replay.num_slots == 15
    assert tensor_bytes(replay) <= Replay.nbytes(47, FRAME, ACTIONS)


def test_one_frame_a_step_whatever_the_stack() -> None:
    one, many = make_replay(60, 3, FRAME, 1), make_replay(60, 3, FRAME, 8)
    assert many.frames.shape == (20, 3, *FRAME)
    assert tensor_bytes(one) == tensor_bytes(many)
    simulation = Simulation(num_envs=3, frame_stack=4, seed=0)
    replay = make_replay(60, 3, FRAME, 4)
    for steps in range(1, 30):
        replay.add(**simulation.step())
        assert replay.size == min(steps, 20)
        newest = simulation.states[-1][:, -1]
        assert np.array_equal(replay.frames[(steps - 1) % 20].numpy(), newest)


def test_no_memory() -> None:
    replay = make_replay(0, 4, FRAME, 3)
    assert replay.size == 0
    assert not replay.can_sample(1)
    assert tensor_bytes(replay) == 0


@pytest.mark.parametrize(("count", "slots"), [(1, 1), (6, 2), (8, 2), (30, 10), (1_000, 20)])
def test_recent_frames(count: int, slots: int) -> None:
    simulation = Simulation(num_envs=3, frame_stack=2, seed=9)
    replay = make_replay(60, 3, FRAME, 2)
    fill(replay, simulation, 27)
    envs, _, times = origins(replay.recent_frames(count))
    found = sorted(zip(times.tolist(), envs.tolist(), strict=True))
    assert found == [(t, e) for t in range(27 - slots, 27) for e in range(3)]


def test_recent_frames_of_a_memory_that_is_not_full() -> None:
    simulation = Simulation(num_envs=3, frame_stack=2, seed=9)
    replay = make_replay(60, 3, FRAME, 2)
    fill(replay, simulation, 4)
    _, _, times = origins(replay.recent_frames(1_000))
    assert sorted(times.tolist()) == sorted([0, 1, 2, 3] * 3)


# --- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [12, 40, 53])
def test_loaded_memory_goes_on(steps: int) -> None:
    simulation = Simulation(num_envs=2, frame_stack=3, seed=steps)
    saved, loaded = make_replay(80, 2, FRAME, 3), make_replay(80, 2, FRAME, 3)
    fill(saved, simulation, steps)
    fill(loaded, Simulation(num_envs=2, frame_stack=3, seed=99), 64)  # is replaced
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    assert loaded.size == saved.size
    one, other = (replay.sample(50, 4, generator()) for replay in (saved, loaded))
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(other, name)), name
    fill(loaded, simulation, 25)
    firsts, lasts = compare(loaded.sample(300, 4, generator()), simulation, 4)
    assert max(lasts) == steps + 24
    assert min(firsts) == max(0, steps + 25 - 40) + 2


def test_file_of_a_memory_that_is_hardly_filled_is_small_and_made_without_a_copy() -> None:
    replay = make_replay(20_000, 2, FRAME, 3)
    fill(replay, Simulation(num_envs=2, frame_stack=3, seed=0), 10)
    state = replay.state_dict()
    assert state["behaviour"].data_ptr() == replay.behaviour.data_ptr()
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < Replay.nbytes(20, FRAME, ACTIONS) + 20_000
    assert file.tell() < Replay.nbytes(20_000, FRAME, ACTIONS) / 20


@pytest.mark.parametrize("head", [-1, 40])
def test_a_place_to_write_that_there_is_not_is_refused(head: int) -> None:
    replay = make_replay(80, 2, FRAME, 3)
    with pytest.raises(ValueError, match="does not fit"):
        replay.load_state_dict(replay.state_dict() | {"head": head})


@pytest.mark.parametrize("slots", [0, 7, 12, 1 << 20])
def test_frames_that_are_fewer_or_more_than_they_say_are_refused(slots: int) -> None:
    replay, simulation = make_replay(80, 2, FRAME, 3), Simulation(num_envs=2, frame_stack=3, seed=1)
    fill(replay, simulation, 8)
    packed = zstandard.compress(bytes(slots * 2 * FRAME[0] * FRAME[1]))
    lie = {"frames": torch.from_numpy(np.frombuffer(packed, np.uint8).copy())}
    with pytest.raises(ValueError, match="does not fit its own size"):
        replay.load_state_dict(replay.state_dict() | lie)
    compare(replay.sample(30, 4, generator()), simulation, 4)


def test_more_slots_than_its_ring_had_are_refused() -> None:
    replay, larger = make_replay(80, 2, FRAME, 3), make_replay(82, 2, FRAME, 3)
    simulation = Simulation(num_envs=2, frame_stack=3, seed=1)
    fill(replay, simulation, 20)
    fill(larger, Simulation(num_envs=2, frame_stack=3, seed=2), 41)
    lie = larger.state_dict() | {"num_slots": 40, "head": 0}
    with pytest.raises(ValueError, match="does not fit its own size"):
        replay.load_state_dict(lie)
    assert replay.size == 20
    compare(replay.sample(30, 4, generator()), simulation, 4)


@pytest.mark.parametrize(
    "other", [(82, 2, FRAME, 3), (80, 4, FRAME, 3), (80, 2, (5, 6), 3), (80, 2, FRAME, 3, 7)]
)
def test_memory_of_another_shape(other: tuple[Any, ...]) -> None:
    """It is refused, and nothing of it has got in."""
    simulation, source = (Simulation(num_envs=2, frame_stack=3, seed=seed) for seed in (1, 2))
    replay, foreign = make_replay(80, 2, FRAME, 3), make_replay(*other)
    fill(replay, simulation, 20)
    if foreign.frames.shape == replay.frames.shape:
        for _ in range(30):
            step = source.step()
            foreign.add(**step | {"behaviour": step["behaviour"][:, : other[4]]})
    with pytest.raises(ValueError, match="does not fit"):
        replay.load_state_dict(foreign.state_dict())
    assert replay.size == 20
    compare(replay.sample(30, 4, generator()), simulation, 4)


# --- an interruption ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [6, 19, 20, 21, 33, 34, 35, 36, 37, 38, 39, 40])
def test_cut_closes_running_episodes(steps: int) -> None:
    """After it the environments start anew, and no sequence pretends they went on."""
    simulation = Simulation(num_envs=3, frame_stack=3, seed=steps, longest=4)
    replay = make_replay(60, 3, FRAME, 3)
    fill(replay, simulation, steps)
    replay.cut()
    before, newest = steps - 2, steps - 1
    for env in range(3):
        simulation.reset[newest][env] = True
        if not simulation.reset[before][env] and not simulation.terminated[before][env]:
            simulation.truncated[before][env] = True
    simulation.restart()
    fill(replay, simulation, 12)
    compare(replay.sample(400, 5, generator()), simulation, 5)


def test_cut_changes_what_is_already_sampled_from() -> None:
    simulation = Simulation(num_envs=4, frame_stack=2, seed=13, longest=5)
    replay = make_replay(80, 4, FRAME, 2)
    fill(replay, simulation, 17)
    open_before = [
        not (simulation.reset[15][e] or simulation.terminated[15][e] or simulation.truncated[15][e])
        for e in range(4)
    ]
    assert any(open_before)
    replay.cut()
    found = replay.sample(600, 3, generator())
    envs, _, times = origins(found.states[:, -2, -1])
    for env in range(4):
        at_the_end = found.truncated[(times == 15) & (envs == env), -1]
        assert len(at_the_end)
        expected = open_before[env] or simulation.truncated[15][env]
        assert at_the_end.tolist() == [expected] * len(at_the_end)


def test_cut_of_almost_nothing() -> None:
    empty = make_replay(60, 3, FRAME, 3)
    empty.cut()
    assert not empty.reset.any()
    assert not empty.truncated.any()
    simulation = Simulation(num_envs=3, frame_stack=3, seed=0)
    replay = make_replay(60, 3, FRAME, 3)
    fill(replay, simulation, 1)
    replay.cut()
    assert replay.reset[0].all()
    assert not replay.reset[1:].any()
    assert not replay.truncated.any()
    simulation.reset[0][:] = True
    simulation.restart()
    fill(replay, simulation, 10)
    compare(replay.sample(100, 2, generator()), simulation, 2)


@pytest.mark.parametrize(("free", "kept_on"), [(2_000, "cuda:1"), (1_999, "cpu")])
def test_memory_is_kept_on_a_gpu_that_has_twice_the_room(
    monkeypatch: pytest.MonkeyPatch, free: int, kept_on: str
) -> None:
    asked = []

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return free, 10_000

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert memory_device(1_000, torch.device("cuda", 1)) == torch.device(kept_on)
    assert memory_device(1_000, torch.device("cpu")) == torch.device("cpu")
    assert asked == [torch.device("cuda", 1)]
