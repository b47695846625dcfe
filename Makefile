# Every target builds the environment first if it is missing.
# PYTHON: the interpreter that .venv is made from; its torch and torchvision are used if it has them.
PYTHON ?= python3
# TORCH: what to install instead, such as 'torch==2.4.1 torchvision==0.19.1'.
TORCH ?=
# DETECTRON2: source to build Detectron2 from, a folder or a URL; default: tools/install_detectron2.py.
DETECTRON2 ?=
# Used in another folder too.
override DETECTRON2 := $(if $(wildcard $(DETECTRON2)),$(abspath $(DETECTRON2)),$(DETECTRON2))
# Processes of make test, each with its own test files.
JOBS ?= 2
# For each of the three targets of make fuzz.
FUZZ_SECONDS ?= 600
# The oldest versions that pyproject.toml allows, with numpy 2.
OLDEST := torch==2.4.1 torchvision==0.19.1 numpy>=2,<2.3

# Evaluators of LVIS, COCO panoptic and Cityscapes, without what they ask for: opencv-python would
# overwrite opencv-python-headless, and numpy 1 replace numpy 2. The extras have what they import.
# panopticapi is on the index only as this copy.
EVALUATORS := 'lvis>=0.5.3,<0.6' 'panopticapi-lite==0.2.0' 'cityscapesscripts>=2.2.4,<3'

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
BUILDING := $(VENV)/.building

# Detectron2 imports pkg_resources, which setuptools 81 dropped.
SETUPTOOLS := 'setuptools>=70.1,<81'
HAS_TORCH := 'import sys, torch, torchvision; sys.exit([int(n) for n in torch.__version__.split(".")[:2]] < [2, 4])'
PACKAGE_FOLDERS := 'import sys; print(*[p for p in sys.path if p.endswith("-packages")], sep="\n")'
PURELIB := 'import sysconfig; print(sysconfig.get_path("purelib"))'

# OpenMP threads that spin while they wait slow torch down where cores are few or shared.
export OMP_WAIT_POLICY ?= passive
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Each recipe is one shell script that stops at the first error.
.ONESHELL:
.SHELLFLAGS := -ec
.PHONY: help env demo compare test test-slow test-oldest test-official lint fuzz clean

help:
	@echo "make demo           train Mask R-CNN with MABN on the digit scenes, evaluate it, draw pictures"
	echo "make compare        train the digit scenes under each norm; resumes, repeats no finished run"
	echo "make test           all tests that this machine can run, except the slow ones; JOBS=$(JOBS) at a time"
	echo "make test-slow      the slow tests"
	echo "make test-oldest    the tests of make test with the oldest torch that is supported"
	echo "make test-official  the tests of make test with Detectron2 built from DETECTRON2=<folder or URL>"
	echo "make lint           ruff and mypy"
	echo "make fuzz           random input, FUZZ_SECONDS=$(FUZZ_SECONDS) for each of three targets"
	echo "make env            only the environment (.venv), from PYTHON=$(PYTHON)"
	echo "make clean          remove environments and caches; datasets/, output/ and weights/ stay"
	echo "ARGS='...' is passed to the demo, the comparison or pytest"

demo: $(READY)
	@$(PY) tools/demo.py $(ARGS)

compare: $(READY)
	@$(PY) tools/compare_norms.py $(ARGS)

test: $(READY)
	@export OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}"
	$(PY) -m pytest -q -m "not slow" -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(READY)
	@$(PY) -m pytest -q -m slow $(ARGS)

# Both run on a copy of the working tree, because an installation compiles operators into its tree.
define COPY
	mkdir -p $(1)
	find $(1) -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
	git ls-files -z --cached --others --exclude-standard |
		tar --null --ignore-failed-read -T - -cf - 2>/dev/null | tar -xf - -C $(1)
	rm -f $(1)/.venv/.ready
endef

test-oldest:
	@$(call COPY,build/oldest)
	$(MAKE) -C build/oldest test TORCH='$(OLDEST)'

test-official:
	@test -n "$(DETECTRON2)" || { echo "make test-official: add DETECTRON2=<folder or URL>" >&2; exit 1; }
	$(call COPY,build/official)
	$(MAKE) -C build/official env DETECTRON2='$(DETECTRON2)'
	build/official/.venv/bin/python -c 'import detectron2._C' ||
		{ echo "make test-official: $(DETECTRON2) has no compiled operators" >&2; exit 1; }
	# A project of the source whose convolution the tests centre; the package does not contain it.
	test ! -d "$(DETECTRON2)/projects/TridentNet" ||
		export PYTHONPATH="$(DETECTRON2)/projects/TridentNet"
	$(MAKE) -C build/official test DETECTRON2='$(DETECTRON2)'

lint: $(READY)
	@$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Runs rounds of new examples for each target until its time is over. A failing example is kept in
# .hypothesis and comes first in the next round, or in make test.
fuzz: $(READY)
	@for target in test_any_options test_any_damage test_any_value_anywhere; do
		end=$$(($$(date +%s) + $(FUZZ_SECONDS)))
		while test $$(date +%s) -lt $$end; do
			$(PY) -m pytest -q -m fuzz -k $$target --hypothesis-profile=fuzz --timeout=3000 \
				--hypothesis-seed=$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ') $(ARGS)
		done
	done

env: $(READY)

# The file .building exists while the environment changes. A step that fails by itself removes it: pip
# installs whole packages or none, so the next call goes on from there. A build that is killed leaves
# it, and the next call starts over.
$(READY): setup.py pyproject.toml tools/install_detectron2.py $(wildcard mabn_d2/layers/ops/csrc/*)
	@fail() { echo "make env: $$*" >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
		fail "Python 3.10 or newer is needed, which $(PYTHON) is not; name another with make PYTHON=..."
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null ||
		fail "$(PYTHON) can't make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"
	if test -e $(BUILDING); then
		echo "make env: the last build of $(VENV) was cut short: starting over"
		rm -rf $(VENV)
	fi
	mkdir -p $(VENV)
	rm -f $(READY)
	touch $(BUILDING)
	trap 'exit 130' INT TERM HUP
	trap 'test $$? -ge 128 || rm -f $(BUILDING)' EXIT
	if ! $(PY) -m pip --version >/dev/null 2>&1; then
		$(PYTHON) -m venv $(VENV)
		if test -z "$(TORCH)" && $(PYTHON) -c $(HAS_TORCH) 2>/dev/null; then
			echo "make env: $(VENV) uses the torch and torchvision of $(PYTHON)"
			# Not --system-site-packages: if PYTHON is in a virtual environment, that would be the
			# packages of its parent.
			$(PYTHON) -c $(PACKAGE_FOLDERS) > "$$($(PY) -c $(PURELIB))/packages_of_python.pth"
		fi
	fi
	$(PY) -m pip install $(SETUPTOOLS)
	if test -n "$(TORCH)"; then
		$(PY) -m pip install $(foreach package,$(TORCH),'$(package)')
	elif ! $(PY) -c $(HAS_TORCH) 2>/dev/null; then
		$(PY) -m pip install 'torch>=2.4,<3' torchvision
	fi
	if test -z "$(DETECTRON2)"; then
		$(PY) tools/install_detectron2.py
	elif ! $(PY) -c 'import detectron2._C' 2>/dev/null; then
		$(PY) -m pip install wheel ninja
		$(PY) -m pip install --no-build-isolation $(SETUPTOOLS) '$(DETECTRON2)'
	fi
	$(PY) -m pip install --no-build-isolation --use-pep517 $(SETUPTOOLS) -e '.[all]'
	$(PY) -m pip install --no-deps $(EVALUATORS)
	touch $(READY)
	echo "make env: $(VENV) is ready"

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
