#!/usr/bin/env bash
# The embedded recipe from end to end, called by finetune.sh: make a tiny model and the digits, convert, train, export, and
# read digits that the model never saw.
#
#   scripts/tiny.sh CONFIG [a.b=c …] -- TRAINING COMMAND
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ready
settings=()
while (($#)) && [[ $1 != -- ]]; do
    settings+=("$1")
    shift
done
(($# > 1)) || die "called by finetune.sh, with the training command after --"
shift

# of several machines only the first makes and measures; the others wait for it where the training begins
if ((${NODE_RANK:-0} > 0)); then exec "$@"; fi

save=$("$python" -m qwen35.config "${settings[@]}" --get training.save)
# ARGS are the training's
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # so small a model is quickest on one thread; the training has its own
export ARGS="" HF=ckpt/hf_path/tiny OUT=runs/tiny/hf MODEL=runs/tiny/hf DATA=data/digits/heldout.json
"$python" -m qwen35.tiny
DCP=ckpt/mm_path/tiny bash scripts/convert.sh
"$@"
DCP=$save bash scripts/export.sh
bash scripts/evaluate.sh --recipe "$save/config.yaml"
