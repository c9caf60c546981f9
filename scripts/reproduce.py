"""Redo a row of docs/results.md: `python scripts/reproduce.py row=level`."""

from omegaconf import DictConfig

from icm import cli


def main(settings: DictConfig) -> None:
    """Train and evaluate every seed; print distances and, in parentheses, shares past a level."""
    from icm.config import checked
    from icm.reproduction import ReproduceConfig, reproduce, table

    print(table(reproduce(checked(settings, ReproduceConfig))))


if __name__ == "__main__":
    cli.run(main, "reproduce")
