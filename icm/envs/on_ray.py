"""Workers as actors of a Ray cluster; nothing else imports ray."""

import logging
import math
import os
import signal
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import compress
from typing import Any

import numpy as np

from icm.envs.snapshots import Trail
from icm.envs.stepper import GIVEN, RESULTS, Answer, Fields, Order, Stepper
from icm.envs.wrappers import Env
from icm.errors import UserError
from icm.processes import signals_blocked
from icm.ranks import CORES, WORLD_SIZE

# else, under `uv run`, it sends the working directory to all nodes and installs everything there
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# for a cluster started here; else its actors would yield to everything else that runs
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

STARTING = 120.0  # seconds within which all actors must start
LAST = 1.0  # seconds to wait for an answer, at least
SUSPECT = 60.0  # seconds during which a node where one failed gets no actor

type Place = tuple[str, str]
"""Where an actor runs: the machine's name, and Ray's id of the node."""

type Rows = dict[str, bytes]
"""Rows of arrays by name."""

type Heard = tuple[Answer, list[int], Rows]
"""An answer; rows whose observation is the previous one shifted by a plane (stacked frames); and
all results, with the `newest` planes of those rows and the `whole` observations of the others.
"""


class RayWorkers:
    """Actors of a Ray cluster; see `icm.envs.vector.Workers`.

    The cluster is the one that `RAY_ADDRESS` names or that runs on this machine, else a new one on
    this machine alone that ends with this process. At most one step is under way per actor.

    A failed actor is replaced by a new one, on another node if there is one.

    Args:
        make: builds one environment; must be picklable, and every node must have this package.
        number: how many, with a core each; None: one per free core.
        most: upper limit of that number.
        busy_cores: how many cores of this machine the caller needs while they step.
        fields: the arrays.

    Raises:
        UserError: the cluster cannot be reached, or has too few free cores, or a node cannot make
            environments.
    """

    def __init__(
        self,
        make: Callable[[], Env],
        number: int | None,
        most: int,
        busy_cores: int,
        fields: Fields,
    ) -> None:
        self._given = make, fields
        self.arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in fields.items()}
        self._actors: list[Any] = []
        self._connected = not ray.is_initialized()  # by this object
        if self._connected:
            _connect()
        try:
            places = self._start_all(number, most)
        except BaseException:
            self.end()
            raise
        # only actors on the caller's machine compete with it: they come last
        here = socket.gethostname()
        order = sorted(range(self.number), key=lambda worker: places[worker][0] == here)
        self._actors = [self._actors[worker] for worker in order]
        self._nodes = [places[worker][1] for worker in order]
        near = sum(machine == here for machine, _ in places)
        crowded = near + busy_cores - CORES
        self.late = min(max(crowded, 0), near, self.number - 1)
        self._failed: dict[str, float] = {}  # when an actor last failed, by node
        self._rows: list[list[int]] = [[] for _ in order]  # stepped by each of them
        self._answers = [actor.begin.remote() for actor in self._actors]
        self._sent = [time.monotonic()] * self.number

    def send(self, worker: int, order: Order) -> None:
        """See `Workers`."""
        self._rows[worker] = sorted(order[0])
        given = _pack(self.arrays, self._rows[worker], GIVEN)
        self._answers[worker] = self._actors[worker].step.remote(order, given)
        self._sent[worker] = time.monotonic()

    def listen(self, worker: int, patience: float) -> Answer | str:
        """See `Workers`."""
        heard = self._hear(worker, patience)
        if isinstance(heard, str):
            self._failed[self._nodes[worker]] = time.monotonic()
            return heard
        answer, moved, results = heard
        rows = self._rows[worker]
        _unpack(self.arrays, rows, RESULTS, results)
        states = self.arrays["observations"]
        states[moved, :-1] = states[moved, 1:]
        states[moved, -1:] = _read(states[:, -1:], moved, results["newest"])
        others = [row for row in rows if row not in moved]
        states[others] = _read(states, others, results["whole"])
        return answer

    def trail(self, worker: int, row: int, done: int, patience: float) -> Trail | None:
        """See `Workers`."""
        try:
            return ray.get(self._actors[worker].trail.remote(row, done), timeout=patience)
        except RayError:  # includes timeouts
            return None

    def restart(self, worker: int) -> None:
        """See `Workers`."""
        ray.kill(self._actors[worker])
        self._nodes[worker] = self._home()
        # no core reserved: there may be none. An actor that requests nothing at all is sent to a
        # random node first, which may be dead
        strategy = NodeAffinitySchedulingStrategy(self._nodes[worker], soft=True)
        self._actors[worker] = self._start(num_cpus=0, memory=1, scheduling_strategy=strategy)
        self._rows[worker] = []
        self._answers[worker] = self._actors[worker].begin.remote()
        self._sent[worker] = time.monotonic()

    def end(self) -> None:
        """See `Workers`."""
        if ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor)
            if self._connected:
                ray.shutdown()
        self._actors = []

    def _start_all(self, number: int | None, most: int) -> list[Place]:
        """Start the actors; returns where each runs."""
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cores = sum(int(node["Resources"].get("CPU", 0)) for node in nodes)
        free = int(ray.available_resources().get("CPU", 0))
        # the other ranks may want as many
        share = min(free, cores // WORLD_SIZE)
        self.number = min(number or max(share, 1), most)
        if self.number > free:
            raise UserError(
                f"collector=ray: env.num_workers={self.number} needs as many cores, and of the "
                f"{cores} cores of the Ray cluster {free} are free"
            )
        print(f"Ray: {cores} cores on {len(nodes)} nodes; environments get {self.number}")
        self._actors = [
            self._start(num_cpus=1, scheduling_strategy="SPREAD") for _ in range(self.number)
        ]
        try:
            return ray.get([actor.prepare.remote() for actor in self._actors], timeout=STARTING)
        except UserError as error:  # its text has the actor's traceback, too
            raise UserError(f"collector=ray: on a node, {error.args[0]}") from None
        except GetTimeoutError:
            raise UserError(
                f"collector=ray: not all actors have started within {STARTING:g} seconds; "
                "has somebody else taken the cores?"
            ) from None
        except RayError as error:
            raise RuntimeError(f"an actor of the environments failed:\n{error}") from None

    def _hear(self, worker: int, patience: float) -> Heard | str:
        # counted from the sending: if a node is silent, so are all its actors
        left = max(self._sent[worker] + patience - time.monotonic(), LAST)
        try:
            try:  # twice, because both may have been paused, as in `LocalWorkers`
                return ray.get(self._answers[worker], timeout=left / 2)
            except GetTimeoutError:
                return ray.get(self._answers[worker], timeout=left / 2)
        except GetTimeoutError:
            return f"it did not answer for {patience:g} seconds"
        except RayError as error:
            text = str(error).strip()
            return f"{text}\n{type(error).__name__}: {text.splitlines()[0]}"

    def _start(self, **how: Any) -> Any:
        # Ray must not restart it: a new one has to replay the running episodes
        return ray.remote(_Actor).options(max_restarts=0, **how).remote(*self._given)

    def _home(self) -> str:
        """The node for a new actor: the one with the fewest actors per core.

        Nodes where one has just failed come last: for ten seconds and longer, Ray takes a killed
        node for alive.
        """
        actors, now = Counter(self._nodes), time.monotonic()

        def order(node: dict[str, Any]) -> tuple[bool, float]:
            name, cores = node["NodeID"], node["Resources"].get("CPU", 0)
            failed = now - self._failed.get(name, -math.inf) < SUSPECT
            return failed, (actors[name] + 1) / cores if cores else math.inf

        return min((node for node in ray.nodes() if node["Alive"]), key=order)["NodeID"]


class _Actor:
    """A worker on a node: has its own arrays, and sends what has changed in them."""

    def __init__(self, make: Callable[[], Env], fields: Fields) -> None:
        self._arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in fields.items()}
        self._stepper = Stepper(make, self._arrays)
        self._known: set[int] = set()  # rows whose observation the other side has

    def prepare(self) -> Place:
        """Make an environment, which a node may be unable to; returns where it runs."""
        self._stepper.prepare()
        return socket.gethostname(), ray.get_runtime_context().get_node_id()

    def begin(self) -> Heard | str:
        """`step` without rows."""
        return self.step((set(), {}, {}), _pack(self._arrays, [], GIVEN))

    def trail(self, row: int, done: int) -> Trail:
        """See `Stepper`."""
        return self._stepper.trail(row, done)

    def step(self, order: Order, given: Rows) -> Heard | str:
        """Step rows, `given` in sorted order; returns a traceback if it fails."""
        try:
            rows = sorted(order[0])
            _unpack(self._arrays, rows, GIVEN, given)
            states = self._arrays["observations"]
            before = states[rows, 1:]
            answer = self._stepper.step(order)
            same = (states[rows, :-1] == before).all(tuple(range(1, states.ndim)))
            moved = [row for row in compress(rows, same) if row in self._known]
            others = [row for row in rows if row not in moved]
            self._known = set(rows)
            results = _pack(self._arrays, rows, RESULTS)
            results |= {"newest": states[moved, -1:].tobytes(), "whole": states[others].tobytes()}
            return answer, moved, results
        except Exception:
            return traceback.format_exc()


def _connect() -> None:
    """Find a cluster, or start one on this machine's cores, deaf to this process's signals."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    handler = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address != "local":
            try:
                ray.init("auto", **quiet)
                return
            except ConnectionError:
                if address is not None:
                    raise
        with signals_blocked():
            ray.init("local", num_cpus=os.process_cpu_count(), include_dashboard=False, **quiet)
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        raise UserError(f"collector=ray: {error}") from None
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray installs its own


def _pack(arrays: dict[str, np.ndarray], rows: list[int], names: Fields) -> Rows:
    return {name: arrays[name][rows].tobytes() for name in names}


def _unpack(arrays: dict[str, np.ndarray], rows: list[int], names: Fields, packed: Rows) -> None:
    for name in names:
        arrays[name][rows] = _read(arrays[name], rows, packed[name])


def _read(array: np.ndarray, rows: list[int], packed: bytes) -> np.ndarray:
    """Rows of an array like this one."""
    return np.frombuffer(packed, array.dtype).reshape(len(rows), *array.shape[1:])
