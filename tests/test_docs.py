"""The documents: that what they tell is so."""

import functools
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT, metrics_of, settings

from icm.config import flat

MANUAL = (ROOT / "docs" / "manual.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@functools.cache
def anchors(document: Path) -> set[str]:
    """What links into a document may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text())
    for path, _, anchor in (target.partition("#") for target in targets):
        found = document.parent / path if path else document
        assert found.exists(), path
        assert not anchor or anchor in anchors(found), f"{path}#{anchor}"


def test_the_manual_tells_the_defaults() -> None:
    known = flat(asdict(settings()))
    section = MANUAL.partition("## `train.py`")[2].partition("**Practice.**")[0]
    rows = re.findall(r"^\| ((?:`[\w.]+=[^`|]+`(?:, )?)+) \|", section, re.MULTILINE)
    told = dict(re.findall(r"`([\w.]+)=([^`]+)`", " ".join(rows)))
    assert len(told) > 20
    for name in told.keys() - {"resume", "hydra.run.dir"}:
        value = known.get(name, known.get(f"{name}.name"))
        plain = f"{value:g}" if type(value) is float else str(value)
        assert told[name] == ("null" if value is None else plain), name


def test_the_manual_tells_what_every_metric_means(trained: Path) -> None:
    section = MANUAL.partition("## Reading the curves")[2].partition("### Maps")[0]
    told = set(re.findall(r"`(\w+/\w+)`", section))
    logged = {name for line in metrics_of(trained) for name in line} - {"step"}
    assert len(logged) > 15
    assert logged <= told
