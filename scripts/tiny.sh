#!/usr/bin/env bash
# The embedded recipe from end to end, called by finetune.sh: make a tiny model and the digits,
# convert, train, export, and read digits that the model never saw.
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

# of several machines only the first makes and measures; the others wait for it where the training
# begins
if ((${NODE_RANK:-0} > 0)); then exec "$@"; fi

save=$("$python" -m qwen35.config.load "${settings[@]}" --get training.save)

# SIGTERM, SIGHUP and Ctrl-C go to the step that runs, and none follows it
stopped=
trap 'stopped=143 interrupted=1; kill -TERM "$child"' TERM HUP
trap 'stopped=130 interrupted=1; kill -TERM "$child"' INT
step() { # in the background, for bash hears a signal only while it waits
    "$@" &
    child=$!
    await "$child"
    if [[ -n $stopped ]] && ((code == 0 || code == 143)); then exit "$stopped"; fi
    ((code == 0)) || exit "$code"
}

# ARGS are the training's
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # so small a model is quickest on one thread; the training has its own
export OUT="${OUT:-$save/hf}"
export ARGS="" HF=ckpt/hf_path/tiny MODEL=$OUT DATA=data/digits/heldout.json
export QWEN35_PARENT=$$ # the training ends with this script
step "$python" -m qwen35.tools.tiny
DCP=ckpt/mm_path/tiny step bash scripts/convert.sh
step "$@"
DCP=$save step bash scripts/export.sh
step bash scripts/evaluate.sh --recipe "$save/config.yaml"
