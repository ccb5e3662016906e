# Each command prints what it does; a second run of the same command is fast.
.PHONY: help setup comfyui browser demo ui test lint clean train-embedded

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PORT ?= 8188

help:
	@echo "make setup           create $(VENV) with torch and everything the tests need"
	@echo "make demo            ComfyUI makes output/demo.mp4 with the embedded model"
	@echo "make ui              ComfyUI with these nodes for you, at port PORT (8188)"
	@echo "make comfyui         install the ComfyUI of both (COMFYUI_PATH: use that one)"
	@echo "make browser         install chromium for the tests of the page (Debian, as root)"
	@echo "make lint            ruff and the import contract"
	@echo "make test            lint and every test (tests marked gpu only where there is one)"
	@echo "make train-embedded  train the embedded model again (one large GPU, about 20 minutes)"
	@echo "make clean           remove $(VENV), output/ and caches"

setup: $(STAMP)

$(STAMP): pyproject.toml .ci/install-torch
	@echo "== creating $(VENV) and installing the package with its development tools"
	$(PYTHON) -m venv $(VENV)
	.ci/install-torch $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(STAMP)
	@echo "== ready: $(BIN)/lightforcing doctor"

demo: comfyui
	@echo "== workflows/api/first_video.json becomes output/demo.mp4"
	@mkdir -p output
	$(BIN)/python -m lightforcing.development demo --out output/demo.mp4 --json output/demo.json

ui: comfyui
	$(BIN)/python -m lightforcing.development ui --port $(PORT)

lint: setup
	@echo "== ruff, and who may import whom"
	$(BIN)/ruff check .
	$(BIN)/pytest tests/test_import_contract.py

# The kernels' configurations answer to Triton 3.6.0, whatever newer one the environment has.
$(VENV)/triton36/.complete: $(STAMP)
	.ci/install-triton36 $(VENV)/triton36 $(BIN)/python

comfyui: setup
	.ci/install-comfyui $(VENV)/comfyui $(BIN)/python

browser: setup
	.ci/install-browser

test: lint comfyui browser $(VENV)/triton36/.complete
	@echo "== tests"
	$(BIN)/pytest

train-embedded: setup
	@echo "== training the embedded model"
	$(BIN)/python -m lightforcing.training.run_all --out build/training --export models

clean:
	@echo "== removing $(VENV), output/ and caches"
	rm -rf $(VENV) output build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
