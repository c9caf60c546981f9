"""Make a small file of a checkpoint, to share: `python scripts/export.py ckpt=PATH out=PATH`."""

from omegaconf import DictConfig

from icm import cli


def main(settings: DictConfig) -> None:
    """Keep what playing needs; `env.*` changes the game that it will play."""
    from dataclasses import asdict
    from pathlib import Path

    import torch

    from icm import checkpoint
    from icm.config import ExportConfig, checked
    from icm.errors import UserError
    from icm.playing import load_agent

    options = checked(settings, ExportConfig)
    path, out = Path(options.ckpt), Path(options.out)
    if out.exists():
        raise UserError(f"out={out}: exists; give another name")
    # what does not play is not exported
    _, config, _ = load_agent(path, torch.device("cpu"), options.env)
    content = checkpoint.load(path) | {"config": asdict(config)}
    with checkpoint.restoring(path):
        content = checkpoint.for_playing(content)
    checkpoint.save(out, content)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, for playing alone")


if __name__ == "__main__":
    cli.run(main, "export")
