#!/usr/bin/env bash
# Makes this tree ready for a GPU machine without network, one that has Python with torch, torchaudio,
# onnxruntime, sentencepiece, numpy and pluggy:
#
#   local/pack.sh [--python 3.12] [--platform x86_64] [DIR]
#
# Fetches the other packages that tests/gpu.sh and benchmarks/gpu.sh import as wheels for that Python, in
# the versions of constraints.txt, into build/gpu. With DIR, an empty or a new directory, copies the tree
# (all that git does not ignore) and the wheels there, and says how large it is.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# All that these two need besides what the GPU machine has. Left out: sherpa-onnx, matplotlib, kenlm.
needs=(
    annotated-types cffi click cytoolz iniconfig intervaltree jiwer kaldi-native-fbank lhotse ml_dtypes onnx
    packaging pycparser pydantic pydantic_core Pygments pytest pytest-timeout PyYAML RapidFuzz
    sortedcontainers soundfile tabulate toolz tqdm typing-inspection typing_extensions urllib3
)

python=3.12 machine=x86_64 copy=
while [[ $# -gt 0 ]]; do
    case $1 in
        --python) python=$2 && shift 2 ;;
        --platform) machine=$2 && shift 2 ;;
        -*) echo "usage: local/pack.sh [--python 3.12] [--platform x86_64] [DIR]" >&2 && exit 2 ;;
        *) copy=$1 && shift ;;
    esac
done
if [[ -n $copy && -n $(ls -A "$copy" 2>/dev/null) ]]; then
    echo "'$copy' is not empty -> name an empty or a new directory" >&2
    exit 2
fi

packed=${copy:-$root}/build/gpu
if [[ -n $copy ]]; then
    mkdir -p "$copy"
    (cd "$root" && git ls-files -z --cached --others --exclude-standard | tar -c --null -T -) | tar -x -C "$copy"
fi
rm -rf "$packed"
mkdir -p "$packed/wheels"
for name in "${needs[@]}"; do
    grep -i "^$name==" "$root/constraints.txt" | cut -d ';' -f 1 || { echo "constraints.txt lacks $name" >&2 && exit 1; }
done > "$packed/needs.txt"
platforms=()
for libc in 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${libc}_$machine"); done
for old in 2014 2010 1; do platforms+=(--platform "manylinux${old}_$machine"); done
"${KDRECIPE_PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --python-version "$python" --implementation cp "${platforms[@]}" -d "$packed/wheels" -r "$packed/needs.txt"
echo "$python" > "$packed/python"
echo "${copy:-$packed}: $(du -sm "${copy:-$packed}" | cut -f1) MB, for Python $python on $machine"
