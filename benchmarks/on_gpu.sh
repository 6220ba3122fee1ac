#!/usr/bin/env bash
# What a release must show on a GPU, on a machine that has torch and nvcc but no network and perhaps no history of git.
#
#   bash benchmarks/on_gpu.sh OUT STAGE...        from the repository's root; the last lines of each stage are printed
#
# Stages, in the order in which they make sense, each of less than ten minutes with 16 cores:
#   build     the package with all kernels; again only when a source has changed
#   smoke     `check`, then SM90's kernels one head dim at a time, so that one that hangs is known by name
#   tests80   the GPU tests, but for those of SM90's kernels, on several processes
#   tests90   those of SM90's kernels
#   suite     all of them in one process, timed
#   sanitize  compute-sanitizer's tools on their selection
#   fuzz      2,000 drawn calls, seed 0
#   models    transformers' architectures and xformers' masks
#   forward, short, backward, serving   SM80's kernels beside the peers by another script than the package's own,
#             WHEELS/peers.py with what it imports
#   sm90      SM90's kernels beside the peers in the package's own harness, which can ask for them
#   own       the package's own suites that no peer has: deterministic, pages, latency, tiny; host time
#   train     the small GPT
#   record_forward, record_backward, record_decode
#             what README.md's tables are filled from, for benchmarks/results
#   tune      tiles of SM90's kernels: TUNE="128/128 64/64"
#
# WHEELS (.whl): wheels that the machine lacks (nvidia-cutlass, expecttest, xformers; for the peers fa3-fwd), and, for
# four stages, peers.py, which isn't part of the repository: it takes suites, implementations (ours80, fa2, cudnn, mem)
# and --out, and times each implementation once. `python -m flash_attn bench` times most of that without it.
# SITE (/tmp/site): where they and the package are installed.
# FEW_ROWS (true): the kernels for few rows serve every call with few rows; false is what a build has by default until
# they have been proven, and leaves short sequences to SM90's kernels.
set -uo pipefail

OUT=$(mkdir -p "${1:?OUT, a folder}" && cd "$1" && pwd) || exit 2
shift
ROOT=$(cd "$(dirname "$0")/.." && pwd)
WHEELS=$(realpath "${WHEELS:-$ROOT/.whl}")
SITE=${SITE:-/tmp/site}
PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-8} # processes that share the GPU
TUNE=${TUNE:-512/512 128/128 64/64 256/256}
export FEW_ROWS=${FEW_ROWS:-true}
export PYTHONPATH=$SITE PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}

say() { echo "==== $(date +%T) $*"; }

build() {
  local sources
  sources=$FEW_ROWS$(cd "$ROOT" && find csrc flash_attn build_support setup.py pyproject.toml flash_attn_2_cuda.py \
    -type f -not -name '*.pyc' -not -name '*.so' -not -name _build_info.json -print0 | sort -z | xargs -0 sha256sum |
    sha256sum)
  [ "$(cat "$SITE/built_from" 2>/dev/null)" = "$sources" ] && return
  rm -rf "$SITE" && mkdir -p "$SITE"
  $PYTHON -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl || return
  (cd "$ROOT" && CFLAGS="-DFLASH_ATTN_FEW_ROWS=$FEW_ROWS" $PYTHON -m pip install -q --no-index --no-build-isolation \
    --no-deps --no-compile --upgrade --target "$SITE" .) && echo "$sources" >"$SITE/built_from"
}

# From the folder of tests, so that the source tree hides no installed package. A process that waits for a kernel that
# hangs answers no signal: the timeout's thread ends it, and pytest-xdist starts another.
pytest() {
  (cd "$ROOT/tests" && $PYTHON -m pytest -q --ignore=test_build.py --ignore=test_emulated_kernels.py \
    -p no:cacheprovider --timeout 150 --timeout-method thread "$@")
}
beside_each_other() { pytest -n "$JOBS" --dist worksteal --max-worker-restart 20 "$@"; }
bench() { (cd "$OUT" && $PYTHON -m flash_attn bench "$@"); }
peers() { (cd "$OUT" && timeout 540 $PYTHON "$WHEELS/peers.py" "$@"); }

smoke() {
  local failed=0
  (cd "$OUT" && timeout -k 5 120 $PYTHON -m flash_attn check) || failed=$?
  for d in 64 128 256 512 96 192 32 80 160; do
    (cd "$OUT" && timeout -k 5 40 $PYTHON - "$d") <<'PYTHON' || { failed=$?; say "head dim $d: exit $failed"; }
import sys, torch, flash_attn
d = int(sys.argv[1])
lengths = [1030, 1, 0, 700, 299] * 2
cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
for causal in (False, True):
    for packed in (False, True):
        shape = (sum(lengths), 16, d) if packed else (2, 1030, 4, d)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        with flash_attn.use_path("sm90"):
            if packed:
                out = flash_attn.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 1030, 1030, causal=causal)
            else:
                out = flash_attn.flash_attn_func(q, k, v, causal=causal)
        parts = zip(*(x.float().split(lengths) if packed else x.float() for x in (q, k, v)))
        want = [torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), is_causal=causal)
                for part in parts]
        want = torch.cat([x.transpose(0, 1) for x in want]).view_as(out)
        error = (out.float() - want).abs().max().item()
        print(f"sm90 head dim {d}, causal {causal}, packed {packed}: largest error {error:.1e}")
        assert error < 0.03
PYTHON
  done
  return $failed
}
tests80() { beside_each_other -k "not sm90"; }
tests90() { beside_each_other -k "sm90"; }
suite() { time pytest; }
sanitize() { (cd "$ROOT" && make --no-print-directory sanitize PYTHON3="$PYTHON"); }
fuzz() { (cd "$ROOT/tests" && $PYTHON fuzz.py --calls 2000 --seed 0); }
models() {
  local failed=0
  for script in transformers_models continuous_batching xformers_masks; do
    (cd "$OUT" && $PYTHON "$ROOT/tests/clients/$script.py") || failed=1
  done
  return $failed
}

forward() { peers fwd,hdim ours80,fa2,mem --out forward.json; }
short() { peers fwd_short,gemma,local ours80,fa2,cudnn --out short.json; }
backward() { peers bwd,hdim_bwd ours80,fa2,cudnn,mem --out backward.json; }
serving() { peers decode,paged ours80 --out serving.json; }
sm90() { bench --suites fwd,fwd_short,hdim,mla,local,varlen,prefill --impls ours90,ours80,flash,cudnn,fa3 --json sm90.json; }
own() {
  bench --suites bwd_det,pages,latency,tiny,varlen,varlen_bwd --json own.json &&
    (cd "$OUT" && $PYTHON "$ROOT/benchmarks/host_overhead.py")
}
record_forward() { bench --suites fwd,fwd_short,hdim,mla,local,score,varlen,tiny,memory --json h200_forward.json; }
record_backward() { bench --suites bwd,hdim_bwd,bwd_det,varlen_bwd --json h200_backward.json; }
record_decode() { bench --suites decode,paged,pages,prefill,latency --json h200_decode.json; }
train() { (cd "$OUT" && $PYTHON "$ROOT/benchmarks/train_gpt.py" --json train.json); }
tune() { (cd "$OUT" && CUTLASS_PATH=$SITE/cutlass_library/source/include $PYTHON "$ROOT/benchmarks/tune_sm90.py" $TUNE); }

status=0
for stage in "$@"; do
  say "$stage"
  "$stage" >"$OUT/$stage.log" 2>&1 || { status=$?; say "$stage: exit $status"; }
  tail -n "${LINES_SHOWN:-40}" "$OUT/$stage.log"
  [ "$stage" = build ] && [ $status -ne 0 ] && break
done
say "done"
exit $status
