# make train   set everything up and fine-tune SmolLM2-135M; ARGS="--data text" and the like are passed on
# make test    set everything up and run the tests; ARGS="tests/test_nf4.py -k tie" runs some of them
# make test-long  the property tests with 5000 examples each
# make mutate  break the code, line by line, and see that the tests notice (about an hour)
# make gpu     check the kernels on this machine's NVIDIA GPU and measure them; ARGS="-k managed" checks some of them
# make bench   measure everything about speed beside the peers, and write the README's tables; ARGS="ops --quick"
# make lint    ruff: check and format
# make figures draw the pictures of the README
# make clean   remove the virtual environment, the model and the output

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH := $(shell grep -o '^torch==[0-9.]*' requirements.txt)
CPU_TORCH_INDEX := https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

.PHONY: train test test-long gpu mutate bench lint figures clean
train: $(VENV)/run
	$(BIN)/python train.py $(ARGS)

# The whole suite must also reach every line; a part of it need not. The tests of a file stay in one
# process (loadfile), so that what they share is made once. At most 8, for the memory of each.
test: $(VENV)/dev
ifeq ($(ARGS),)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --cov --cov-report=
	@$(BIN)/python tests/covered.py
else
	$(BIN)/python -m pytest $(ARGS)
endif

test-long: $(VENV)/dev
	$(BIN)/python -m pytest --hypothesis-profile=long -m hypothesis $(ARGS)

ifeq ($(HAS_GPU),)
gpu:
	@echo "make gpu: there is no NVIDIA GPU here that nvidia-smi can see, so nothing was checked or measured" >&2; exit 1
else
gpu: $(VENV)/dev
	$(BIN)/python -m pytest -m gpu $(ARGS)
	$(BIN)/python -m bench --device cuda
endif

mutate: $(VENV)/dev
	$(BIN)/python tests/mutate.py $(ARGS)

bench: $(VENV)/dev
	$(BIN)/python -m bench $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

figures: $(VENV)/run
	$(BIN)/python paper/nf4_levels.py

clean:
	rm -rf $(VENV) models out

# Each stamp is newer than what it was made from, so running make again reuses what is there.
$(VENV)/run: requirements.txt requirements-gpu.txt $(VENV)/torch
	$(PIP) install -r requirements.txt $(if $(HAS_GPU),-r requirements-gpu.txt)
	@touch $@

$(VENV)/dev: requirements-dev.txt requirements-gpu.txt $(VENV)/run
	$(PIP) install -r requirements-dev.txt
	@touch $@

# With an NVIDIA driver the ordinary torch, else the CPU build: from the configured index if it has one, else from PyTorch's.
$(VENV)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(HAS_GPU)$(findstring Darwin,$(shell uname)),)
	@echo "installing $(TORCH) for the CPU"
	@$(PIP) install "$(TORCH)+cpu" 2>/dev/null || $(PIP) install "$(TORCH)" --index-url $(CPU_TORCH_INDEX) || $(PIP) install "$(TORCH)"
else
	$(PIP) install "$(TORCH)"
endif
	@touch $@
