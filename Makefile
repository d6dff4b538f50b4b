# make demo: install, export the shipped checkpoint, stream a clip, print the profile
# make test: install, check format, types and imports, run all tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-fast check bench install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,openvino,deformable,export,layers,train,tensorrt-rtx,dev]'
	touch $@

demo: install
	$(BIN)/python deploy.py export models/zoo/vpp-eo-nano-scenes.safetensors --output $(DEMO)/nano
	test -d $(DEMO)/clip || $(BIN)/python -m models.training.scenes $(DEMO)/clip --clips 1 --frames 120 \
		--radius 0.12 0.30 --shared-texture 0.1 --typical-texture 1.0 --furniture 3 --seed 11
	$(BIN)/python deploy.py run $(DEMO)/nano --source $(DEMO)/clip/JPEGImages/scene_0011000000 --frame-rate 25 \
		--output $(DEMO)/overlay.mp4 --results $(DEMO)/results.json
	$(BIN)/python deploy.py profile $(DEMO)/nano
	@echo "Look at $(DEMO)/overlay.mp4: darkened patches were not computed."

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest -n 2

test-fast: install
	$(BIN)/pytest -n 2 -m "not slow"

bench: install
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.alternatives

clean:
	rm -rf build $(VENV)
