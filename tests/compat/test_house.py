"""Nothing outside of `compat` imports it, and it keeps no state on tensors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "lighterage"


def test_nothing_else_imports_compat():
    importing = re.compile(r"^\s*(?:from|import)\b.*\bcompat\b", re.MULTILINE)
    others = [path for path in SOURCE.rglob("*.py") if "compat" not in path.relative_to(SOURCE).parts]
    assert len(others) > 50
    assert [path for path in others if importing.search(path.read_text())] == []
    code = "import sys, lighterage.nn; sys.exit(any('compat' in m for m in sys.modules if m.startswith('lighterage')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_compat_reaches_into_no_internals_of_the_engine():
    reaching = re.compile(r"lighterage\.engine|saved_tensors_hooks|setattr\(")
    assert [path for path in (SOURCE / "compat").rglob("*.py") if reaching.search(path.read_text())] == []
