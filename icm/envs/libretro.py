"""NES cores of libretro, in process, under the unchanged environments of nes-py.

A core is a shared library with the C interface of libretro.h: its frontend, here this module, gives
it callbacks for options, picture and buttons, and runs one frame at a time.
"""

import _ctypes
import ctypes
import functools
import os
import shutil
import struct
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import zstandard
from gymnasium.envs.registration import EnvSpec, load_env_creator
from nes_py import NESEnv

from icm.errors import UserError

HEIGHT, WIDTH = 240, 256
RAM_SIZE = 2048

# names and numbers of libretro.h
API_VERSION = 1
MEMORY_SYSTEM_RAM = 2
ENVIRONMENT_SET_PIXEL_FORMAT = 10
ENVIRONMENT_GET_VARIABLE = 15
ENVIRONMENT_GET_AUDIO_VIDEO_ENABLE = 47 | 0x10000
ENVIRONMENT_GET_INPUT_BITMASKS = 51 | 0x10000
ENABLE_VIDEO, HARD_DISABLE_AUDIO = 1, 8
PIXEL_FORMAT_XRGB8888, PIXEL_FORMAT_RGB565 = 1, 2
DEVICE_ID_JOYPAD_MASK = 256
# by nes-py's controller byte; bits: B, (Y), select, start, up, down, left, right, A
JOYPADS = [byte & 0b11111100 | (byte & 0b10) >> 1 | (byte & 0b1) << 8 for byte in range(256)]
# the same by libretro button: a core asks for 17 in every frame
PRESSED = [[bits >> button & 1 for button in range(16)] for bits in JOYPADS]

ENVIRONMENT = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_uint, ctypes.c_void_p)
VIDEO_REFRESH = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t
)
AUDIO_SAMPLE = ctypes.CFUNCTYPE(None, ctypes.c_int16, ctypes.c_int16)
AUDIO_SAMPLE_BATCH = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t)
INPUT_POLL = ctypes.CFUNCTYPE(None)
INPUT_STATE = ctypes.CFUNCTYPE(ctypes.c_int16, *[ctypes.c_uint] * 4)


class Variable(ctypes.Structure):
    """struct retro_variable."""

    _fields_ = (("key", ctypes.c_char_p), ("value", ctypes.c_char_p))


class GameInfo(ctypes.Structure):
    """struct retro_game_info."""

    _fields_ = (
        ("path", ctypes.c_char_p),
        ("data", ctypes.c_char_p),
        ("size", ctypes.c_size_t),
        ("meta", ctypes.c_char_p),
    )


class SystemInfo(ctypes.Structure):
    """struct retro_system_info."""

    _fields_ = (
        ("library_name", ctypes.c_char_p),
        ("library_version", ctypes.c_char_p),
        ("valid_extensions", ctypes.c_char_p),
        ("need_fullpath", ctypes.c_bool),
        ("block_extract", ctypes.c_bool),
    )


FUNCTIONS: dict[str, tuple[Any, ...]] = {  # of a core: result, arguments
    "retro_api_version": (ctypes.c_uint,),
    "retro_get_system_info": (None, ctypes.POINTER(SystemInfo)),
    "retro_set_environment": (None, ENVIRONMENT),
    "retro_set_video_refresh": (None, VIDEO_REFRESH),
    "retro_set_audio_sample": (None, AUDIO_SAMPLE),
    "retro_set_audio_sample_batch": (None, AUDIO_SAMPLE_BATCH),
    "retro_set_input_poll": (None, INPUT_POLL),
    "retro_set_input_state": (None, INPUT_STATE),
    "retro_init": (None,),
    "retro_deinit": (None,),
    "retro_load_game": (ctypes.c_bool, ctypes.POINTER(GameInfo)),
    "retro_unload_game": (None,),
    "retro_run": (None,),
    "retro_get_memory_data": (ctypes.c_void_p, ctypes.c_uint),
    "retro_get_memory_size": (ctypes.c_size_t, ctypes.c_uint),
    "retro_serialize_size": (ctypes.c_size_t,),
    "retro_serialize": (ctypes.c_bool, ctypes.c_char_p, ctypes.c_size_t),
    "retro_unserialize": (ctypes.c_bool, ctypes.c_char_p, ctypes.c_size_t),
}

OPTIONS = {
    # palettes whose colours all differ in RGB565, see `nes_py_colours`
    b"fceumm_palette": b"raw",
    b"quicknes_palette": b"nintendo-vc",
    # the whole picture; FCEUmm has renamed these twice
    b"fceumm_overscan": b"disabled",
    b"fceumm_overscan_h": b"disabled",
    b"fceumm_overscan_v": b"disabled",
    b"fceumm_overscan_h_left": b"0",
    b"fceumm_overscan_h_right": b"0",
    b"fceumm_overscan_v_top": b"0",
    b"fceumm_overscan_v_bottom": b"0",
    b"quicknes_use_overscan_h": b"enabled",
    b"quicknes_use_overscan_v": b"enabled",
}

# red, green and blue of the 64 colours of an NES, as nes-py shows them
NES_PY_PALETTE = np.frombuffer(
    bytes.fromhex(
        "7c7c7c0000fc0000bc4428bc940084a80020a81000881400503000007800006800005800004058000000000000"
        "000000bcbcbc0078f80058f86844fcd800cce40058f83800e45c10ac7c0000b80000a80000a844008888000000"
        "000000000000f8f8f83cbcfc6888fc9878f8f878f8f85898f87858fca044f8b800b8f81858d85458f89800e8d8"
        "787878000000000000fcfcfca4e4fcb8b8f8d8b8f8f8b8f8f8a4c0f0d0b0fce0a8f8d878d8f878b8f8b8b8f8d8"
        "00fcfcf8d8f8000000000000"
    ),
    np.uint8,
).reshape(64, 3)

# A cartridge that fills the screen with the colour whose number is at address 0, if SHOW_BACKGROUND
# is at address 1. Its program starts at C000:
#   loop: bit 2002 / bpl loop                      wait for the vertical blank
#         lda #3F / sta 2006 / lda #00 / sta 2006  address 3F00, the first colour of the palette ...
#         lda 00 / sta 2007                        ... becomes the wanted one
#         lda #00 / sta 2006 / sta 2006            do not scroll
#         lda 01 / sta 2001 / jmp loop             mask of the picture processor
SHOW_BACKGROUND = 0b1010  # in all columns
PALETTE_ROM = b"".join(
    (
        b"NES\x1a\x01\x01".ljust(16, b"\0"),  # one bank of program, one of pictures, all empty
        bytes.fromhex(
            "2c0220 10fb a93f8d0620 a9008d0620 a5008d0720 a9008d06208d0620 a5018d0120 4c00c0"
        ).ljust(0x3FFA, b"\0"),
        bytes.fromhex("00c0 00c0 00c0"),  # vectors
        bytes(0x2000),
    )
)


class Frontend:
    """A core's callbacks: for its options, picture and buttons.

    It must not refer to its core, which is unloaded with the last reference to it.

    Args:
        colours: what to show for each RGB565 value of the core: uint32 (65536,); bytes in memory:
            red, green, blue, unused.
    """

    def __init__(self, colours: np.ndarray) -> None:
        self.colours = colours
        self.draw = True
        self.pixels = np.zeros((HEIGHT, WIDTH), np.uint32)  # entries of `colours`
        self.screen = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        self.pixel_format: int | None = None
        self.size: tuple[int, int] | None = None  # height and width of what the core drew last
        self.buttons = bytearray(2)  # per controller; bits: A, B, select, start, up, down, ...

    def environment(self, command: int, data: int) -> bool:
        """Answer a question of the core."""
        if command == ENVIRONMENT_GET_AUDIO_VIDEO_ENABLE:
            flags = HARD_DISABLE_AUDIO | (ENABLE_VIDEO if self.draw else 0)
            ctypes.c_int.from_address(data).value = flags
            return True
        if command == ENVIRONMENT_GET_VARIABLE:
            variable = Variable.from_address(data)
            variable.value = OPTIONS.get(variable.key)
            return variable.key in OPTIONS
        if command == ENVIRONMENT_SET_PIXEL_FORMAT:
            wanted = ctypes.c_int.from_address(data).value
            if wanted not in (PIXEL_FORMAT_XRGB8888, PIXEL_FORMAT_RGB565):
                return False
            self.pixel_format = wanted
            return True
        return command == ENVIRONMENT_GET_INPUT_BITMASKS

    def video_refresh(self, data: int | None, width: int, height: int, pitch: int) -> None:
        """Copy a picture: `height` lines, `pitch` bytes from one to the next."""
        if not self.draw or data is None:
            return
        self.size = height, width
        if self.size != (HEIGHT, WIDTH):
            return
        picture = (ctypes.c_uint8 * (pitch * height)).from_address(data)
        lines: Any = np.frombuffer(picture, np.uint8).reshape(height, pitch)
        if self.pixel_format == PIXEL_FORMAT_XRGB8888:
            xrgb = lines[:, : 4 * width].reshape(height, width, 4)
            lines = cv2.cvtColor(xrgb, cv2.COLOR_BGRA2BGR565).reshape(height, 2 * width)
        values = lines[:, : 2 * width].view(np.uint16)
        # "wrap" is the fastest mode; all values are in bounds
        np.take(self.colours, values, out=self.pixels, mode="wrap")
        rgba = self.pixels.view(np.uint8).reshape(HEIGHT, WIDTH, 4)
        cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB, dst=self.screen)

    def input_state(self, port: int, device: int, index: int, button: int) -> int:
        """Whether a button is pressed, or, for DEVICE_ID_JOYPAD_MASK, which ones as bits."""
        if port > 1:
            return 0
        pressed = self.buttons[port]
        return JOYPADS[pressed] if button == DEVICE_ID_JOYPAD_MASK else PRESSED[pressed][button]


class Core:
    """A core with a game in it. It is unloaded when nothing refers to it any more.

    Args:
        path: of the core.
        rom: path of the game.
        frontend: its callbacks.

    Raises:
        UserError: `path` is no libretro core, or does not accept the game.
    """

    def __init__(self, path: Path, rom: Path, frontend: Frontend) -> None:
        with ExitStack() as undo:
            # a library is loaded once per process and holds one game: load a copy
            folder = tempfile.TemporaryDirectory(prefix="icm-core-", ignore_cleanup_errors=True)
            undo.callback(folder.cleanup)
            try:
                _check_length(path)
                library = ctypes.CDLL(shutil.copy(path, folder.name))
            except OSError as error:
                reason = error.strerror or str(error).replace(folder.name + os.sep, "")
                raise UserError(f"env.core={path}: cannot be loaded: {reason}") from None
            undo.callback(_unload, library)
            if sys.platform != "win32":  # there, a file in use cannot be removed
                folder.cleanup()
            try:
                for name, (result, *arguments) in FUNCTIONS.items():
                    function = getattr(library, name)
                    function.restype, function.argtypes = result, arguments
            except AttributeError:
                raise UserError(f"env.core={path}: is no libretro core") from None
            if (version := library.retro_api_version()) != API_VERSION:
                raise UserError(f"env.core={path}: is a core of libretro {version}, not 1")
            info = SystemInfo()
            library.retro_get_system_info(info)
            if b"nes" not in (info.valid_extensions or b"").split(b"|"):
                raise UserError(f"env.core={path}: is no core for the games of the NES")
            self.path, self.library = path, library
            self.lent = {  # ctypes frees a function with the last reference to it
                "retro_set_environment": ENVIRONMENT(frontend.environment),
                "retro_set_video_refresh": VIDEO_REFRESH(frontend.video_refresh),
                "retro_set_audio_sample": AUDIO_SAMPLE(lambda left, right: None),
                "retro_set_audio_sample_batch": AUDIO_SAMPLE_BATCH(lambda data, frames: frames),
                "retro_set_input_poll": INPUT_POLL(lambda: None),
                "retro_set_input_state": INPUT_STATE(frontend.input_state),
            }
            for lend, function in self.lent.items():
                getattr(library, lend)(function)
            library.retro_init()
            undo.callback(library.retro_deinit)
            self.content = rom.read_bytes()  # some cores keep reading it
            game = GameInfo(os.fsencode(rom), self.content, len(self.content), None)
            if not library.retro_load_game(game):
                raise UserError(f"env.core={path}: does not take the game {rom}")
            undo.callback(library.retro_unload_game)
            self.state_size = library.retro_serialize_size()
            if library.retro_get_memory_size(MEMORY_SYSTEM_RAM) != RAM_SIZE or not self.state_size:
                raise UserError(f"env.core={path}: shows no NES memory, or cannot save its state")
            # not when Python exits: views of the memory may still be in use then
            closing = weakref.finalize(self, undo.pop_all().close)
            closing.atexit = False

    def ram(self) -> np.ndarray:
        """A live view of the memory, uint8 (2048,), that keeps the core loaded."""
        address = self.library.retro_get_memory_data(MEMORY_SYSTEM_RAM)
        memory: Any = (ctypes.c_uint8 * RAM_SIZE).from_address(address)
        memory.core = self
        return np.frombuffer(memory, np.uint8)

    def save(self, buffer: ctypes.Array[ctypes.c_char]) -> None:
        """Write the state into a buffer of `state_size` bytes."""
        if not self.library.retro_serialize(buffer, self.state_size):
            raise RuntimeError(f"{self.path}: could not save its state")

    def restore(self, state: bytes) -> None:
        """Go back to a state of the same game and core.

        Raises:
            ValueError: it is from another one.
        """
        size = len(state)
        if size != self.state_size or not self.library.retro_unserialize(state, size):
            raise ValueError(f"{self.path}: does not take this state")


def _check_length(path: Path) -> None:
    """Refuse a truncated ELF file: loading it ends the process. Section headers come last."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) == 64 and header.startswith(b"\x7fELF\x02"):  # 64-bit
        (offset,) = struct.unpack_from("<Q", header, 0x28)
        size, count = struct.unpack_from("<HH", header, 0x3A)
        if path.stat().st_size < offset + size * count:
            raise OSError("the file is cut off")


def _unload(library: ctypes.CDLL) -> None:
    if sys.platform == "win32":
        _ctypes.FreeLibrary(library._handle)
    else:
        _ctypes.dlclose(library._handle)


interrupted: set[int] = set()  # threads that got Ctrl-C while a core ran


@functools.cache
def _keep_interrupts() -> None:
    """Record Ctrl-C in a core's callbacks, where ctypes only prints exceptions."""
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            interrupted.add(threading.get_ident())
        else:
            report(unraisable)

    sys.unraisablehook = hook


@dataclass(frozen=True)
class CoreState:
    """A core's state, and its picture, which is no part of that."""

    state: bytes
    screen: bytes  # compressed to a hundredth, in 0.1 ms


class LibretroEmulator:
    """A core behind the interface of nes-py's emulator (`NESEnv._env`) that games use.

    Views of its screen, memory and controllers are live, and stay valid after `close`.

    Args:
        core: path of the core.
        rom: path of the game.
        colours: see `Frontend`; by default those of nes-py.

    Raises:
        UserError: `core` is no libretro core, or does not run the game.
    """

    def __init__(self, core: Path, rom: Path, colours: np.ndarray | None = None) -> None:
        _keep_interrupts()
        self._frontend = Frontend(nes_py_colours(core) if colours is None else colours)
        self._core = Core(core, rom, self._frontend)
        self._run = self._core.library.retro_run
        self._ram = self._core.ram()
        self._ram[:] = 0  # cores power on with all kinds of patterns, nes-py with zeros
        self._before = ctypes.create_string_buffer(self._core.state_size)
        self._is_current = True
        self._power_on = self._backup = self.dump_state()

    @property
    def draw(self) -> bool:
        """Whether frames are drawn; if not, the screen keeps the last drawn one.

        It changes neither the game nor copies of the screen, which draw a skipped frame first.
        A core that asks GET_AUDIO_VIDEO_ENABLE, as QuickNES does, skips the drawing; with
        others, only the conversion of the picture is saved.
        """
        return self._frontend.draw

    @draw.setter
    def draw(self, draw: bool) -> None:
        self._frontend.draw = draw

    def frame_advance(self, action: int) -> None:
        """Run one frame with the first controller's buttons `action` held."""
        self._frontend.buttons[0] = action
        self._is_current = self._frontend.draw
        if not self._is_current:  # two microseconds; the picture may be needed after all
            self._core.save(self._before)
        self._run()
        if interrupted and threading.get_ident() in interrupted:
            interrupted.remove(threading.get_ident())
            raise KeyboardInterrupt

    def _draw_now(self) -> None:
        """If the latest frame was not drawn, go back and run it once more, drawn."""
        if self._is_current:
            return
        memory = self._ram.copy()  # somebody may have written to it since
        self._core.restore(self._before.raw)
        draw, self.draw = self.draw, True
        self._run()
        self.draw = draw
        self._ram[:] = memory
        self._is_current = True

    def screen_buffer(self) -> np.ndarray:
        """A live view of the picture, RGB, uint8 (240, 256, 3)."""
        return self._frontend.screen

    def copy_screen_rgb(self, output: np.ndarray | None = None) -> np.ndarray:
        """A copy of the picture, RGB, uint8 (240, 256, 3), in `output` if given."""
        if output is None:
            output = np.empty((HEIGHT, WIDTH, 3), np.uint8)
        self._draw_now()
        np.copyto(output, self._frontend.screen)
        return output

    def ram_buffer(self) -> np.ndarray:
        """A live, writable view of the memory, uint8 (2048,)."""
        return self._ram

    def controller_buffer(self, port: int) -> np.ndarray:
        """A live, writable view of the buttons of controller 0 or 1, uint8 (1,)."""
        return np.frombuffer(self._frontend.buttons, np.uint8)[port : port + 1]

    def reset(self) -> None:
        """Go back to power-on."""
        self.load_state(self._power_on)

    def backup(self) -> None:
        """Keep the state for `restore`."""
        self._backup = self.dump_state()

    def restore(self) -> None:
        """Go back to the latest `backup`."""
        self.load_state(self._backup)

    def dump_state(self) -> CoreState:
        """The state and the picture."""
        self._draw_now()
        buffer = ctypes.create_string_buffer(self._core.state_size)
        self._core.save(buffer)
        return CoreState(buffer.raw, zstandard.compress(self._frontend.screen.data, level=1))

    def load_state(self, snapshot: CoreState) -> None:
        """Go back to a state of the same game and core.

        Raises:
            ValueError: it is from another one.
        """
        self._core.restore(snapshot.state)
        screen = np.frombuffer(zstandard.decompress(snapshot.screen), np.uint8)
        self._frontend.screen[...] = screen.reshape(HEIGHT, WIDTH, 3)
        self._is_current = True

    def close(self) -> None:
        """Release the core: it is unloaded once no view of its memory is left."""
        del self._core, self._run, self._ram


class OnLibretro(NESEnv):
    """Mixin that replaces nes-py's emulator with a core, before anything accesses it."""

    core: Path
    _env: Any

    def _controller_buffer(self, port: int) -> np.ndarray:
        if not isinstance(self._env, LibretroEmulator):
            self._env.close()
            self._env = LibretroEmulator(self.core, Path(self._rom_path))
        return super()._controller_buffer(port)

    def draw(self, wanted: bool) -> None:
        """Set whether coming frames are drawn, see `LibretroEmulator.draw`."""
        self._env.draw = wanted


def nes_game(spec: EnvSpec) -> type[NESEnv] | None:
    """The class of an environment if it is an nes-py game."""
    maker = spec.entry_point
    game = load_env_creator(maker) if isinstance(maker, str) else maker
    return game if isinstance(game, type) and issubclass(game, NESEnv) else None


def on_libretro(spec: EnvSpec, core: Path) -> EnvSpec:
    """The specification of an nes-py game, on a core.

    Raises:
        UserError: it is not such a game.
    """
    game = nes_game(spec)
    if game is None:
        raise UserError(f"env.emulator=libretro: env.id={spec.id} is no NES game; use nes_py")
    on_core: Any = type(game.__name__, (OnLibretro, game), {"core": core})
    return replace(spec, entry_point=on_core)


def each_colour(emulator: Any) -> Iterator[int]:
    """Run PALETTE_ROM on an emulator; yields the number of each colour as it fills the screen."""
    ram = emulator.ram_buffer()
    ram[1] = SHOW_BACKGROUND
    for _ in range(10):  # the picture processor takes some frames to wake up
        emulator.frame_advance(0)
    for colour in range(len(NES_PY_PALETTE)):
        ram[0] = colour
        for _ in range(2):
            emulator.frame_advance(0)
        yield colour


@functools.cache
def nes_py_colours(core: Path) -> np.ndarray:
    """What to show for each RGB565 value of a core, so that it looks like nes-py.

    PALETTE_ROM makes the core show its 64 colours. The other values only occur with the NES's
    emphasis bits, which nes-py ignores and none of the four games sets: they stay unchanged.

    Returns:
        see `Frontend`.

    Raises:
        UserError: `core` is no libretro core, or does not draw NES pictures.
    """
    values = np.arange(1 << 16, dtype=np.uint32)
    with tempfile.TemporaryDirectory() as folder:
        rom = Path(folder, "palette.nes")
        rom.write_bytes(PALETTE_ROM)
        emulator = LibretroEmulator(core, rom, values)
        frontend = emulator._frontend
        shown = [frontend.pixels[HEIGHT // 2, WIDTH // 2] for _ in each_colour(emulator)]
    if frontend.size != (HEIGHT, WIDTH) or frontend.pixel_format is None:
        raise UserError(f"env.core={core}: does not draw {WIDTH}x{HEIGHT} pixels of 16 or 32 bits")
    rgb565 = values.astype(np.uint16).view(np.uint8).reshape(1, -1, 2)
    colours = cv2.cvtColor(rgb565, cv2.COLOR_BGR5652RGBA)[0]
    colours[shown, :3] = NES_PY_PALETTE
    return colours.view(np.uint32)[:, 0]
