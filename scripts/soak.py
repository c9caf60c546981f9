"""Try what docs/reliability.md promises: `python scripts/soak.py [parts=[kills,files]]`.

The real program is killed, hindered and given forged files; `--help` lists the settings.
"""

from omegaconf import DictConfig

from icm import cli


def main(settings: DictConfig) -> None:
    """Run the parts, print what held, write JSON; exit with 1 if something did not hold."""
    import signal
    import sys

    from icm.config import checked
    from icm.errors import UserError

    if not hasattr(signal, "SIGSTOP"):
        raise UserError("soak.py sends signals, which Linux and macOS have")
    from icm.soak.program import ended_by_signals  # which only these can import
    from icm.soak.suite import SoakConfig, soak

    options = checked(settings, SoakConfig)
    with ended_by_signals():
        held = soak(options)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    cli.run(main, "soak")
