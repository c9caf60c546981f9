"""The loop: act, step, observe, update. Nothing else knows the order."""

import math
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from icm import checkpoint
from icm.agents.base import Agent, BrokenDownError
from icm.collectives import all_objects, greatest, seconds
from icm.config import ELSEWHERE, Config, flat, typed
from icm.display import Display
from icm.envs import action_count, core_name, episodes_in
from icm.envs.vector import WorkerVectorEnv
from icm.errors import UserError, WriteError
from icm.exploration import Exploration, restored
from icm.files import latest, numbered, remove_leftovers
from icm.intervals import crossed
from icm.models import NO_ACTION
from icm.output import leave_terminal, say
from icm.processes import HANGUP, signals_handled
from icm.ranks import RANK, WORLD_SIZE
from icm.replay import since_opening
from icm.shared_envs import SharedVectorEnv
from icm.tracking import Clock, Tracker
from icm.versions import versions
from icm.viz.gallery import Gallery
from icm.viz.studio import Drawn

EPISODE_METRICS = ("distance", "length", "reward", "flag", "levels_passed")
SAME_SIGNAL = 1.0  # seconds: one may come twice, from a terminal and from `uv run`
HURRY = 5.0  # seconds for drawing after a signal: some send a stronger one after ten


class Trainer:
    """Trains an agent in a vector environment and keeps its run folder.

    All ranks do the same; only the first saves.

    Args:
        agent: the learner.
        envs: environments that reset themselves on the step after an episode's end (NEXT_STEP).
        folder: the run folder.
        config: all settings.
    """

    def __init__(
        self,
        agent: Agent,
        envs: WorkerVectorEnv | SharedVectorEnv,
        folder: Path,
        config: Config,
    ) -> None:
        self.agent, self.envs, self.folder, self.config = agent, envs, folder, config
        self.step = 0
        self.best_average = -math.inf  # score, of the checkpoints in this run folder
        self.exploration = Exploration()
        self.gallery = Gallery(folder, config)
        self.core = core_name(config.env)
        self.stopped_by: int | None = None
        self.going_on: dict[str, Any] | None = None  # of the checkpoint that is continued exactly
        # of the running episodes: the previous actions, and the agent steps so far
        self.previous = torch.full((envs.num_envs,), NO_ACTION)
        self.age = torch.zeros(envs.num_envs, dtype=torch.int64)
        self.unobserved: dict[str, Tensor] | None = None  # arguments of the agent's `observe`

    def run(self) -> int | None:
        """Train from the current step to `total_steps`, or until a signal asks to stop.

        Returns:
            the number of that signal, None if the run is complete. It is saved in both cases.

        Raises:
            UserError: nothing can be written any more, or learning has broken down. What was saved
                before is intact.
        """
        total, log_every = self.config.total_steps, self.config.log.every
        save_every = self.config.checkpoint.every
        self.tracker = Tracker(self.folder, self.step, asdict(self.config))
        if self.going_on is not None:
            with checkpoint.restoring(self.going_on["path"]):
                self.tracker.load_state_dict(self.going_on["interval"])
            self.tracker.last = self.going_on["metrics"]
        self.display = Display(self.step, total)
        try:
            with self._stopping_on_signals():
                begun = self._begin()
                clock = Clock(self.step)  # not before: replaying episodes may take minutes
                for _ in self._steps(total, clock, *begun):
                    self.display.advance(self.step)
                    if crossed(self.step, self.envs.num_envs, log_every):
                        self._log(clock)
                    if crossed(self.step, self.envs.num_envs, save_every) and self.step < total:
                        with clock.phase("save"):
                            self.save()
                    drawn = self.gallery.update(self.step, self.envs.num_envs, self.exploration)
                    self._show(drawn)
                    if number := greatest(self.stopped_by or 0):  # all ranks stop together
                        self.stopped_by = number
                        break
                if self.step >= total:  # else a resumed run completes the interval
                    self._log(clock)
                self.save()
                self.display.close()  # before what is printed on another stream
                say(f"saved step {self.step}: {latest(self.folder)}", sys.stdout)
                if self.gallery.every and self.stopped_by is None:
                    self.display.say("drawing the maps, the films and the report")
                drawings = self.gallery.finish(
                    self.step,
                    self.exploration,
                    lambda: math.inf if self.stopped_by is None else HURRY,
                )
                for drawn in drawings:
                    self._show(drawn)
        except BrokenDownError as error:
            raise UserError(
                f"step {self.step}: {error}; resume an older step_….pt of "
                f"{self.folder / 'checkpoints'} with a lower agent.lr "
                f"(it is {self.config.agent.lr:g}) or with precision=float32"
            ) from None
        except WriteError:
            if WORLD_SIZE == 1:
                with suppress(WriteError):  # this may still be possible
                    self.save()
            raise
        finally:
            self.gallery.close()
            self.display.close()
            self.tracker.close()
        return self.stopped_by if self.step < total else None

    def _steps(self, total: int, clock: Clock, states: Tensor, reset: Tensor) -> Iterator[None]:
        """Vector steps; while the emulators run, the agent observes the last one and learns."""
        agent, envs = self.agent, self.envs
        n = envs.num_envs
        while self.step < total:
            with clock.phase("act"):
                actions, probabilities, values = agent.act(states, self.previous, self.step)
            envs.step_async(actions.numpy())
            # while the emulators run
            with clock.phase("observe"):
                self._observe()
            if due := agent.due(self.step):
                with clock.phase("update"):
                    for _ in range(due):
                        self.tracker.add(agent.update())
            with clock.phase("wait"):
                observations, rewards, terminated, truncated, infos = envs.step_wait()
            self.age = (self.age + 1).masked_fill(reset, 0)  # a reset has opened an episode
            next_states = since_opening(torch.from_numpy(observations), self.age)
            ended = terminated | truncated
            self.unobserved = {
                "states": states,
                "previous": self.previous,
                "probabilities": probabilities,
                "values": values,
                "actions": actions,
                "next_states": next_states,
                "rewards": torch.from_numpy(rewards).float(),
                # a lost life is a death like one that ends an episode
                "terminated": torch.from_numpy(terminated | infos["life_lost"]),
                "truncated": torch.from_numpy(truncated),
                "reset": reset,
                "respawned": torch.from_numpy(infos["respawned"]),
                "origin": torch.from_numpy(infos["origin"]),
                "undone": torch.from_numpy(infos["undone"]),
            }
            newcomer = self.exploration.visit(self.step + n, infos, ended)
            if newcomer is not None:
                self.exploration.discover(self.step + n, envs.way(newcomer))
            for episode in episodes_in(infos).values():
                self._episode(self.step + n, episode)
            self.previous = actions.masked_fill(reset, NO_ACTION)
            states, reset = next_states, torch.from_numpy(ended)
            self.step += n
            if self.step - n < agent.config.warmup_steps <= self.step:
                self._observe()
                agent.measure_input()
            yield

    def _begin(self) -> tuple[Tensor, Tensor]:
        """Begin episodes, or continue those that a checkpoint was in the middle of.

        Returns:
            what `Agent.observe` calls states and reset.
        """
        envs, n = self.envs, self.envs.num_envs
        if self.going_on is None:
            observations, infos = envs.reset(seed=self.config.seed + self.step)
            self.exploration.been.clear()
            self.exploration.visit(self.step, infos, np.zeros(n, bool))
            ended = np.zeros(n, bool)
        else:
            observations, ended, infos = envs.restore(self.going_on["episodes"])
            self.exploration.see(infos)
            self.exploration.stand(self.step, infos, n)
        return since_opening(torch.from_numpy(observations), self.age), torch.from_numpy(ended)

    def _observe(self) -> None:
        """Let the agent observe the last vector step, if it has not yet."""
        if self.unobserved is not None:
            samples, surprise = self.agent.observe(**self.unobserved)
            self.tracker.add(samples)
            self.exploration.judge(surprise.tolist())
            chosen = ~self.unobserved["reset"]
            self.tracker.collect("curiosity/surprise", surprise[~surprise.isnan()])
            self.tracker.collect("policy/actions", self.unobserved["actions"][chosen])
            self.unobserved = None

    def _episode(self, step: int, episode: dict[str, Any]) -> None:
        named = {f"episode/{k}": float(v) for k, v in episode.items() if k in EPISODE_METRICS}
        self.tracker.add(named)
        self.exploration.finish(step, episode)

    def _log(self, clock: Clock) -> None:
        self._observe()
        self.agent.check_updates()
        metrics = self.tracker.averages()
        if not metrics:
            return
        metrics |= self.exploration.statistics()
        if WORLD_SIZE > 1:
            clock.phases["ranks"] = max(all_objects(seconds()))
        metrics |= clock.speeds(self.step, self.config.env.action_repeat)
        metrics |= self.agent.policy.statistics(self.step)
        metrics["workers/failures"] = self.envs.failures
        metrics["learner/skipped"] = self.agent.skipped.item()
        self.tracker.write(self.step, metrics)
        self.display.show(self.step, metrics)

    # --- saving ---------------------------------------------------------------------------------

    def resume(self, path: Path) -> None:
        """Continue a checkpoint as if the run had never stopped.

        That needs the same environments and seed, and the memory of the same step beside the
        checkpoint. With others, or another seed, new episodes begin; without the memory, or if its
        size changes, the agent fills a new one for as many steps as a warm-up has before it learns.

        Raises:
            UserError: the checkpoint cannot be read, or does not fit.
        """
        content, memory = checkpoint.with_memory(path)
        remove_leftovers(path.parent)
        self.step = content["step"]
        self.best_average = self._best_average()
        with checkpoint.restoring(path):
            # with what was the default of settings that are newer than the checkpoint; unchecked:
            # what it was trained with need not be possible here
            before = flat(asdict(typed(OmegaConf.create(content["config"]), Config)))
            changed = self._changed(before)
            same_seed = "seed" not in changed
            if not same_seed:
                for name in ("generator", "action_generator"):
                    content["agent"].pop(name, None)
            self.agent.load_state_dict(content)
            self.exploration.load_state_dict(content["exploration"])
            # episodes do not depend on these, and with another `num_envs` all begin anew anyway
            indifferent = ELSEWHERE | {"env.num_envs"}
            same_env = not any(name.startswith("env.") for name in changed - indifferent)
            if (was := content["core"]) != self.core:
                print(f"changed: the libretro core is {self.core}, was {was}")
                same_env = False
            if not same_env:
                self.exploration.move(before["env.id"], self.config.env.id)
            if same_seed:
                torch.set_rng_state(content["rng"]["torch"])
                if self.agent.device.type == "cuda" and content["rng"]["cuda"]:
                    torch.cuda.set_rng_state(content["rng"]["cuda"][0], self.agent.device)
        if memory is None or changed & {"env.num_envs", "agent.replay_capacity"}:
            if self.step < self.config.agent.warmup_steps:
                raise UserError(
                    f"{path}: at step {self.step} of its warm-up, it needs its memory beside it, "
                    "and the same env.num_envs and agent.replay_capacity; or begin anew"
                )
            self.agent.forget(self.step)
            print(
                f"no memory of step {self.step} and of this size beside {path}: filling a new one"
            )
            return
        with checkpoint.restoring(path.with_name(checkpoint.memory_name(self.step))):
            self.agent.load_memory(memory)
        # the last environments practise, and the others cannot continue their episodes
        if same_env and same_seed and self.config.practice >= before["practice"]:
            self._continue_episodes(content, path)
        else:
            self.agent.begin_lives()

    def _best_average(self) -> float:
        """That of `best.pt` in this run folder, if it continues there."""
        best = self.folder / "checkpoints" / "best.pt"
        if best.exists():
            try:
                content = checkpoint.load(best)
                with checkpoint.restoring(best):
                    return restored(content["exploration"]).objective()
            except UserError as error:
                print(f"{error}; the next best average replaces it", file=sys.stderr)
        return -math.inf

    def _changed(self, before: dict[str, Any]) -> set[str]:
        """Names of the settings that are others than `before`, after telling them."""
        now = flat(asdict(self.config))
        changed = {name for name in now.keys() - {"resume"} if now[name] != before.get(name)}
        for name in sorted(changed):
            print(f"changed: {name}={now[name]}, was {before.get(name)}")
        return changed

    def _continue_episodes(self, content: dict[str, Any], path: Path) -> None:
        """Prepare to go on in the running episodes of a checkpoint."""
        with checkpoint.restoring(path):
            names = ("episodes", "interval", "metrics")
            self.going_on = {name: content[name] for name in names} | {"path": path}
            self.previous, self.age = content["previous"], content["age"]
            num_envs, space = self.envs.num_envs, self.envs.single_action_space
            if not self.previous.shape == self.age.shape == (num_envs,):
                raise ValueError("its episodes are of different numbers of environments")
            played = WorkerVectorEnv.check(content["episodes"], num_envs, action_count(space))
        print(f"playing the {played} agent steps of running episodes again")

    def save(self) -> None:
        """Write the memory, step_<agent steps>.pt, best.pt if it is best, and latest.pt.

        Whenever this is interrupted, `latest.pt` has its memory beside it.
        """
        device = self.agent.device
        cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        self._observe()
        self.agent.check_updates()
        content = {
            "format": checkpoint.FORMAT,
            "config": asdict(self.config),
            "step": self.step,
            "versions": versions(),
            "core": self.core,
            "metrics": self.tracker.last,
            "exploration": self.exploration.state_dict(),
            "episodes": self.envs.state_dict(),
            "previous": self.previous,
            "age": self.age,
            "interval": self.tracker.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
            **self.agent.state_dict(),
        }
        if RANK > 0:
            return
        checkpoints = self.folder / "checkpoints"
        memory = checkpoints / checkpoint.memory_name(self.step)
        checkpoint.save(memory, self.agent.memory_dict())
        names = [f"step_{self.step:09d}.pt"]
        average = self.exploration.average()
        if average is not None and average > self.best_average:
            self.best_average = average
            names.append("best.pt")
        names.append("latest.pt")  # last, because a run continues from it
        for name in names:
            checkpoint.save(checkpoints / name, content)
        steps, memories = numbered(checkpoints, "step"), numbered(checkpoints, "replay")
        for old in (*steps[: -self.config.checkpoint.keep], *(m for m in memories if m != memory)):
            try:
                old.unlink(missing_ok=True)
            except OSError as error:  # the user protects it, for instance
                self.display.say(f"{old}: cannot be removed: {error.strerror}")
        self.display.saved = self.step

    def _show(self, drawn: Drawn | None) -> None:
        """Show in TensorBoard what has been drawn."""
        if drawn is not None:
            self.tracker.images(drawn.step, drawn.images)
            for complaint in drawn.complaints:
                self.display.say(complaint)

    # --- signals --------------------------------------------------------------------------------

    @contextmanager
    def _stopping_on_signals(self) -> Generator[None]:
        """Each of `SIGNALS` ends the loop after the current step, so that it saves."""
        first = math.inf

        def stop(number: int, frame: Any) -> None:
            nonlocal first
            if number == HANGUP:
                leave_terminal()
            now = time.monotonic()
            if now - first > SAME_SIGNAL:  # a second one ends at once
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.stopped_by = self.stopped_by or number
            first = min(first, now)

        with signals_handled(stop):
            yield
