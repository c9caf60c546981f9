"""Environments of all ranks; each rank steps its own."""

from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from icm.collectives import all_objects, all_rows
from icm.envs import episodes_in
from icm.envs.stepper import RESULTS
from icm.envs.vector import NOWHERE, WorkerVectorEnv, infos_of
from icm.ranks import RANK, WORLD_SIZE


class SharedVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """All ranks' environments as one vector environment, the same in every rank.

    After each step ranks exchange what their environments gave: 7 kB per agent step, most of it
    the state.

    Args:
        envs: of this rank, numbered as part of the whole.
    """

    def __init__(self, envs: WorkerVectorEnv) -> None:
        self.envs = envs
        self.num_envs = envs.num_envs * WORLD_SIZE
        self.rows = slice(RANK * envs.num_envs, (RANK + 1) * envs.num_envs)
        self.single_observation_space = envs.single_observation_space
        self.single_action_space = envs.single_action_space
        self.observation_space = batch_space(envs.single_observation_space, self.num_envs)
        self.action_space = batch_space(envs.single_action_space, self.num_envs)
        self.metadata = envs.metadata
        space = envs.single_observation_space
        self._row = np.dtype(
            [
                ("observations", space.dtype, space.shape),
                *((name, dtype, shape) for name, (shape, dtype) in RESULTS.items()),
                *((name, value.dtype) for name, value in NOWHERE.items()),
                ("failures", np.int64),  # of the rank
                ("has_news", np.bool),  # whether the rank has ended episodes, or scenery
            ]
        )
        self.failures = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin new episodes, see `WorkerVectorEnv.reset`."""
        super().reset(seed=seed)
        observations, infos = self.envs.reset(seed=seed, options=options)
        whole, infos = self._whole(infos, observations=observations)
        return whole["observations"].copy(), infos

    def step_async(self, actions: np.ndarray) -> None:
        """Let this rank's workers step, see `WorkerVectorEnv.step_async`."""
        self.envs.step_async(actions[self.rows])

    def step_wait(
        self,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Wait for this rank's workers and for the other ranks."""
        *arrays, infos = self.envs.step_wait()
        names = "observations", "rewards", "terminated", "truncated"
        whole, infos = self._whole(infos, **dict(zip(names, arrays, strict=True)))
        observations, rewards, terminated, truncated = (whole[name].copy() for name in names)
        return observations, rewards, terminated, truncated, infos

    def way(self, row: int) -> tuple[int, list[int]]:
        """See `WorkerVectorEnv.way`, of the environment's rank; all ranks call it together."""
        rank, own = divmod(row, self.envs.num_envs)
        return all_objects(self.envs.way(own))[rank]

    def state_dict(self) -> dict[str, Any]:
        """That of a `WorkerVectorEnv` with all environments."""
        parts = all_objects(self.envs.state_dict())
        names = parts[0].keys() - {"entropy"}
        whole = {name: [value for part in parts for value in part[name]] for name in names}
        return {"entropy": parts[0]["entropy"], **whole}

    def restore(self, state: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Replay running episodes, see `WorkerVectorEnv.restore`."""
        names = state.keys() - {"entropy"}
        part = {name: state[name][self.rows] for name in names}
        observations, ended, infos = self.envs.restore({"entropy": state["entropy"], **part})
        whole, infos = self._whole(infos, observations=observations, terminated=ended)
        return whole["observations"].copy(), whole["terminated"].copy(), infos

    def close_extras(self, **kwargs: Any) -> None:
        """End this rank's workers."""
        self.envs.close()

    def _whole(
        self, infos: dict[str, Any], **results: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """All environments' results, as array fields, and infos, from this rank's part."""
        episodes = [(row + self.rows.start, one) for row, one in episodes_in(infos).items()]
        scenery = infos.get("scenery", [])
        rows = np.zeros(self.envs.num_envs, self._row)
        for name, array in results.items():
            rows[name] = array
        for name, info in (("cells", "cell"), ("has_cell", "_cell")):
            rows[name] = infos.get(info, 0)
        for name in ("life_lost", "respawned", *NOWHERE):
            rows[name] = infos[name]
        rows["failures"] = self.envs.failures
        rows["has_news"] = bool(episodes or scenery)
        packed = torch.from_numpy(rows.view(np.uint8).reshape(len(rows), -1))
        whole = all_rows(packed).numpy().view(self._row).squeeze(1)
        self.failures = int(whole["failures"].sum()) // self.envs.num_envs
        found = infos_of(whole)
        found |= {name: whole[name].copy() for name in NOWHERE}
        if whole["has_news"].any():
            for theirs, places in all_objects((episodes, scenery)):
                for row, episode in theirs:
                    found = self._add_info(found, {"episode": episode}, row)
                found.setdefault("scenery", []).extend(places)
        return whole, found
