# make demo, make test: the environment is built first where there is none.
# PYTHON names the interpreter that .venv is made from; its torch and torchvision are used if it has them.
PYTHON ?= python3
# For each of the three targets of make fuzz.
FUZZ_SECONDS ?= 600

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

# Each recipe is one shell script that ends at its first error.
.ONESHELL:
.SHELLFLAGS := -ec
.PHONY: help env demo compare test test-slow fuzz clean

help:
	@echo "make demo       train Mask R-CNN with MABN on the digit scenes, evaluate it, draw pictures"
	echo "make compare    train the digit scenes under each norm; resumes, repeats no finished run"
	echo "make test       all tests that this machine can run, but the slow ones"
	echo "make test-slow  the slow tests"
	echo "make fuzz       random input, FUZZ_SECONDS=$(FUZZ_SECONDS) for each of three targets"
	echo "make env        only the environment (.venv), from PYTHON=$(PYTHON)"
	echo "make clean      remove the environment and caches; datasets/, output/ and weights/ stay"
	echo "ARGS='...' is handed to the demo or to pytest"

demo: $(READY)
	@$(PY) tools/demo.py $(ARGS)

compare: $(READY)
	@$(PY) tools/compare_norms.py $(ARGS)

test: $(READY)
	@$(PY) -m pytest -q -m "not slow" $(ARGS)

test-slow: $(READY)
	@$(PY) -m pytest -q -m slow $(ARGS)

# Rounds of new examples for each target until its time is over. What fails is kept in .hypothesis and
# comes first in the next round, or in make test.
fuzz: $(READY)
	@for target in test_any_options test_any_damage test_any_value_anywhere; do
		end=$$(($$(date +%s) + $(FUZZ_SECONDS)))
		while test $$(date +%s) -lt $$end; do
			$(PY) -m pytest -q -m fuzz -k $$target --hypothesis-profile=fuzz --timeout=3000 \
				--hypothesis-seed=$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ') $(ARGS)
		done
	done

env: $(READY)

# .building lies in the environment while it changes. A step that fails by itself removes it, because
# pip leaves whole packages or none, and the next call goes on from there. A build that was killed
# leaves it, and the next call starts over.
$(READY): setup.py tools/install_detectron2.py
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
		if $(PYTHON) -c $(HAS_TORCH) 2>/dev/null; then
			echo "make env: $(VENV) uses the torch and torchvision of $(PYTHON)"
			# Not --system-site-packages: where PYTHON is in a virtual environment itself, that means
			# the packages of its parent.
			$(PYTHON) -c $(PACKAGE_FOLDERS) > "$$($(PY) -c $(PURELIB))/packages_of_python.pth"
		fi
	fi
	$(PY) -m pip install $(SETUPTOOLS)
	if ! $(PY) -c $(HAS_TORCH) 2>/dev/null; then
		$(PY) -m pip install 'torch>=2.4,<3' torchvision
	fi
	$(PY) tools/install_detectron2.py
	$(PY) -m pip install --no-build-isolation --use-pep517 $(SETUPTOOLS) -e '.[all]'
	touch $(READY)
	echo "make env: $(VENV) is ready"

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
