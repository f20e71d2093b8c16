# make train      set everything up and fine-tune SmolLM2-135M into out/demo, again at each call; with
#                 ARGS="--data text" train.py gets these flags instead. First make, then the shell reads
#                 a $ in ARGS: type ARGS='--data "\$$5.jsonl"' for the file $5.jsonl
# make test       set everything up and run the tests; ARGS="tests/test_nf4.py -k tie" runs some of them
# make test-long  run the property tests with 5000 examples each
# make mutate     change the code one place at a time; a test must fail for each change (takes long)
# make gpu        test and measure the kernels on this machine's NVIDIA GPU; ARGS="-k managed" selects tests
# make bench      measure speed and memory next to the peers, and write the tables in docs/; ARGS="ops --quick"
# make paper      test each claim of the paper, and write paper/RESULTS.md; ARGS="parity --seeds 10"
# make lesson     write the file of an exercise into work/, never over an existing one; LESSON=2
# make grade      grade your answer: which laws hold, and a small input that breaks one; LESSON=2
# make slides     write a lesson as slides into course/site; LESSON=2
# make autograder write the zip that grades an exercise on Gradescope; LESSON=2
# make course     draw the figures of the lessons, write their pages into course/site, and notebooks
# make lint       check with ruff: rules and formatting
# make figures    draw the figure in the README
# make clean      remove the virtual environment, the model and the output

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH := $(shell grep -o '^torch==[0-9.]*' requirements.txt)
CPU_TORCH_INDEX := https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

.PHONY: train test test-long gpu mutate bench paper lesson grade slides autograder course lint figures clean
train: $(VENV)/run
	$(BIN)/python train.py $(if $(ARGS),$(ARGS),--output-dir out/demo --overwrite)

# The whole suite must also reach every line; with ARGS it need not. All tests of a file run in one
# process (loadfile), so that shared fixtures are made once, and the longest files come first
# (tests/conftest.py). At most 8 processes, to limit memory.
test: $(VENV)/dev $(VENV)/transformers-4 $(MODEL)
ifeq ($(ARGS),)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder --cov --cov-report=
	@$(BIN)/python tests/covered.py
else
	$(BIN)/python -m pytest $(ARGS)
endif

test-long: $(VENV)/dev
	$(BIN)/python -m pytest --hypothesis-profile=long -m hypothesis $(ARGS)

ifeq ($(HAS_GPU),)
gpu:
	@echo "make gpu: nvidia-smi finds no NVIDIA GPU, so nothing was tested or measured" >&2; exit 1
else
gpu: $(VENV)/dev
	$(BIN)/python -m pytest -m gpu $(ARGS)
	$(BIN)/python -m bench --device cuda
endif

mutate: $(VENV)/dev
	$(BIN)/python tests/mutate.py $(ARGS)

bench: $(VENV)/dev
	$(BIN)/python -m bench $(ARGS)

paper: $(VENV)/dev
	$(BIN)/python -m paper $(ARGS)

lesson: $(VENV)/course
	@$(BIN)/python -m course lesson $(LESSON)

grade: $(VENV)/course
	@$(BIN)/python -m course grade $(LESSON)

slides: $(VENV)/course
	@$(BIN)/python -m course slides $(LESSON)

autograder: $(VENV)/course
	@$(BIN)/python -m course autograder $(LESSON)

course: $(VENV)/course
	$(BIN)/python -m course build

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

figures: $(VENV)/run
	$(BIN)/python paper/nf4_levels.py

clean:
	rm -rf $(VENV) models out

# Each target is a stamp file, newer than its inputs, so make does not install the same packages again.
$(VENV)/run: requirements.txt requirements-gpu.txt $(VENV)/torch
	$(PIP) install -r requirements.txt $(if $(HAS_GPU),-r requirements-gpu.txt)
	@touch $@

$(VENV)/course: requirements-course.txt requirements-gpu.txt $(VENV)/run
	$(PIP) install -r requirements-course.txt
	@touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/course
	$(PIP) install -r requirements-dev.txt
	@touch $@

# What a merge writes must also be read by the transformers before 5 (tests/checkpoints/test_portable.py).
$(VENV)/transformers-4: | $(VENV)/dev
	$(PIP) install --no-deps --target $@ transformers==4.57.3 tokenizers==0.22.1 "huggingface-hub<1"

# Created before the tests, because measuring coverage would slow it down.
$(MODEL): | $(VENV)/run
	$(BIN)/python -c "from checkpoints import sources; sources.default_folder()"

# With an NVIDIA driver: the default build of torch. Otherwise: the CPU build, from the configured index if
# it has one, else from PyTorch's index.
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
