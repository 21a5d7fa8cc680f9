# Two commands do everything:
#   make train   environment, corpus, tokenizer, dataset, plan, training, validation, a generated sample, a report
#   make test    the whole test suite
# Both make .venv first (exact versions from constraints.txt). Running them again re-uses what is there.

VENV    ?= .venv
BIN     := $(VENV)/bin
CONFIG  ?= configs/decoder-192.yaml
RUN     ?= runs/decoder-192
DATA    ?= runs/demo
# The demo shares its batch of 2 x 4 sequences over two processes, or over one where there is a single GPU.
PROCESSES ?= $(shell [ "$$(nvidia-smi -L 2>/dev/null | wc -l)" = 1 ] && echo 1 || echo 2)

.PHONY: train test install clean

train: install
	$(BIN)/megadsl data corpus --output $(DATA)/corpus
	$(BIN)/megadsl tokenizer train --corpus $(DATA)/corpus --output $(DATA)/tokenizer.model --vocab-size 2048 --type bpe
	$(BIN)/megadsl data preprocess --corpus $(DATA)/corpus --tokenizer $(DATA)/tokenizer.model --output $(DATA)/dataset
	$(BIN)/megadsl plan $(CONFIG) --figure $(RUN)/plan.png
	$(BIN)/torchrun --nproc_per_node $(PROCESSES) -m megadsl train $(CONFIG) training.run_dir=$(RUN)
	$(BIN)/megadsl evaluate $(RUN) --data $(DATA)/dataset --split test --max-tokens 50000 --output $(RUN)/evaluation.json
	$(BIN)/megadsl generate $(RUN) --prompt "def " --max-new-tokens 80 --top-p 0.9 --output $(RUN)/sample.txt
	$(BIN)/megadsl report $(RUN)
	@echo "Done. Report: $(RUN)/report.html | TensorBoard: $(BIN)/tensorboard --logdir $(RUN)/tensorboard | checkpoint: $(RUN)/checkpoints/$$(cat $(RUN)/checkpoints/latest) | plan: $(RUN)/plan.json, $(RUN)/plan.png"

# Tests of one process run side by side; those that start processes of their own, or watch a clock, have the machine to themselves.
test: install
	$(BIN)/python -m pytest tests/unit tests/repo --numprocesses $$(nproc) --dist loadfile
	$(BIN)/python -m pytest tests/signal tests/dist tests/cluster tests/browser

install: $(VENV)/.installed

$(VENV)/.installed: setup.py setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf runs
