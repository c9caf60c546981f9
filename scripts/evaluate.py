"""Measure a checkpoint: `python scripts/evaluate.py ckpt=PATH [episodes=30] [env.id=ID]`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(settings: "DictConfig") -> None:
    """Play with the sampled and the greedy policy and at random; the last line is JSON."""
    import json
    from pathlib import Path

    from icm.config import EvaluateConfig, checked

    options = checked(settings, EvaluateConfig)

    # only now, because torch is slow to import
    from icm.device import resolve_device, share_cores
    from icm.display import counted
    from icm.evaluation import rollouts, summary, table
    from icm.playing import load_agent

    device = resolve_device(options.device)
    share_cores(device)
    agent, config, step = load_agent(Path(options.ckpt), device, options.env)
    results = {}
    for policy in ("sampled", "greedy", "random"):
        player = None if policy == "random" else agent
        greedy, episodes = policy == "greedy", options.episodes
        played = rollouts(player, config, step, episodes, greedy, options.seed)
        results[policy] = summary([*counted(played, f"{policy}, episodes", episodes)], policy)
    print(table(list(results.values())))
    others = {policy: results[policy] for policy in ("greedy", "random")}
    env = {name: getattr(config.env, name) for name in vars(options.env)}
    measured = {"ckpt": options.ckpt, "step": step, "env": env}
    print(json.dumps({**measured, **results["sampled"], **others}))


if __name__ == "__main__":
    from icm import cli  # here, because worker processes import this file, too

    cli.run(main, "evaluate")
