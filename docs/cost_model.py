"""Predicts agent steps/s on clusters, for docs/scaling.md: `uv run docs/cost_model.py`.

All times are in seconds, per agent step unless stated otherwise. Assumptions are marked.
"""

# an AMD EPYC with bf16 and the default settings of then, see docs/results/bench_bf16_fifth.json
EMULATION = 2.1e-3  # of a core: FCEUmm, six frames
LEARNING = 2.15e-3  # of a core: acting, observing, updating
# two virtual cores of an Intel Xeon without bf16, see docs/scaling.md
ANSWER = 1.0e-3  # of the learner, per actor and vector step: sending actions, taking in states
EXCHANGE = 11e-3  # per vector step: four gathers of two ranks with gloo, emulators beside
GRADIENTS = 7.4e-3  # per update: the sum over two ranks of 3.9 MB, the same
UPDATE_EVERY = 32  # agent steps, with one rank and the default batch

CORES = 16  # of a node; an assumption
PER_ACTOR = 8  # environments of an actor; an assumption


def on_ray(nodes: int, learning: float) -> float:
    """Rate with the learner on its own machine, learning while actors step."""
    actors = nodes * CORES
    environments = actors * PER_ACTOR
    step = max(environments * learning, environments * EMULATION / actors) + actors * ANSWER
    return environments / step


def on_ranks(
    ranks: int, each: int, cores: int, learning: float, exchange: float, gradients: float
) -> float:
    """Rate with `each` environments on `cores` per rank, and batches that grow with the ranks.

    Emulation and learning overlap. A ring all-reduce sends 2 (ranks - 1) / ranks times the bytes.
    """
    step = max(each * learning, each * EMULATION / cores)
    if ranks > 1:
        ring = 2 * (ranks - 1) / ranks
        step += ranks / 2 * exchange + each / UPDATE_EVERY * ring * gradients
    return each * ranks / step


def table(head: str, columns: list[int], rows: dict[str, list[float]]) -> None:
    """Print it in Markdown."""
    print(f"\n| {head} | " + " | ".join(map(str, columns)) + " |")
    print("|---|" + "---|" * len(columns))
    for name, rates in rows.items():
        print(f"| {name} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |")


def main() -> None:
    """Print both tables."""
    nodes = [1, 2, 4, 8, 16, 32, 64]
    learners = {
        "2.15 ms (a core with bf16, measured)": LEARNING,
        "0.3 ms": 3e-4,
        "0.1 ms (as measured on an H100)": 1e-4,
        "0.03 ms": 3e-5,
    }
    rows = {name: [on_ray(n, each) for n in nodes] for name, each in learners.items()}
    table("learner takes per agent step; nodes:", nodes, rows)
    ranks = [1, 2, 4, 8]
    cpu = {
        "2.15 ms, gloo, 2 cores and 32 environments per rank": [
            on_ranks(r, 32, 1, LEARNING, EXCHANGE, GRADIENTS) for r in ranks
        ]
    }
    gpus = {  # gradients at an assumed 100 GB/s
        f"{name}, NCCL, {CORES} cores and 128 environments per rank": [
            on_ranks(r, 128, CORES, each, EXCHANGE, 3.9e6 / 100e9) for r in ranks
        ]
        for name, each in list(learners.items())[1:]
    }
    table("learner takes per agent step; ranks:", ranks, cpu | gpus)


if __name__ == "__main__":
    main()
