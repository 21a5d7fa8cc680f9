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

.PHONY: train demo-speech test install clean

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

# Czech speech to English text; docs/speech.md says what to expect.
SPEECH ?= runs/speech
demo-speech: install
	$(BIN)/megadsl data fetch fillets-ng --output $(SPEECH)/fillets-ng
	$(BIN)/megadsl data speech $(SPEECH)/fillets-ng/manifest.tsv --output $(SPEECH)/data --max-frames 1000 --skip-bad-rows
	$(BIN)/megadsl plan configs/speech-24.yaml data.datasets=$(SPEECH)/data tokenizer.model=$(SPEECH)/data/tokenizer.model
	$(BIN)/megadsl train configs/speech-24.yaml data.datasets=$(SPEECH)/data tokenizer.model=$(SPEECH)/data/tokenizer.model
	$(BIN)/megadsl evaluate runs/speech-24 --hypotheses runs/speech-24/test.jsonl --output runs/speech-24/evaluation.json

test: install
	$(BIN)/python -m pytest

install: $(VENV)/.installed

$(VENV)/.installed: setup.py setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf runs
