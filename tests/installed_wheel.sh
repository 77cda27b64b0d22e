#!/bin/sh
# Install the wheel of folder $2 with interpreter $1 into a fresh environment and use it away from the source tree.
set -eu
dist=$(cd "$2" && pwd)
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cd "$room"
"$1" -m venv env
env/bin/python -m pip --disable-pip-version-check install --quiet "$dist"/*.whl
env/bin/fastdiff --version
env/bin/python - <<'PY'
import pathlib

import numpy as np

import fastdiff as fd

assert pathlib.Path(fd.__file__).is_relative_to(pathlib.Path.cwd()), fd.__file__
X = fd.data.harmonic_curves(64)
model = fd.Diffusion(backend="cpu").fit(X, steps=3, progress=False)
model.save("m.safetensors")
assert np.array_equal(fd.load("m.safetensors").sample(4), model.sample(4))
print("the installed wheel trains, saves, loads and samples")
PY
env/bin/fastdiff sample m.safetensors -n 3 -o new.csv
env/bin/fastdiff page m.safetensors -o page.html
test "$(wc -l <new.csv)" -ge 3
env/bin/fastdiff bench --tiny --only normals --only adamw | grep -q 'of memory'
