# Every command. A variable given here, `make finetune NODES=2`, reaches the scripts through the environment; env.sh has
# the meaning and the default of each.

SHELL := bash
.DEFAULT_GOAL := help
# What is given on the command line reaches the scripts letter for letter: make would expand a $ in PROMPT, and run $(shell …).
$(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$(eval override export $v := $$(value $v))))
.PHONY: help install doctor accept download convert export data show finetune preflight rehearse generate evaluate bench test test-npu test-versions lint docs clean

help:     ## this list
install:  ## .venv with the exact pins for this machine  [ARCH=x86|arm DEVICE=cpu|npu CANN_VERSION TORCH_NPU PYTHON TORCH_INDEX DRY_RUN=1]
doctor:   ## is all as it should be here? every line ok, or wrong with what to do  [CONFIG ARGS]
accept:   ## what to run first on a real machine: does it compute what it should, how fast? one report  [NPUS_PER_NODE ARGS=--small]
download: ## a model of a hub into ckpt/hf_path, checked; goes on where it was stopped  [MODEL SOURCE=hf|modelscope OUT ARGS]
convert:  ## Hugging Face folder to DCP checkpoint  [HF DCP TIE ARGS]
export:   ## DCP checkpoint to Hugging Face folder  [DCP HF OUT ARGS]
data:     ## LLaVA-Instruct and COCO images to training records, checked, with a report  [LLAVA IMAGES OUT HF ARGS]
show:     ## samples of a recipe, trained tokens marked  [CONFIG ARGS]
finetune: ## train; alone: a tiny model learns digits, from nothing to a score  [CONFIG ARGS NPUS_PER_NODE NODES NODE_RANK NODE_ADDR MASTER_ADDR MASTER_PORT HOSTS DRY_RUN=1]
preflight: ## do the machines of a run agree, and how fast do they talk? trains nothing  [CONFIG ARGS, and as finetune: NODES … or HOSTS]
rehearse: ## one step on a virtual cluster of NPUs: does it fit, what does it send?  [CONFIG NODES NPUS_PER_NODE NPU_MEMORY_GB RATES ARGS]
generate: ## a model's answer about images, videos and text  [MODEL IMAGE VIDEO PROMPT HF ARGS]
evaluate: ## ask a model about held-out records  [MODEL DATA ARGS]
bench:    ## speed and memory beside transformers' model and bare matmuls, as ratios  [ARGS]
test:     ## all tests, on a CPU, those of test-npu among them  [ARGS]
test-npu: ## what can be proved of the NPU code without an NPU: the real torch_npu on stand-ins for CANN  [TORCH=2.10.0 ARGS]
test-versions: ## the tests on other versions of what they stand on  [TRANSFORMERS=5.2.0 TORCH=2.7.1 PYTHON ARGS]
lint:     ## ruff, mypy, shellcheck, hadolint
docs:     ## docs/settings.md and docs/environment.md, of the settings' own file and env.sh
clean:    ## remove what the tools and the tiny recipe made; .venv stays

help:
	@sed -n 's/^\([a-z-]*\): *## /  make \1\t/; s/  \(\[.*\]\)$$/\n\t\1/; /^  make/p' Makefile | expand -t 21

install:
	@bash scripts/install.sh

doctor: # works without an installation too
	@bash scripts/doctor.sh

accept download convert export data show finetune preflight rehearse generate evaluate bench test test-npu test-versions lint docs: .venv/.installed
	@bash scripts/$@.sh

# the stamp that a finished install leaves; a newer lock file brings .venv up to date
.venv/.installed: $(wildcard scripts/requirements/*.txt)
	@bash scripts/install.sh

clean:
	rm -rf build .mypy_cache .ruff_cache .hypothesis ckpt/hf_path/tiny ckpt/mm_path/tiny data/digits runs/tiny
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
