#!/usr/bin/env bash
# Download a model from a hub into a folder, every file checked. Started again, it goes on where it
# was stopped.
#
#   MODEL=Qwen/Qwen3.5-4B [SOURCE=hf|modelscope] [OUT=<folder to fill, default ckpt/hf_path/Qwen3.5-4B>] scripts/download.sh
#
# Of Qwen3.5, 3.6 and 3.8 the name alone is enough, MODEL=Qwen3.8-27B.
# HF_ENDPOINT names a mirror of the first hub, MODELSCOPE_DOMAIN another site of the second. Tokens,
# for models that ask for one, come from the environment: HF_TOKEN (or `hf auth login`),
# MODELSCOPE_API_TOKEN. ARGS="--revision <branch, tag or commit>" takes another than the newest; the
# commit is printed.
given=${MODEL:-} # env.sh's own is the model that is asked
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/check_env.sh
check_env
need_venv
split "${ARGS:-}"
model=${given:-${DOWNLOAD_MODEL:-}}
[[ -n $model ]] || die "MODEL is not set: name one, as in make download MODEL=Qwen/Qwen3.5-4B"
exec "$python" -m qwen35.tools.download "$model" --source "$SOURCE" ${OUT:+--out "$OUT"} "${words[@]}" "$@"
