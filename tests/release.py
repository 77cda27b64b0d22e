"""What `make release-check` looks at besides: is everything in the packages, and is the change log ready?

``release.py DIST`` checks the sdist and the wheel in a folder; ``release.py pythons`` prints the oldest and the newest
Python of this machine that fastdiff runs on.
"""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def say(text):
    sys.stdout.write(text + "\n")


def pythons():
    """The paths of the oldest and the newest interpreter, one path where there is but one."""
    low = tuple(map(int, re.search(r"(\d+)\.(\d+)", PROJECT["requires-python"]).groups()))
    names = [f"python3.{minor}" for minor in range(low[1], low[1] + 20)]
    found = {}
    for name in [*names, *map(str, Path.home().glob(".pyenv/versions/*/bin/python3"))]:
        code = "import sys; print(*sys.version_info[:2], sys._base_executable)"
        try:
            done = subprocess.run([name, "-c", code], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):  # not there, or a shim of what is not there
            continue
        major, minor, path = done.stdout.split()
        found.setdefault((int(major), int(minor)), path)
    known = sorted(version for version in found if version >= low)
    return [found[version] for version in sorted({known[0], known[-1]})]


def check(dist):
    """Say what the packages hold, and what is left to do; raise where something is missing in them."""
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = {name for name in tracked if re.match(r"(fastdiff|kernels)/.*\.(py|cu|cuh|typed)$", name)}
    with tarfile.open(sdist) as file:
        in_sdist = {name.partition("/")[2] for name in file.getnames()}
    with zipfile.ZipFile(wheel) as file:
        in_wheel = {re.sub(r"^fastdiff/kernels/", "kernels/", name) for name in file.namelist()}
    for archive, held in ((sdist, in_sdist), (wheel, in_wheel)):
        missing = sorted(wanted - held)
        assert not missing, f"{archive.name} has no {', '.join(missing)}"
        say(f"{archive.name}: {len(held)} files, {archive.stat().st_size / 1e6:.2f} MB, nothing is missing")
    section = re.search(r"^## (\S+) ?([^\n]*)\n(.*?)(?=^## )", (ROOT / "CHANGELOG.md").read_text(), re.M | re.S)
    version, state, text = section.groups()
    assert "hanged defaults" in text, 'CHANGELOG.md: no word on changed defaults ("Changed defaults: none" is one)'
    if version != PROJECT["version"] or "unreleased" in state:
        say(f"before the release: CHANGELOG.md begins with {version} {state}, the version is {PROJECT['version']}")


if __name__ == "__main__":
    if sys.argv[1:] == ["pythons"]:
        say("\n".join(pythons()))
    else:
        check(Path(sys.argv[1]))
