"""The commit of this code, which a result is recorded with."""

import subprocess
from pathlib import Path


def commit() -> str:
    """Return the commit of this code, with a + if files differ from it; "" without git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()
