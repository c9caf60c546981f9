"""Damaged or forged checkpoints: each is refused in one line, or does what it says."""

import io
import os
import random
import shutil
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from icm import checkpoint
from icm.soak.forked import Ended, run_forked
from icm.soak.program import LEARNERS, QUICK, Findings

TIMEOUT = 180.0  # seconds for a script, on a busy machine
FACTOR = 10  # memory that reading a file may add, times its size, plus ...
SPARE = 512 << 20  # ... this: its settings may ask for more than good ones do

type Members = dict[str, bytes]


def files(folder: Path, number: int, seed: int) -> Findings:
    """Inspect `number` files, and play, export or resume each, with the real scripts."""
    found, good = Findings(), folder / "good" / "latest.pt"
    given = (*LEARNERS["ppo"], *QUICK, "total_steps=128", f"hydra.run.dir={folder}/run")
    trained = _run("train.py", given)
    if trained.returncode != 0:
        found.failures.append(f"no checkpoint to damage: {trained.stderr}")
        return found
    shutil.copytree(folder / "run" / "checkpoints", good.parent)
    canary = folder / "CANARY"
    whole = good.read_bytes()
    total = checkpoint.load(good)["step"] + 64
    looking, *using = SCRIPTS
    tried = (looking, *using[: -(-number // len(KINDS))])  # what `attempt` comes to
    usual = {script: _run_on(good, script, total) for script in tried}
    for script, ended in usual.items():
        found.expect(ended.returncode == 0, f"{script} refuses a good file: {ended.stderr}")

    def attempt(number: int) -> tuple[str, str, list[str]]:
        """A file's kind, what became of it, and what was wrong with that."""
        chance = random.Random(f"{seed} {number}")
        kind = list(KINDS)[number % len(KINDS)]
        path = folder / "files" / str(number) / "latest.pt"
        path.parent.mkdir(parents=True)
        for memory in good.parent.glob("replay_*.pt"):
            shutil.copy(memory, path.parent)
        path.write_bytes(KINDS[kind](whole, chance, canary))
        wrong, ends = [], set()
        for script in (looking, using[number // len(KINDS) % len(using)]):
            ended = _run_on(path, script, total)
            ends.add("accepted" if ended.returncode == 0 else "refused")
            if complaint := _wrong(ended, usual[script], path.stat().st_size):
                wrong.append(f"{script} {path} ({kind}): {complaint}")
        if not wrong:
            shutil.rmtree(path.parent)
        return kind, "/".join(sorted(ends)), wrong

    ends: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    with ThreadPoolExecutor(os.process_cpu_count()) as side_by_side:
        for kind, end, wrong in side_by_side.map(attempt, range(number)):
            found.tried += 1
            found.failures += wrong
            ends[kind][end] += 1
    found.expect(not canary.exists(), "a file was executed")
    found.figures = {kind: dict(counter) for kind, counter in ends.items()}
    return found


def _run_on(path: Path, script: str, total: int) -> Ended:
    """Run one of `SCRIPTS` on a checkpoint; it may write into its folder."""
    filled = (text.format(path=path, folder=path.parent, total=total) for text in SCRIPTS[script])
    return _run(script, tuple(filled))


def _run(script: str, arguments: tuple[str, ...]) -> Ended:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return run_forked(script, arguments, environment, TIMEOUT)


SCRIPTS = {
    "inspect_ckpt.py": ["{path}"],
    "play.py": ["ckpt={path}", "episodes=1", "render=none", "device=cpu"],
    "export.py": ["ckpt={path}", "out={folder}/exported.pt"],
    "train.py": ["resume={path}", "total_steps={total}", "hydra.run.dir={folder}/run"],
}
"""What people do with a checkpoint that somebody gave them."""


def _wrong(ended: Ended, usual: Ended, size: int) -> str | None:
    """What is wrong with how a script ended; None if nothing is."""
    if ended.returncode is None:
        return f"did not end in {TIMEOUT:.0f} seconds"
    if "Traceback" in ended.stderr or ended.returncode not in (0, 2):
        return f"exit status {ended.returncode}: {ended.stderr[-300:]}"
    if ended.returncode == 2 and (
        len(ended.stderr.strip().splitlines()) != 1 or ": error: " not in ended.stderr
    ):
        return f"not one clear line: {ended.stderr[-300:]}"
    if ended.peak > usual.peak + FACTOR * size + SPARE:
        return f"took {ended.peak >> 20} MiB of memory, {usual.peak >> 20} are usual"
    return None


# --- kinds of damage --------------------------------------------------------------------------


def _flipped(whole: bytes, chance: random.Random, canary: Path) -> bytes:
    content = bytearray(whole)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(content)


def _truncated(whole: bytes, chance: random.Random, canary: Path) -> bytes:
    return whole[: chance.randrange(len(whole))]


def _overwritten(whole: bytes, chance: random.Random, canary: Path) -> bytes:
    start, length = chance.randrange(len(whole)), chance.randrange(1, 5000)
    filling = chance.choice((bytes(length), chance.randbytes(length)))
    return whole[:start] + filling + whole[start + length :]


def _swapped(whole: bytes, chance: random.Random, canary: Path) -> bytes:
    members = _members(whole)
    a, b = chance.sample(sorted(members), 2)
    members[a], members[b] = members[b], members[a]
    return _archive(members)


def _without_one(whole: bytes, chance: random.Random, canary: Path) -> bytes:
    members = _members(whole)
    del members[chance.choice(sorted(members))]
    return _archive(members)


def _renamed(whole: bytes, chance: random.Random, canary: Path) -> bytes:
    members = _members(whole)
    old = chance.choice(sorted(members))
    members[chance.choice(("../../CANARY", "/tmp/CANARY", f"{old}x", ""))] = members.pop(old)
    return _archive(members)


def _compressed(whole: bytes, chance: random.Random, canary: Path) -> bytes:
    members = _members(whole)
    members[chance.choice(sorted(members))] = bytes(64 << 20)
    return _archive(members, zipfile.ZIP_DEFLATED)


def _edited(whole: bytes, chance: random.Random, canary: Path) -> bytes:
    """Changes bytes of the pickle, with a correct checksum."""
    members = _members(whole)
    name = _pickle(members)
    content = bytearray(members[name])
    for _ in range(chance.choice((1, 1, 2, 8))):
        content[chance.randrange(len(content))] = chance.randrange(256)
    members[name] = bytes(content)
    return _archive(members)


def _respelled(whole: bytes, chance: random.Random, canary: Path) -> bytes:
    """Replaces a word or a number of the pickle, so that it stays a valid pickle."""
    members = _members(whole)
    name = _pickle(members)
    content = members[name]
    for _ in range(chance.choice((1, 1, 3))):
        old, new = chance.choice(SPELLINGS)
        places = [i for i in range(len(content)) if content.startswith(old, i)]
        if places:
            at = chance.choice(places)
            content = content[:at] + new + content[at + len(old) :]
    members[name] = content
    return _archive(members)


SPELLINGS = [
    (b"K\x01", b"K\x00"),
    (b"K\x02", b"K\xff"),
    (b"K\x20", b"N"),
    (b"\x88", b"\x89"),
    (b"M", b"K"),
    (b"}q", b"]q"),
    (b"G?", b"G\xff"),
    (b"G?", b"G\x7f"),
    (b"N", b"K\x03"),
    (b"models", b"model?"),
    (b"step", b"ste?"),
    (b"scale", b"scal?"),
    (b"env", b"en?"),
    (b"agent", b"agen?"),
    (b"FloatStorage", b"ByteStorage"),
    (b"LongStorage", b"FloatStorage"),
]


def _forged(whole: bytes, chance: random.Random, canary: Path) -> bytes:
    return forged(whole, chance.choice(forgeries(canary)), alone=chance.random() < 0.5)


def forgeries(canary: Path) -> list[bytes]:
    """Pickles that run a command that creates `canary`, fill the memory, or never end."""
    command = _text(f"touch {canary}")
    return [
        b"cposix\nsystem\n" + command + b"\x85R",
        b"cbuiltins\neval\n" + _text(f"open({str(canary)!r}, 'w')") + b"\x85R",
        b"cbuiltins\n__import__\n" + _text("os") + b"\x85R",
        b"csubprocess\nPopen\n(" + command + b"K\x00NNNN\x88\x88tR",
        b"ctorch\nload\n" + _text(str(canary)) + b"\x85R",
        b"(" + command + b"iposix\nsystem\n",
        b"cnumpy\nzeros\n\x8a\x05\x00\x00\x00\x00\x10\x85R",
        b"ctorch\nzeros\n\x8a\x05\x00\x00\x00\x00\x10\x85R",
        b"]" * 200_000 + b"a" * 199_999,
        b")" + b"\x85" * 300_000,
        b"}q\xfe" + _text("a") + b"h\xfes",
        b"\x8e" + struct.pack("<Q", 1 << 40) + b"N",
        b"Nr\xff\xff\xff\xff",
        b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R",
        b"cos\nenviron\n}" + _text("PATH") + _text("x") + b"sb",
    ]


def forged(whole: bytes, forgery: bytes, *, alone: bool) -> bytes:
    """A checkpoint with `forgery` in its pickle; `alone`: nothing else."""
    members = _members(whole)
    name = _pickle(members)
    if alone:
        members[name] = b"\x80\x02" + forgery + b"."
    else:  # as one more entry of a good file
        end = members[name].rindex(b"u.")
        members[name] = members[name][:end] + _text("more") + forgery + b"u."
    return _archive(members)


def _of_other_shape(whole: bytes, chance: random.Random, canary: Path) -> bytes:
    """Changes sizes, strides or offsets of tensors."""
    members = _members(whole)
    name = _pickle(members)
    content = members[name]
    places = [i for i in range(len(content)) if content.startswith(b"QK\x00", i)]
    at = chance.choice(places) + 1  # the offset of a tensor, after its storage; then its sizes
    new = chance.choice((b"K\x07", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"N"))
    if chance.random() < 0.5:
        at += 2
        at += next(i for i in range(40) if content[at + i : at + i + 1] in (b"K", b"M", b")"))
    size = {b"K": 2, b"M": 3, b")": 1}[content[at : at + 1]]
    members[name] = content[:at] + new + content[at + size :]
    return _archive(members)


KINDS: dict[str, Callable[[bytes, random.Random, Path], bytes]] = {
    "bits flipped": _flipped,
    "truncated": _truncated,
    "overwritten": _overwritten,
    "members swapped": _swapped,
    "a member is missing": _without_one,
    "a member renamed": _renamed,
    "a zip bomb": _compressed,
    "pickle edited": _edited,
    "pickle respelled": _respelled,
    "pickle forged": _forged,
    "shapes changed": _of_other_shape,
}


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _pickle(members: Members) -> str:
    return next(name for name in members if name.endswith("data.pkl"))


def _members(whole: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _archive(members: Members, how: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()
