"""A run that was stopped and resumed is the run that was not, to the last bit."""

import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FULL, SMALL, metrics_of, settings, without_speed
from filelock import FileLock

from icm import checkpoint
from icm.config import Config
from icm.device import resolve_device
from icm.envs import action_count, make_vector_env
from icm.envs.vector import WorkerVectorEnv
from icm.errors import UserError
from icm.factory import build_agent
from icm.files import latest
from icm.trainer import Trainer
from icm.viz.studio import Drawn

TOTAL = 128
ROLLOUTS = ("agent.rollout_steps=16", "agent.epochs=1", "agent.replayed=2")
ALL = [s for s in SMALL[1:] if not s.startswith(("env.num_envs", "agent.steps_per_update"))]
LEARNERS = {
    "dqn": ["agent=dqn", "agent.steps_per_update=8", "agent.batch_size=4"],
    "ppo": ["agent=ppo", *ROLLOUTS],
    "pqn": ["agent=pqn", *ROLLOUTS],
}
STOPS = {("ppo",): (64, 96, 100), ("dqn",): (64,)}
"""Where, by what is given, trainings of several tests stop."""
IDLE: dict[str, WorkerVectorEnv] = {}
"""Environments of trainings that have ended, by their settings, for those that come."""


class StoppedTrainer(Trainer):
    """Gets SIGTERM at an agent step, and draws nothing."""

    stops_at = 0  # never

    def _show(self, drawn: Drawn | None) -> None:
        if self.step == self.stops_at:
            signal.raise_signal(signal.SIGTERM)


class PractisingTrainer(StoppedTrainer):
    """Gets SIGTERM as soon as an environment has gone back into the middle of its episode.

    What the memory has of every step is what the agent has acted on.
    """

    def _observe(self) -> None:
        acted_on = self.unobserved
        super()._observe()
        if acted_on is not None:
            memory = self.agent.memory
            newest = torch.full((memory.num_envs, 1), memory.head - 1)
            kept = memory.gather(newest, torch.arange(memory.num_envs).unsqueeze(1), 0)
            assert (kept.states[:, 0] == acted_on["states"]).all()
            assert (kept.previous[:, 0] == acted_on["previous"]).all()

    def _show(self, drawn: Drawn | None) -> None:
        if self.stops_at and any(self.envs._returning.values()):
            signal.raise_signal(signal.SIGTERM)


class EagerTrainer(StoppedTrainer):
    """Observes each step before the next actions are drawn, as it does when it saves."""

    def _show(self, drawn: Drawn | None) -> None:
        self._observe()
        super()._show(drawn)


def config_of(learner: str, *more: str) -> Config:
    fast = ("env.emulator=libretro", "env.num_envs=2", "env.num_workers=1")
    given = [*LEARNERS[learner], *ALL, *fast, f"total_steps={TOTAL}", *more]
    return settings(*given)


@contextmanager
def environments(config: Config, used: bool) -> Generator[WorkerVectorEnv]:
    """New ones, or `used` ones if there are some: those tell nothing of scenery they have shown."""
    name = repr((config.env, config.practice))
    kept = IDLE.pop(name, None) if used else None
    envs = kept or make_vector_env(config.env, scenery=True, practice=config.practice)
    are_idle = name not in IDLE
    try:
        yield envs
    except Exception as error:
        are_idle &= isinstance(error, UserError)  # of a checkpoint, before any step
        raise
    finally:
        if are_idle:
            IDLE[name] = envs
        else:
            envs.close()


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    while IDLE:
        IDLE.popitem()[1].close()


def train(
    config: Config,
    folder: Path,
    stops_at: int = 0,
    resume: Path | None = None,
    kind: type[StoppedTrainer] = StoppedTrainer,
    used: bool = False,
) -> Path:
    """Train until a step; the run folder. `used`: see `environments`."""
    with environments(config, used) as envs:
        shape: Any = envs.single_observation_space.shape
        actions = action_count(envs.single_action_space)
        agent = build_agent(config, shape, actions, resolve_device(config.device))
        folder.mkdir(parents=True, exist_ok=True)
        trainer = kind(agent, envs, folder, config)
        trainer.stops_at = stops_at
        if resume is not None:
            trainer.resume(resume)
        stopped_by = trainer.run()
        assert stopped_by == (signal.SIGTERM if stops_at else None)
    return folder


def stop_of(*given: str) -> int:
    """Where else a training of `config_of` stops: at random, but always there."""
    rng = np.random.default_rng([*" ".join(given).encode()])
    return 2 * int(rng.integers(1, TOTAL // 2))


@pytest.fixture(scope="module")
def trained_until(for_all: Path) -> Callable[..., Path]:
    """The run folder of a training of `config_of` until a step, 0: its end; for all, to be read.

    It is one training, which saves as it would if it were stopped, and a copy is made of its folder
    there: at those of `STOPS`, and at its own of `stop_of`.
    """

    def run(stops_at: int, *given: str) -> Path:
        folder = for_all / "stopped" / ",".join(given)

        class CopiedTrainer(StoppedTrainer):
            def _show(self, drawn: Drawn | None) -> None:
                if self.step in (*STOPS.get(given, ()), stop_of(*given)):
                    self.save()
                    shutil.copytree(self.folder, folder / str(self.step))

        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not (whole := folder / "0").exists():
                train(config_of(*given), whole, kind=CopiedTrainer)
        return folder / str(stops_at)

    return run


def memory(folder: Path) -> Path:
    (path,) = (folder / "checkpoints").glob("replay_*.pt")
    return path


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """All values in containers, by where they are."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in leaves(value[key], f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return leaves(dict(enumerate(value)), name)
    return {name: value}


def assert_same(one: Path, other: Path) -> None:
    """Two files of plain containers and tensors are equal to the bit."""
    a, b = (leaves(checkpoint.load_file(path)) for path in (one, other))
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name == ".config.resume" or name.startswith(".metrics.speed"):
            continue
        if isinstance(value, torch.Tensor):
            x, y = value.contiguous().numpy(), b[name].contiguous().numpy()
            assert x.dtype == y.dtype, name
            assert x.tobytes() == y.tobytes(), name
        else:
            assert value == b[name], name


def logged(*folders: Path) -> list[dict[str, float]]:
    """The log lines of one run after the other, without speeds."""
    return without_speed([line for folder in folders for line in metrics_of(folder)])


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (("dqn",), EagerTrainer),
        (("ppo",), StoppedTrainer),
        (
            ("pqn", "curiosity=rnd", "curiosity.surprise_limit=null", "curiosity.extrinsic_coef=1"),
            EagerTrainer,
        ),
        (
            (
                *("ppo", "curiosity=random_features", "curiosity.episodic_scale=null"),
                "env.sticky_probability=0.25",
            ),
            StoppedTrainer,
        ),
        (("ppo", "curiosity=disagreement", "env.noisy_tv=always"), StoppedTrainer),
        (("dqn", "curiosity=none", "env.emulator=nes_py"), StoppedTrainer),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_resumed_run_is_the_run_that_never_stopped(
    given: tuple[str, ...],
    kind: type[StoppedTrainer],
    tmp_path: Path,
    trained_until: Callable[..., Path],
) -> None:
    """Also if it then observes as early as if it saved in every step."""
    stop = stop_of(*given)
    whole, first = trained_until(0, *given), trained_until(stop, *given)
    assert checkpoint.load(latest(first))["step"] == stop
    second = train(config_of(*given), tmp_path / "second", resume=latest(first), kind=kind)
    assert_same(latest(whole), latest(second))
    assert_same(memory(whole), memory(second))
    lines = logged(whole)
    assert len(lines) == TOTAL // 32
    assert logged(first, second) == lines


def test_a_run_that_still_lives_is_resumed_with_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_until: Callable[..., Path]
) -> None:
    """Which it replaces with its next checkpoint, be it when that has just been read."""
    whole = trained_until(0, "ppo")
    first = shutil.copytree(trained_until(64, "ppo"), tmp_path / "first")
    later = trained_until(96, "ppo")
    load, live = checkpoint.load, [later]

    def load_slowly(path: Path) -> dict[str, Any]:
        content = load(path)
        if live:
            memory(first).unlink()
            shutil.copytree(live.pop() / "checkpoints", path.parent, dirs_exist_ok=True)
        return content

    monkeypatch.setattr(checkpoint, "load", load_slowly)
    second = train(config_of("ppo"), tmp_path / "second", resume=latest(first))
    assert_same(latest(whole), latest(second))
    assert len(logged(second)) == 1  # from the later one on


def test_a_run_that_practises_goes_on_where_an_environment_has_just_gone_back(
    tmp_path: Path,
) -> None:
    """There it is stopped, and saving at other steps then changes nothing either."""
    given = (
        *FULL,
        "practice=0.75",
        "env.num_envs=4",
        "env.id=SuperMarioBros-v0",
        "agent.batch_size=8",
        "agent.replay_capacity=240",
        "total_steps=320",
    )
    # whose lives are long enough to go back, in step 148, and in step 240 to where another one is
    config = config_of("ppo", *given, "seed=4")
    whole = train(config, tmp_path / "whole", kind=PractisingTrainer)
    first = train(config, tmp_path / "first", stops_at=1, kind=PractisingTrainer)
    stopped = checkpoint.load(latest(first))["step"]
    assert 0 < stopped < config.total_steps - 128
    start, second = latest(first), tmp_path / "second"
    train(config, second, resume=start, kind=EagerTrainer)
    assert_same(latest(whole), latest(second))
    assert_same(memory(whole), memory(second))
    assert logged(first, second) == logged(whole)

    config.practice = 0.0  # what has been practised is no episode of those that do not
    third = train(config, tmp_path / "third", stopped + 4, start)
    running = checkpoint.load(latest(third))["episodes"]["actions"]
    assert [len(actions) for actions in running] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "change",
    [{"rollout_steps": 24}, {"sequence_length": 8}, {"batch_size": 4, "epochs": 2}],
    ids=str,
)
def test_rollouts_of_other_settings_are_not_gone_on_with(
    change: dict[str, int], tmp_path: Path, trained_until: Callable[..., Path]
) -> None:
    config = config_of("ppo")
    first = trained_until(100, "ppo")
    vars(config.agent).update(change)
    config.total_steps = 192
    second = train(config, tmp_path / "second", resume=latest(first), used=True)
    content = checkpoint.load(latest(second))
    updates = checkpoint.load(latest(first))["agent"]["updates"]
    assert content["agent"]["updates"] > updates
    assert content["agent"]["order"].shape[1] == config.agent.batch_size


def test_with_another_seed_a_run_goes_on_otherwise(
    tmp_path: Path, trained_until: Callable[..., Path]
) -> None:
    config = config_of("ppo", "seed=7")
    first = trained_until(100, "ppo")
    second, again = (
        train(config, tmp_path / name, resume=latest(first)) for name in ("second", "again")
    )
    assert_same(latest(second), latest(again))
    now, before = (checkpoint.load(latest(run)) for run in (second, trained_until(0, "ppo")))
    assert now["episodes"]["entropy"] == 7 + 100
    assert now["agent"]["updates"] == before["agent"]["updates"]
    for name in ("generator", "action_generator"):
        assert (now["agent"][name] != before["agent"][name]).any()


def test_the_latest_metrics_are_those_from_before_until_there_are_newer_ones(
    tmp_path: Path, trained_until: Callable[..., Path]
) -> None:
    first = trained_until(100, "ppo")
    second = train(config_of("ppo"), tmp_path / "second", 102, latest(first), used=True)
    before, now = (checkpoint.load(latest(run))["metrics"] for run in (first, second))
    assert now == before != {}


def test_another_number_of_workers_changes_nothing(
    tmp_path: Path, trained_until: Callable[..., Path]
) -> None:
    config = config_of("ppo")
    whole, first = trained_until(0, "ppo"), trained_until(100, "ppo")
    config.env.num_workers = 2
    second = train(config, tmp_path / "second", resume=latest(first))
    models = [checkpoint.load(latest(folder))["models"] for folder in (whole, second)]
    for name, tensor in leaves(models[0]).items():
        assert (tensor == leaves(models[1])[name]).all()


def test_the_newest_checkpoints_are_kept_and_the_memory_is_written_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of("dqn", "checkpoint.every=32", "checkpoint.keep=2")
    run, save, saved = tmp_path / "run", checkpoint.save, []

    def watch(path: Path, content: dict[str, Any]) -> None:
        if latest(run).exists():  # as long as it is the latest, its memory is there
            step = checkpoint.load(latest(run))["step"]
            assert (latest(run).parent / f"replay_{step:09d}.pt").exists()
        save(path, content)
        saved.append(path.name)

    monkeypatch.setattr(checkpoint, "save", watch)
    stays = run / "checkpoints" / "step_000000001.pt"
    stays.mkdir(parents=True)  # cannot be removed like a file
    train(config, run, used=True)
    assert f"{stays}: cannot be removed: " in capsys.readouterr().err
    stays.rmdir()
    steps = (32, 64, 96, 128)
    expected = [(f"replay_{s:09d}.pt", f"step_{s:09d}.pt", "latest.pt") for s in steps]
    assert saved == [name for names in expected for name in names]
    names = {path.name for path in (run / "checkpoints").iterdir()}
    kept = {f"step_{TOTAL - 32:09d}.pt", f"step_{TOTAL:09d}.pt", f"replay_{TOTAL:09d}.pt"}
    assert names == {"latest.pt"} | kept
    latest(run).write_bytes(b"damaged")
    assert checkpoint.newest_whole(latest(run))[0].name == f"step_{TOTAL:09d}.pt"


def test_best_is_the_checkpoint_of_the_best_average(tmp_path: Path) -> None:
    given = (
        *FULL,
        "checkpoint.every=32",
        "env.num_envs=4",
        "env.stuck_steps=1",
        "env.noop_max=0",
        "agent.steps_per_update=32",
        "total_steps=320",
    )
    config = config_of("dqn", *given)
    found = []

    class Judged(StoppedTrainer):
        def save(self) -> None:
            found.append((self.exploration.average(), self.step))
            super().save()

    run = train(config, tmp_path / "run", kind=Judged)
    whole = [(average, step) for average, step in found if average is not None]
    assert len(whole) > 2
    best = max(whole, key=lambda each: (each[0], -each[1]))[1]
    path = run / "checkpoints" / "best.pt"
    content = checkpoint.load(path)
    assert content["step"] == best
    # nothing worse replaces it when the run goes on in its folder
    content["exploration"]["latest"] = [1e6] * 100
    checkpoint.save(path, content)
    config.total_steps = 352
    train(config, run, resume=latest(run), used=True)
    assert checkpoint.load(path)["step"] == best


@pytest.mark.parametrize(
    ("learner", "change", "total"),
    [("ppo", "env.num_envs=4", 160), ("dqn", "agent.replay_capacity=400", 128)],
)
def test_a_memory_of_another_size_is_filled_anew(
    learner: str,
    change: str,
    total: int,
    tmp_path: Path,
    trained_until: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = trained_until(64, learner)
    other = config_of(learner, change, f"total_steps={total}")
    second = train(other, tmp_path / "second", resume=latest(first), used=True)
    assert "no memory of step 64 and of this size beside" in capsys.readouterr().out
    content = checkpoint.load(latest(second))
    assert content["step"] == total
    before = checkpoint.load(latest(first))["exploration"]["latest"]
    assert content["exploration"]["latest"][: len(before)] == before != []
    assert content["agent"]["learn_from"] == 64 + 32
    assert content["agent"]["updates"] > checkpoint.load(latest(first))["agent"]["updates"]


def test_a_warm_up_does_not_go_on_without_its_memory(
    tmp_path: Path, trained_until: Callable[..., Path]
) -> None:
    """Or the input statistics would be those of the few frames since then."""
    first, other = trained_until(64, "ppo"), ("env.num_envs=4", "agent.warmup_steps=80")
    with pytest.raises(UserError, match="at step 64 of its warm-up, it needs its memory"):
        train(config_of("ppo", *other), tmp_path / "on", resume=latest(first), used=True)


def test_a_memory_too_small_for_the_rollout_is_filled_anew(
    tmp_path: Path, trained_until: Callable[..., Path]
) -> None:
    first = shutil.copytree(trained_until(64, "ppo"), tmp_path / "first")
    content = checkpoint.load(latest(first))
    content["agent"]["first"] = 40  # as in a longer training
    checkpoint.save(latest(first), content)
    other = config_of("ppo", "agent.replay_capacity=74", "total_steps=128")  # 37 slots
    second = train(other, tmp_path / "second", resume=latest(first), used=True)
    assert checkpoint.load(latest(second))["agent"]["learn_from"] == 64 + 32


def test_in_another_environment_new_episodes_begin(
    tmp_path: Path, trained_until: Callable[..., Path]
) -> None:
    config = config_of("ppo")
    first = trained_until(100, "ppo")
    config.env.sticky_probability = 0.25
    second = train(config, tmp_path / "second", 102, latest(first))
    content = checkpoint.load(latest(second))
    assert [len(actions) for actions in content["episodes"]["actions"]] == [1, 1]
    assert content["exploration"]["best"] is None
    remembered = checkpoint.load_file(memory(second))
    assert remembered["lives"]["count"].tolist() == [1, 1]
    assert remembered["reset"][remembered["head"] - 2].all()


def test_on_another_core_new_episodes_begin(
    tmp_path: Path, trained_until: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first = shutil.copytree(trained_until(100, "ppo"), tmp_path / "first")
    content = checkpoint.load(latest(first))
    assert content["core"] == "fceumm_libretro"
    checkpoint.save(latest(first), content | {"core": "quicknes_libretro"})
    second = train(config_of("ppo"), tmp_path / "second", 102, latest(first), used=True)
    assert "core is fceumm_libretro, was quicknes_libretro" in capsys.readouterr().out
    episodes = checkpoint.load(latest(second))["episodes"]
    assert [len(actions) for actions in episodes["actions"]] == [1, 1]


def test_with_the_same_core_in_another_place_episodes_go_on(
    tmp_path: Path, trained_until: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first = shutil.copytree(trained_until(100, "ppo"), tmp_path / "first")
    content = checkpoint.load(latest(first))
    content["config"]["env"]["core"] = "/of/another/machine/fceumm_libretro.so"
    checkpoint.save(latest(first), content)
    second = train(config_of("ppo"), tmp_path / "second", 102, latest(first), used=True)
    printed = capsys.readouterr().out
    assert "changed: env.core=auto, was /of/another/machine/fceumm_libretro.so" in printed
    assert "of running episodes again" in printed
    checkpoints = (content, checkpoint.load(latest(second)))
    before, after = (each["episodes"]["actions"] for each in checkpoints)
    assert [len(actions) for actions in after] == [len(actions) + 1 for actions in before]


def test_a_changed_setting_is_told_even_if_it_is_newer_than_the_checkpoint(
    tmp_path: Path, trained_until: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first = shutil.copytree(trained_until(100, "ppo"), tmp_path / "first")
    content = checkpoint.load(latest(first))
    del content["config"]["checkpoint"]["keep"]  # 20, until it could be given
    content["config"]["log"]["every"] = 0  # which is refused now
    checkpoint.save(latest(first), content)
    train(config_of("ppo", "checkpoint.keep=5"), tmp_path / "second", 102, latest(first), used=True)
    printed = capsys.readouterr().out
    assert "changed: checkpoint.keep=5, was 20\n" in printed
    assert ", was 0\n" in printed


def test_a_damaged_memory_is_told_and_filled_anew(
    tmp_path: Path, trained_until: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained_until(64, "ppo"), tmp_path / "run")
    damaged = memory(run)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    train(config_of("ppo", "total_steps=128"), run, resume=latest(run), used=True)
    told = capsys.readouterr()
    assert f"{damaged}: damaged" in told.err
    assert f"no memory of step 64 and of this size beside {latest(run)}" in told.out
    assert checkpoint.load(latest(run))["agent"]["learn_from"] == 64 + 32


def test_a_damaged_best_checkpoint_keeps_nothing_from_going_on(
    tmp_path: Path, trained_until: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained_until(100, "ppo"), tmp_path / "run")
    (run / "checkpoints" / "best.pt").write_bytes(b"damaged")
    train(config_of("ppo"), run, 102, latest(run), used=True)
    assert "best.pt" in capsys.readouterr().err
    assert checkpoint.load(latest(run))["step"] == 102


def without_agent(content: dict[str, Any]) -> None:
    del content["agent"]


def with_an_empty_picture(content: dict[str, Any]) -> None:
    for picture in content["exploration"]["pictures"].values():
        picture["png"] = picture["png"][:0]


def with_small_moments(content: dict[str, Any]) -> None:
    for moments in content["optimizers"]["adam"]["state"].values():
        moments["exp_avg_sq"] = torch.zeros(7)


def with_a_rollout_beyond_its_end(content: dict[str, Any]) -> None:
    content["agent"]["collected"] = 255


def with_sequences_of_no_rollout(content: dict[str, Any]) -> None:
    content["agent"]["order"] += 1000


def with_words_for_seeds(content: dict[str, Any]) -> None:
    content["episodes"]["seeds"] = ["a", "b"]


def with_actions_of_another_game(content: dict[str, Any]) -> None:
    content["episodes"]["actions"][1].append(99)


def with_a_word_for_a_sum(content: dict[str, Any]) -> None:
    content["interval"]["sums"]["reward/intrinsic"] = "much"


def with_a_word_for_a_distance(content: dict[str, Any]) -> None:
    content["exploration"]["latest"] = ["far"]


def without_a_seed(content: dict[str, Any]) -> None:
    del content["config"]["seed"]


def with_frames_of_noise(memory: dict[str, Any]) -> None:
    memory["frames"][20:] ^= 0x55


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("latest.pt", without_agent),
        ("latest.pt", with_small_moments),
        ("latest.pt", with_a_rollout_beyond_its_end),
        ("latest.pt", with_sequences_of_no_rollout),
        ("latest.pt", with_words_for_seeds),
        ("latest.pt", with_actions_of_another_game),
        ("latest.pt", with_a_word_for_a_sum),
        ("latest.pt", with_a_word_for_a_distance),
        ("latest.pt", without_a_seed),
        ("latest.pt", with_an_empty_picture),
        ("replay_", with_frames_of_noise),
    ],
)
def test_a_checkpoint_that_cannot_be_gone_on_with_is_one_line(
    name: str,
    change: Callable[[dict[str, Any]], None],
    tmp_path: Path,
    trained_until: Callable[..., Path],
) -> None:
    run = shutil.copytree(trained_until(100, "ppo"), tmp_path / "run")
    (path,) = (run / "checkpoints").glob(f"{name}*")
    content = checkpoint.load_file(path)
    change(content)
    checkpoint.save(path, content)
    is_known = change is without_a_seed
    complaint = "seed: must be given" if is_known else "incomplete or of another version"
    with pytest.raises(UserError, match=rf"{path.name}: {complaint}"):
        train(config_of("ppo"), tmp_path / "second", resume=latest(run), used=True)
