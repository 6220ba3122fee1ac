# `make demo` and `make test`, each alone, set up everything that they need in .venv. `make help` lists the rest.

PYTHON3 ?= python3
VENV ?= .venv
PYTHON = $(VENV)/bin/python
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
PLOT_ARGS ?=
FUZZ_ARGS ?=
SANITIZER ?= compute-sanitizer

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYTHONUNBUFFERED = 1

PIP_INSTALL = $(PYTHON) -m pip install --progress-bar off
CLANG_FORMAT = $(VENV)/bin/clang-format
CPP_FILES = $(shell find csrc benchmarks tests demo -name '*.h' -o -name '*.cpp' -o -name '*.cu')
BUILD_FILES = setup.py pyproject.toml MANIFEST.in $(wildcard build_support/*.*)
SOURCES = $(shell find csrc -type f -not -name '*.pyc') flash_attn/version.py
INSTALLED = $(VENV)/installed
TIMES = build/times

# $(call timed,PART,COMMAND): shows and runs the command, and notes the seconds under the part of the work.
timed = @mkdir -p $(TIMES); start=$$(date +%s); ( set -x; $(2) ); status=$$?; \
	echo $$(( $$(date +%s) - start )) >> $(TIMES)/$(1); exit $$status

.PHONY: help demo test run-tests install wheel test-gpu sanitize fuzz emulate test-abi test-clients bench plot format lint clean options

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(INSTALLED)/flash_attn  ## train and run a small language model on this package and compare it with PyTorch
	$(PYTHON) demo/demo.py $(DEMO_ARGS)

test:  ## set up, build, run every test, and check the format
	@rm -rf $(TIMES)
	@$(MAKE) --no-print-directory run-tests lint; status=$$?; \
	for part in set-up build tests; do \
		echo "$$part: $$(cat $(TIMES)/$$part 2>/dev/null | awk '{ s += $$1 } END { print s + 0 }') s"; \
	done; exit $$status

# On workers beside each other (tests/workers.py says how many): whole files, in the order in which they are collected.
run-tests: $(INSTALLED)/flash_attn $(INSTALLED)/test $(INSTALLED)/bench
	$(call timed,tests,$(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS))

install: $(INSTALLED)/build  ## install the package into .venv
	$(PYTHON) -m pip install --no-build-isolation --no-deps --verbose .
	@rm -f $(INSTALLED)/flash_attn

wheel: $(INSTALLED)/build  ## build a wheel into dist/
	$(PYTHON) -m pip wheel --no-build-isolation --no-deps --verbose --wheel-dir dist .

# A GPU machine may have no network: this sets nothing up. From tests/, so that the source tree hides no installed wheel.
test-gpu: PYTHON = $(PYTHON3)
test-gpu:  ## run the tests with the python3 (or PYTHON=...) and the flash_attn that are installed
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'"
	cd tests && $(PYTHON) -m pytest --ignore=test_build.py $(PYTEST_ARGS) .

# Without torch's cache of memory each tensor is an allocation of its own, whose end the tools know; the padding keeps
# the next one away from it.
sanitize: PYTHON = $(PYTHON3)
sanitize:  ## run a small selection of the tests under compute-sanitizer, set up as for test-gpu
	cd tests && status=0 && for run in "sanitize memcheck --padding 512 --report-api-errors no" "sanitize initcheck" "race racecheck"; do \
		set -- $$run; marked=$$1; shift; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$@ --error-exitcode 1 \
			$(PYTHON) -m pytest -m $$marked --ignore=test_build.py $(PYTEST_ARGS) . || status=1; \
	done; exit $$status

fuzz: $(INSTALLED)/flash_attn $(INSTALLED)/test  ## draw calls and compare them with the oracle (FUZZ_ARGS=--help)
	$(PYTHON) tests/fuzz.py $(FUZZ_ARGS)

# From tests/, so that the source tree hides no emulated package. The tests of one file last long, so workers share it.
emulate: EMULATED_PYTEST = $(abspath $(PYTHON)) -m pytest -n auto --dist worksteal
emulate: $(INSTALLED)/build $(INSTALLED)/test  ## run every kernel on the CPU, emulated (up to an hour on two cores)
	$(PYTHON) build_support/emulator.py --clusters
	cd tests && PYTHONPATH=../build/emulator-clusters/package $(EMULATED_PYTEST) emulated_sm90_clusters.py $(PYTEST_ARGS)
	$(PYTHON) build_support/emulator.py --all
	cd tests && PYTHONPATH=../build/emulator-all/package $(EMULATED_PYTEST) emulated_rows.py $(PYTEST_ARGS)

test-abi: wheel  ## try the wheel under three torch versions (slow; downloads each)
	$(PYTHON) tests/abi/run.py dist

# From their own folder, so that the source tree hides no installed wheel.
test-clients: CLIENTS = build/clients
test-clients: wheel  ## try the wheel with transformers, xformers and ring-flash-attention (downloads all)
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --progress-bar off -r requirements/clients.txt
	$(CLIENTS)/bin/python -m pip install --no-deps --force-reinstall "$$(ls -t dist/flash_attn-*.whl | head -n 1)"
	cd $(CLIENTS) && bin/python $(CURDIR)/tests/clients/transformers_models.py
	cd $(CLIENTS) && bin/python $(CURDIR)/tests/clients/continuous_batching.py
	cd $(CLIENTS) && bin/python $(CURDIR)/tests/clients/xformers_masks.py
	cd $(CLIENTS) && bin/python $(CURDIR)/tests/clients/ring_attention.py

bench: $(INSTALLED)/flash_attn  ## speed, memory and error beside torch's attention, on the GPU or the CPU (BENCH_ARGS=--help)
	$(PYTHON) -m flash_attn bench $(BENCH_ARGS)

plot: $(INSTALLED)/bench  ## draw a recorded benchmark (PLOT_ARGS="RESULT.json --out FILE.svg")
	$(PYTHON) benchmarks/plot.py $(PLOT_ARGS)

format: $(INSTALLED)/lint  ## format every file
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP_FILES)

lint: $(INSTALLED)/lint  ## check format and lint
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CPP_FILES)

clean:  ## remove what was built, but not .venv
	rm -rf build dist *.egg-info flash_attn/_build_info.json flash_attn/*.so $(INSTALLED)/flash_attn

# Set-up: a file under $(INSTALLED) says that what it is named after is installed, and is remade when that changes.

$(INSTALLED)/pip: build_support/make_venv.py
	$(call timed,set-up,$(PYTHON3) build_support/make_venv.py $(VENV))
	@mkdir -p $(INSTALLED); touch $@

$(INSTALLED)/build: requirements/build.txt requirements/cutlass.txt $(INSTALLED)/pip
	$(call timed,set-up,$(PIP_INSTALL) -r requirements/build.txt && $(PIP_INSTALL) --no-deps -r requirements/cutlass.txt)
	@touch $@

$(INSTALLED)/test: requirements/test.txt $(INSTALLED)/build
	$(call timed,set-up,$(PIP_INSTALL) -r requirements/test.txt)
	@touch $@

$(INSTALLED)/lint: requirements/lint.txt $(INSTALLED)/pip
	$(call timed,set-up,$(PIP_INSTALL) -r requirements/lint.txt)
	@touch $@

$(INSTALLED)/bench: requirements/bench.txt $(INSTALLED)/build
	$(call timed,set-up,$(PIP_INSTALL) -r requirements/bench.txt)
	@touch $@

# An editable install: Python changes need no rebuild, and ninja compiles only the C++ files that changed.
$(INSTALLED)/flash_attn: $(INSTALLED)/build $(BUILD_FILES) $(SOURCES) build/options
	$(call timed,build,$(PYTHON) -m pip install --no-build-isolation --no-deps --verbose --editable .)
	@touch $@

# Holds the variables that choose what is built, so that another choice is a rebuild.
build/options: options
	@mkdir -p build; env | grep '^FLASH_ATTN_' | sort > $@.now; cmp -s $@.now $@ || cp $@.now $@
