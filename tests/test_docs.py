"""The documentation: its examples run, and what it points at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lighterage

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
_PATH = re.compile(r"`((?:src|tests|benchmarks|docs|examples)/[\w./-]*)`")


def _named(pages: list[Path]) -> list:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


@pytest.mark.parametrize("page", _named([page for page in PAGES if _BLOCK.search(page.read_text())]))
def test_examples_run_one_after_another(page, capsys):
    text = page.read_text()
    names: dict[str, object] = {"__name__": "__example__"}
    for block in _BLOCK.finditer(text):
        # As many empty lines as stand before it, so that a traceback names the page's own line.
        before = "\n" * (text[: block.start(1)].count("\n"))
        exec(compile(before + block[1], str(page), "exec", dont_inherit=True), names)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.mark.parametrize("page", _named(PAGES))
def test_links_and_paths_exist(page):
    text = page.read_text()
    targets = [page.parent / target for target in _LINK.findall(text)]
    targets += [ROOT / target for target in _PATH.findall(text)]
    missing = sorted({str(target) for target in targets if not target.exists()})
    assert not missing


def test_the_readme_example_moves_bytes(capsys):
    """An example whose tensors all stayed would show nothing."""
    block = _BLOCK.search((ROOT / "README.md").read_text())
    assert block is not None
    names: dict[str, object] = {}
    exec(block[1], names)
    offloader = names["offloader"]
    assert isinstance(offloader, lighterage.Offloader)
    assert offloader.stats(total=True).bytes_out > 0
    assert len(block[1].strip().splitlines()) == 15


def test_the_guide_lists_every_field_of_the_policy():
    text = (ROOT / "docs" / "guide.md").read_text()
    for field in lighterage.Policy.__dataclass_fields__.values():
        row = re.search(rf"^\| `{field.name}` .*\| ([^|]*) \|$", text, re.MULTILINE)
        assert row is not None, f"docs/guide.md has no row for {field.name}"
        if isinstance(field.default, int) and not isinstance(field.default, bool):
            assert row[1] == str(int(field.default))
