"""The libretro emulator on real cores, against nes-py, on the real games.

The core is the one of stable-retro, which the group dev installs; one of RetroArch's is tested too.
"""

import ctypes
import gc
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import nes_py._native
import numpy as np
import psutil
import pytest
from conftest import SMALL, run_script, settings
from nes_py import NESEnv
from nes_py.wrappers import JoypadSpace

from icm.envs import ACTION_SETS, cores, describe_emulator, make_env
from icm.envs.cores import SUFFIX, find_core
from icm.envs.libretro import (
    HEIGHT,
    NES_PY_PALETTE,
    OPTIONS,
    PALETTE_ROM,
    WIDTH,
    Frontend,
    LibretroEmulator,
    each_colour,
    on_libretro,
)
from icm.errors import UserError

ENV = settings().env
GAME = "SuperMarioBros-1-1-v0"
RIGHT, LEFT, START, A, B = 128, 64, 8, 1, 2


def installed_cores() -> list[Path]:
    found = [folder / f"fceumm_libretro{SUFFIX}" for folder in cores.core_folders()]
    try:
        found.append(find_core("auto"))
    except UserError:
        return []
    return sorted({path for path in found if path.is_file()})


CORES = installed_cores()
pytestmark = pytest.mark.skipif(not CORES, reason="there is no core for this platform")


@pytest.fixture(params=CORES, ids=lambda path: path.name)
def core(request: pytest.FixtureRequest) -> Path:
    return request.param


def game_on(core: Path, env_id: str = GAME) -> NESEnv:
    game = gym.make(on_libretro(gym.spec(env_id), core)).unwrapped
    assert isinstance(game, NESEnv)
    assert isinstance(game._env, LibretroEmulator)
    game.reset()
    return game


def rom_of(game: NESEnv) -> Path:
    return Path(game._rom_path)


@cache
def smb() -> Path:
    game = gym.make(GAME)
    rom = rom_of(game.unwrapped)  # type: ignore[arg-type]
    game.close()
    return rom


# --- it is the same game ------------------------------------------------------------------------


def actions_of(seed: int) -> list[int]:
    """What a player might do who wants to get to the right: 400 actions of complex movement."""
    rng = np.random.default_rng(seed)
    running = np.array([1, 2, 4, 2, 6, 1, 1, 1, 1, 1, 1, 1])  # mostly right, B, A and all of them
    actions: list[int] = []
    while len(actions) < 400:
        actions += [int(rng.choice(12, p=running / running.sum()))] * int(rng.integers(4, 24))
    return actions[:400]


def play(game: gym.Env[Any, Any], wait: int, seed: int) -> list[tuple[np.ndarray, Any]]:
    """Screens, and rewards, ends and infos, of one episode."""
    env = JoypadSpace(game, ACTION_SETS["complex"])
    env.reset()
    for _ in range(wait):
        env.step(0)
    steps = []
    for action in actions_of(seed):
        screen, *rest = env.step(action)
        steps.append((screen.copy(), rest))
        if rest[1]:  # terminated
            break
    return steps


@pytest.fixture(scope="module")
def nes_py_plays() -> Any:
    games = cache(lambda env_id: gym.make(env_id))

    @cache
    def steps(env_id: str, wait: int, seed: int) -> list[tuple[np.ndarray, Any]]:
        return play(games(env_id), wait, seed)

    def frame_counter(env_id: str) -> int:
        games(env_id).reset()
        return int(games(env_id).unwrapped.ram[9])  # type: ignore[attr-defined]

    return frame_counter, steps


def test_every_frame_of_single_stages_is_that_of_nes_py(core: Path, nes_py_plays: Any) -> None:
    """Rewards, ends and all of the infos; and nearly all pictures.

    nes-py lags by one frame: it ends a frame within the game's own work on it. And it needs another
    number of frames for the title screen: both start when the game's frame counter is the same.
    """
    frame_counter, nes_py_steps = nes_py_plays
    frames = same = 0
    for stage in ("1-1", "2-2", "4-2", "6-3", "8-1"):
        env_id = f"SuperMarioBros-{stage}-v0"
        game = game_on(core, env_id)
        behind = frame_counter(env_id) - int(game.ram[9])
        for seed in range(2):
            steps = play(game, max(0, behind), seed)
            theirs = nes_py_steps(env_id, max(0, -behind), seed)[1:]
            length = min(len(steps), len(theirs))
            assert abs(len(steps) - len(theirs)) <= 1
            for (screen, rest), (their_screen, their_rest) in zip(
                steps[:length], theirs[:length], strict=True
            ):
                assert rest == their_rest
                same += np.array_equal(screen, their_screen)
            frames += length
        game.close()
    assert frames > 2000
    assert same / frames >= 0.97


@pytest.mark.parametrize(
    "env_id",
    [
        "SuperMarioBros-v0",
        "SuperMarioBros2-v0",
        "SuperMarioBros2-3-2-v0",
        "SuperMarioBros2USA-v0",
        "SuperMarioBros2USA-2-1-v0",
        "SuperMarioBros3-v0",
        "SuperMarioBros3-1-2-v0",
    ],
)
def test_all_four_games_run_in_the_colours_of_nes_py(core: Path, env_id: str) -> None:
    game = game_on(core, env_id)
    first, info = game.reset()
    first = first.copy()
    x, seen = info["x_pos"], set()
    for frame in range(150):
        screen, _, terminated, _, info = game.step(RIGHT)
        assert not terminated
        if frame % 30 == 0:
            seen |= set(map(tuple, screen.reshape(-1, 3).tolist()))
    assert info["x_pos"] > x + 50
    assert not np.array_equal(screen, first)
    assert len(seen) > 5
    assert seen <= set(map(tuple, NES_PY_PALETTE.tolist()))
    game.close()


def test_states_of_the_agent_are_those_of_nes_py(core: Path) -> None:
    """Through all wrappers: after the wait in the one, the same pictures one frame apart."""
    config = replace(ENV, noop_max=0, action_repeat=1, emulator="libretro", core=str(core))
    env, nes_py_env = make_env(config), make_env(replace(config, emulator="nes_py"))
    env.reset()
    nes_py_env.reset()
    behind = nes_py_env.unwrapped.ram[9] - env.unwrapped.ram[9]  # type: ignore[attr-defined]
    for _ in range(behind):
        env.step(0)
    states = [env.step(3)[0] for _ in range(60)]
    theirs = [nes_py_env.step(3)[0] for _ in range(61)][1:]
    assert all((a == b).all() for a, b in zip(states[4:], theirs[4:], strict=True))
    env.close()
    nes_py_env.close()


def test_both_render_modes_work(core: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    game = make_env(replace(ENV, emulator="libretro", core=str(core)), "rgb_array")
    game.reset()
    assert np.asarray(game.render()).shape == (HEIGHT, WIDTH, 3)
    game.close()
    shown: list[np.ndarray] = []

    class Viewer:  # there may be no display
        def __init__(self, **kwargs: Any) -> None:
            assert kwargs["caption"] == GAME

        def show(self, screen: np.ndarray) -> None:
            shown.append(screen.copy())

        def close(self) -> None:
            pass

    monkeypatch.setattr("nes_py.nes_env.ImageViewer", Viewer)
    game = make_env(replace(ENV, emulator="libretro", core=str(core)), "human")
    game.reset()
    game.render()
    assert shown[0].std() > 5
    game.close()


# --- the interface of nes-py's emulator ---------------------------------------------------------


def test_the_palette_is_that_of_nes_py(core: Path, tmp_path: Path) -> None:
    rom = tmp_path / "palette.nes"
    rom.write_bytes(PALETTE_ROM)
    nes_py_env = NESEnv(str(rom))
    nes_py_env.reset()
    for emulator in (nes_py_env._env, LibretroEmulator(core, rom)):
        screen = emulator.screen_buffer()
        for colour in each_colour(emulator):
            assert (screen[20:220] == NES_PY_PALETTE[colour]).all(), colour
        assert (emulator.copy_screen_rgb() == screen).all()


def test_copies_go_where_they_are_wanted(core: Path) -> None:
    game = game_on(core)
    rgb = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    assert game.observation("rgb_array_contiguous", rgb) is rgb
    assert (rgb == game.screen).all()
    game.close()


def test_every_button_of_both_controllers_reaches_the_game(core: Path) -> None:
    game = game_on(core)
    for bit in range(8):
        # the game keeps what it has read at 6FC and 6FD, the bits in the order of reading
        game.controllers[1][0] = 1 << bit
        game._env.frame_advance(1 << (7 - bit))
        assert game.controllers[0][0] == 1 << (7 - bit)
        assert (game.ram[0x6FC], game.ram[0x6FD]) == (1 << bit, 1 << (7 - bit))
    game.close()


def test_the_game_goes_on_from_what_is_written_to_its_memory(core: Path) -> None:
    game = game_on(core)
    content = game.ram.copy()
    game.ram[0x75A] = 7  # lives
    game.ram[0x7F8:0x7FB] = (0, 0, 1)  # the clock
    info = game.step(0)[-1]
    assert (info["life"], info["time"]) == (7, 1)
    frames = 0
    while not game.step(0)[2]:  # out of time
        frames += 1
        assert frames < 100
    game.reset()
    assert (game.ram == content).all()
    game.close()


def test_restoring_brings_back_game_and_picture(core: Path) -> None:
    game = game_on(core)

    def run() -> list[np.ndarray]:
        return [game.step(action)[0].copy() for action in (RIGHT | B,) * 40 + (RIGHT | A,) * 20]

    def moment() -> tuple[np.ndarray, np.ndarray]:
        return game.screen.copy(), game.ram.copy()

    start = moment()
    first = run()
    middle, snapshot = moment(), game.dump_state()
    second = run()
    game.reset()
    for before, now in zip(start, moment(), strict=True):
        assert (before == now).all()
    assert (np.array(first) == np.array(run())).all()
    run()
    game.load_state(snapshot)
    for before, now in zip(middle, moment(), strict=True):
        assert (before == now).all()
    assert (np.array(second) == np.array(run())).all()
    game.close()


def test_a_reset_without_a_backup_is_power_on(core: Path) -> None:
    emulator = LibretroEmulator(core, smb())
    screen, ram = emulator.screen_buffer(), emulator.ram_buffer()
    assert not ram.any()

    def run() -> list[tuple[bytes, bytes]]:
        states = []
        for frame in range(60):
            emulator.frame_advance(START if frame == 40 else 0)
            states.append((screen.tobytes(), ram.tobytes()))
        return states

    states = run()
    emulator.reset()
    assert not ram.any()
    assert not screen.any()
    assert run() == states


def test_a_state_of_another_game_is_refused(core: Path) -> None:
    game, other = game_on(core), game_on(core, "SuperMarioBros3-v0")
    with pytest.raises(ValueError, match="state"):
        game.load_state(other.dump_state())
    game.close()
    other.close()


def test_emulators_are_independent(core: Path) -> None:
    def run(emulator: LibretroEmulator, frame: int, button: int) -> tuple[bytes, bytes]:
        emulator.frame_advance(START if frame == 40 else button)
        return emulator.screen_buffer().tobytes(), emulator.ram_buffer().tobytes()

    buttons = (RIGHT, LEFT)
    alone = []
    for button in buttons:
        emulator = LibretroEmulator(core, smb())
        alone.append([run(emulator, frame, button) for frame in range(250)])
    assert alone[0][-1] != alone[1][-1]
    together = [LibretroEmulator(core, smb()) for _ in buttons]
    for frame in range(250):
        for i, emulator in enumerate(together):
            assert run(emulator, frame, buttons[i]) == alone[i][frame]


def test_frames_that_are_not_drawn_change_nothing_but_the_picture(core: Path) -> None:
    game, reference = game_on(core), game_on(core)
    drawn = 0
    for frame in range(200):
        action = RIGHT | B if frame % 60 < 40 else RIGHT | A
        before = game.screen.copy()
        game._env.draw = frame % 4 == 3
        step, expected = game.step(action), reference.step(action)
        assert step[1:] == expected[1:]
        assert (game.ram == reference.ram).all()
        if game._env.draw:
            assert (step[0] == expected[0]).all()
            drawn += (step[0] != before).any()
        else:
            assert (step[0] == before).all()
            if frame % 5 == 0:  # somebody wants to see it after all
                picture = game.observation("rgb_array_contiguous")
                assert (picture == expected[0]).all()
                assert (game.ram == reference.ram).all()
    assert drawn > 40
    game.close()
    reference.close()


def test_the_core_is_told_what_need_not_be_drawn(core: Path) -> None:
    frontend = LibretroEmulator(core, smb())._frontend
    flags = ctypes.c_int()
    answers = []
    for frontend.draw in (True, False):
        assert frontend.environment(47 | 0x10000, ctypes.addressof(flags))
        answers.append(flags.value)
    assert answers == [8 | 1, 8]  # never sound; pictures or not


@pytest.mark.parametrize(("pixel_format", "size"), [(2, 2), (1, 4)])  # RGB565, XRGB8888
def test_pictures_of_16_and_32_bits_look_the_same(pixel_format: int, size: int) -> None:
    """The lines of a core may be longer than its picture."""
    frontend = Frontend(np.arange(1 << 16, dtype=np.uint32))
    wanted = ctypes.c_int(pixel_format)
    assert frontend.environment(10, ctypes.addressof(wanted))
    lines = np.zeros((HEIGHT, WIDTH + 8), f"u{size}")
    red, green, blue = 0xFF, 0x80, 0x08
    rgb565 = red >> 3 << 11 | green >> 2 << 5 | blue >> 3
    lines[5, 7] = rgb565 if size == 2 else red << 16 | green << 8 | blue
    frontend.video_refresh(lines.ctypes.data, WIDTH, HEIGHT, lines.strides[0])
    shown = np.zeros((HEIGHT, WIDTH), np.uint32)
    shown[5, 7] = rgb565
    assert (frontend.pixels == shown).all()


def test_an_interrupt_inside_the_core_is_not_lost(core: Path) -> None:
    class Interrupting(bytearray):
        def __getitem__(self, index: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            return super().__getitem__(index)

    emulator = LibretroEmulator(core, smb())
    emulator._frontend.buttons = Interrupting(2)
    # a shell starts what runs in the background deaf to SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            emulator.frame_advance(0)
    finally:
        signal.signal(signal.SIGINT, before)


# --- closing ------------------------------------------------------------------------------------


def loaded_copies() -> int:
    return sum("icm-core-" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_opening_and_closing_leaves_nothing_behind(
    core: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    process = psutil.Process()

    def cycles(count: int) -> int:
        for _ in range(count):
            emulator = LibretroEmulator(core, smb())
            emulator.frame_advance(0)
            emulator.close()
            del emulator
        gc.collect()
        return process.memory_info().rss

    gc.collect()
    if sys.platform == "linux":
        copies = loaded_copies()
    before = cycles(30)
    after = cycles(100)
    assert after - before < 1 << 19  # a copy takes more than that alone
    assert not list(tmp_path.iterdir())
    if sys.platform == "linux":
        assert loaded_copies() == copies


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_an_environment_unloads_its_core_but_never_under_a_view_of_its_memory(core: Path) -> None:
    gc.collect()
    copies = loaded_copies()
    env = make_env(replace(ENV, emulator="libretro", core=str(core)))
    env.reset()
    assert loaded_copies() > copies
    ram = env.unwrapped.ram  # type: ignore[attr-defined]
    content = bytes(ram)
    env.close()
    del env
    gc.collect()
    assert bytes(ram) == content  # would end the process otherwise
    del ram
    gc.collect()
    assert loaded_copies() == copies


# --- which core is taken ------------------------------------------------------------------------


@pytest.fixture
def folders(core: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Nothing is installed but what a test puts there."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cores.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cores, "SYSTEM_FOLDERS", [tmp_path / "system"])
    monkeypatch.delenv("LIBRETRO_DIRECTORY", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    usual = cores.core_folders()
    for folder in usual:
        assert tmp_path in folder.parents or sys.platform == "win32"
    return {"first": usual[0], "last": usual[-1], "own": tmp_path / "own"}


def install(core: Path, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(core, folder / f"{name}_libretro{SUFFIX}"))


def test_auto_prefers_quicknes_wherever_it_is(
    core: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"found no core.*pip install.*RetroArch") as error:
        find_core("auto")
    assert "\n" not in str(error.value)

    class Package:
        submodule_search_locations = (str(tmp_path / "stable_retro"),)

    retroarch_fceumm = install(core, folders["first"], "fceumm")
    assert find_core("auto") == retroarch_fceumm
    wheel_fceumm = install(core, tmp_path / "stable_retro" / "cores", "fceumm")
    monkeypatch.setattr(cores.importlib.util, "find_spec", {"stable_retro": Package}.__getitem__)
    assert find_core("auto") == wheel_fceumm
    last = install(core, folders["last"], "quicknes")
    assert find_core("auto") == last
    first = install(core, folders["first"], "quicknes")
    assert find_core("auto") == first
    own = install(core, folders["own"], "quicknes")
    assert find_core("auto") == first
    monkeypatch.setenv("LIBRETRO_DIRECTORY", str(folders["own"]))
    assert find_core("auto") == own
    assert find_core(str(wheel_fceumm)) == wheel_fceumm
    emulator = LibretroEmulator(find_core("auto"), smb())
    emulator.frame_advance(0)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="folders of other systems")
def test_auto_follows_xdg_config_home(
    core: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folders["first"] == tmp_path / "home" / ".config" / "retroarch" / "cores"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    path = install(core, tmp_path / "xdg" / "retroarch" / "cores", "quicknes")
    assert find_core("auto") == path


@pytest.mark.skipif(sys.platform == "win32", reason="homes are found otherwise")
def test_auto_works_for_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert find_core("auto").is_file()


def test_auto_does_not_import_stable_retro() -> None:
    assert find_core("auto").is_file()
    assert "stable_retro" not in sys.modules


def test_one_line_says_which_emulator_runs_and_which_would_be_faster(core: Path) -> None:
    taken = describe_emulator(replace(ENV, emulator="libretro", core=str(core)))
    assert taken is not None
    assert str(core) in taken
    hint = describe_emulator(ENV)
    assert hint is not None
    assert "uv run --extra fast scripts/train.py env.emulator=libretro" in hint
    assert "\n" not in taken + hint
    assert describe_emulator(replace(ENV, id="CartPole-v1")) is None


def test_training_runs_on_a_core_and_says_which(core: Path, tmp_path: Path) -> None:
    run = (*SMALL, "total_steps=64", f"hydra.run.dir={tmp_path / 'run'}")
    done = run_script("train.py", *run, "env.emulator=libretro", f"env.core={core}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("emulator") == 1
    assert f"emulator: libretro core {core}\n" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "latest.pt").is_file()
    run = (f"hydra.run.dir={tmp_path / 'refused'}", "env.emulator=libretro")
    done = run_script("train.py", *run, "env.core=no/core.so")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "env.core=no/core.so: no such file" in done.stderr


# --- what is refused ----------------------------------------------------------------------------


def refused(**changes: Any) -> str:
    with pytest.raises(UserError) as error:
        make_env(replace(ENV, emulator="libretro", **changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_core_is_refused(core: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no.so"
    assert f"env.core={missing}: no such file" in refused(core=str(missing))
    assert f"env.core={tmp_path}: no such file" in refused(core=str(tmp_path))
    too_long = tmp_path / f"{300 * 'x'}.so"
    assert f"env.core={too_long}: no such file" in refused(core=str(too_long))
    text = tmp_path / "text.so"
    text.write_text("not a library")
    assert f"env.core={text}: cannot be loaded" in refused(core=str(text))
    cut = tmp_path / "cut.so"
    cut.write_bytes(core.read_bytes()[:1000])
    assert f"env.core={cut}: cannot be loaded" in refused(core=str(cut))
    library = nes_py._native.__file__
    assert f"env.core={library}: is no libretro core" in refused(core=library)


def test_a_game_that_the_core_does_not_take_is_refused(core: Path, tmp_path: Path) -> None:
    rom = tmp_path / "broken.nes"
    rom.write_bytes(b"no game")
    with pytest.raises(UserError, match=rf"env.core={core}: does not take the game {rom}"):
        LibretroEmulator(core, rom)


def test_a_core_that_draws_a_part_of_the_picture_is_refused(
    core: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copy(core, tmp_path))  # the colours of the other are known already
    for name in ("overscan", "overscan_h", "overscan_v"):
        monkeypatch.setitem(OPTIONS, f"fceumm_{name}".encode(), b"enabled")
    monkeypatch.setitem(OPTIONS, b"fceumm_overscan_v_top", b"8")
    monkeypatch.setitem(OPTIONS, b"quicknes_use_overscan_v", b"disabled")
    assert f"env.core={copy}: does not draw 256x240 pixels" in refused(core=str(copy))


@pytest.mark.parametrize("name", ["gambatte", "genesis_plus_gx", "snes9x"])
def test_cores_of_other_consoles_are_refused(name: str) -> None:
    file = f"{name}_libretro{SUFFIX}"
    path = next(path for folder in cores.core_folders() if (path := folder / file).is_file())
    assert f"env.core={path}: " in refused(core=str(path))


def test_other_environments_and_emulators_are_refused(core: Path) -> None:
    assert "env.id=CartPole-v1 is no NES game" in refused(core=str(core), id="CartPole-v1")
    assert "SuperMarioBros-9-9" in refused(core=str(core), id="SuperMarioBros-9-9-v0")
    assert "nothing" in refused(core=str(core), id="nothing:Like-v0")
    with pytest.raises(UserError, match=r"env\.emulator=fast: must be one of"):
        settings("env.emulator=fast")


# in level 1-1, right after the flag: Mario shall walk to the castle, and does not
FROZEN_SEED = 3513898169
FROZEN = (
    "232332324664141112133342543240434322224464343422133224342044344444344240406223124423444024"
    "4037126333924126953344414663339411534414344442443222446242222246429932232442251a2664224144"
    "343434441302244343332442032224004426364343414333333343333622004922240444422334444323346426"
    "223014464440443211134342544544444444444444444444444444444444444444444433a34333234343123342"
    "204662"
)


def test_an_episode_in_which_the_game_freezes_is_truncated() -> None:
    (core, *_) = (path for path in CORES if "fceumm" in path.name)
    config = replace(ENV, id="SuperMarioBros-v0", emulator="libretro", core=str(core))
    env = make_env(config)
    env.reset(seed=FROZEN_SEED)
    *before, last = (int(action, 16) for action in FROZEN)
    for action in before:
        assert env.step(action)[2:4] == (False, False)
    state, _, terminated, truncated, info = env.step(last)
    assert (terminated, truncated) == (False, True)
    assert state.any()
    assert info["episode"]["length"] == len(FROZEN)
    env.reset(seed=FROZEN_SEED)
    assert env.step(0)[2:4] == (False, False)
    env.close()


def test_a_state_is_restored_for_good_also_after_a_frame_that_was_not_drawn(core: Path) -> None:
    game = game_on(core)
    for _ in range(20):
        game.step(RIGHT)
    snapshot, screen, ram = game.dump_state(), game.screen.copy(), game.ram.copy()
    game._env.draw = False
    for _ in range(20):
        game.step(RIGHT)
    game.load_state(snapshot)
    assert (game.observation("rgb_array_contiguous") == screen).all()
    assert (game.ram == ram).all()
    game.close()
