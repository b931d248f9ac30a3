"""Fill the simulated device into a rendered backend package, as its owner would fill in a real one.

Run as ``fill_in.py FOLDER`` on what ``drivetrain new-backend acme`` made. It edits the places that
the template marks, and nothing else.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

FACTS = """FACTS = DeviceFacts(
    device_type="sim",
    collective_backend=simulated.COLLECTIVE_BACKEND,
    autocast_type="sim",
    default_devices=1,
)
"""
PROBE = '''def probe() -> Probe:
    """What this machine has. Opens no device and never raises."""
    if reason := simulated.unavailable():
        return Probe(0, reason)
    return Probe(simulated.Options().devices)
'''
LOAD = """def _load() -> Backend:
    simulated.install(FACTS.device_type)
"""


def replaced(text: str, pattern: str, by: str) -> str:
    """The text with its one match of a pattern replaced; ends the program if there is not one."""
    changed, count = re.subn(pattern, lambda _: by, text, flags=re.DOTALL | re.MULTILINE)
    if count != 1:
        raise SystemExit(f"{pattern!r} matches {count} times in the rendered spec, not once")
    return changed


def main() -> None:
    """Edit the spec of the package in the folder named on the command line."""
    (spec,) = Path(sys.argv[1]).glob("src/*/__init__.py")
    text = spec.read_text(encoding="utf-8")
    text = replaced(text, r"^FACTS = .*?^\)\n", FACTS)
    text = replaced(text, r"^def probe\(\).*?(?=^\n\n)", PROBE)
    text = replaced(text, r"^def _load\(\).*?(?=^    from )", LOAD)
    text = replaced(text, r"^from importlib.util import find_spec\nfrom pathlib import Path\n", "")
    wanted = "from drivetrain_conformance import simulated\n"
    text = replaced(text, r"(?=^from drivetrain_interfaces import )", wanted)
    spec.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
