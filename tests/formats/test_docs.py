"""The document about formats: its drawings are those of the layouts, its examples and the docstrings' run."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

from lighterage import formats
from lighterage.formats import drawing

DOCUMENT = Path(__file__).parents[2] / "docs" / "formats.md"


def test_drawings_are_up_to_date() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.count("<!-- layout:") == text.count("bytes to align the start") >= 8
    assert drawing.redraw(text) == text, "run: python -m lighterage.formats.drawing docs/formats.md"


def test_drawing_draws_anew_and_only_what_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "some.md"
    path.write_text("before\n<!-- layout: mxfp8 columnwise 32,0 64 -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    drawing.main([str(path)])
    text = path.read_text(encoding="utf-8")
    assert text.startswith("before\n<!--") and text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text and "scale_inv 1" in text
    assert drawing.redraw(text) == text


def test_examples_of_the_document_run() -> None:
    scope: dict[str, object] = {}
    examples = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 4
    for example in examples:
        exec(compile(example, str(DOCUMENT), "exec"), scope)


def test_docstring_examples_run() -> None:
    for module in (formats, drawing):
        results = doctest.testmod(module)
        assert results.attempted and not results.failed
