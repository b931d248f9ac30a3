"""The page that says which strategy does what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "ci/strategy_table.py"


def test_the_table_is_what_strategies_declare():
    subprocess.run([sys.executable, str(SCRIPT)], check=True, timeout=60)
