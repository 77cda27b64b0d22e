"""Print the oldest versions that pyproject.toml allows, as the constraints that `make oldest` installs by."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for line in dict.fromkeys(project["dependencies"] + extras["plot"] + extras["test"]):
    sys.stdout.write(line.replace(">=", "==") + "\n")
