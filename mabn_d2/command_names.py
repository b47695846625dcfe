"""How the commands are called: scripts of tools/ in a checkout, programs such as `mabn-predict` elsewhere."""

import re
from importlib.metadata import entry_points
from pathlib import Path

TOOLS = Path(__file__).parents[1] / "tools"


def name_commands(text: str) -> str:
    """Return a text whose commands a user can call.

    Args:
        text: with commands as in a checkout, such as "tools/predict.py".
    """
    return re.sub(r"tools/(\w+)\.py", _name, text)


def _name(script: re.Match[str]) -> str:
    if (TOOLS / f"{script[1]}.py").is_file():
        return script[0]
    programs = entry_points(group="console_scripts")
    called = f"mabn_d2.commands.{script[1]}:main"
    return next((program.name for program in programs if program.value == called), script[0])
