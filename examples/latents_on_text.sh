#!/usr/bin/env bash
# Do learned latents pay on text? Di-LADD with learned codes on Tiny Shakespeare, beside MDLM of its width, of
# its size, of its training time, and on byte pairs. RESULTS.md, "learned codes lead at few steps", discusses
# what comes out. Two trainings run at a time: under half an hour on two cores.
#
#     bash examples/latents_on_text.sh [SEED]           another seed joins the curves of those before
#     TEXT=FILE bash examples/latents_on_text.sh        reads the text from a file instead of downloading it
#     PART=.01 bash examples/latents_on_text.sh         a rehearsal: a hundredth of all steps and samples
#
# If it was stopped, the same command continues.
set -emo pipefail
cd "$(dirname "$0")/.."
seed=${1:-0} PART=${PART:-1} out=out/latents_on_text
[ "$PART" = 1 ] || out+=_$PART
name() { [ "$seed" = 0 ] && echo "$out/$1" || echo "$out/$1_seed$seed"; }
part_of() { awk "BEGIN { n = int($1 * $PART); print n < 1 ? 1 : n }"; }
mkdir -p "$out"

# two trainings run side by side, each with half of the cores
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(getconf _NPROCESSORS_ONLN) + 1) / 2))}
train() {  # CONFIG FOLDER STEPS [--key=value ...]
    python train.py "config/shakespeare_char_$1.py" --out_dir="$2" --max_iters="$(part_of "$3")" \
        --warmup_iters="$(part_of 100)" --optimizer=muon --batch_size=32 --learning_rate=4e-3 "${@:4}"
}

# the text by characters
python data/shakespeare_char/prepare.py ${TEXT:+--input "$TEXT"}
text=${TEXT:-data/shakespeare_char/input.txt}

# the text in 511 pieces of 2.2 characters, which are learned from its first 90 %
python data/text/bpe.py --input "$text" --vocab_size=512 --out="$out/tokenizer"
python data/text/prepare.py --input "$text" --split=file --tokenizer="$out/tokenizer" --val_fraction=0.1 \
    --name=shakespeare_pieces

narrow="--hidden=128 --num_heads=2"
fast=--learning_rate=8e-3  # suits short runs of MDLM and AR

# the AR that scores all samples (one for all seeds); MDLM as wide as each of LADD's two streams, after as many
# texts as LADD's first two stages, on pieces likewise, and after as many seconds as all three
{
    train ar "$out/ar" 800 $narrow $fast
    train mdlm "$(name mdlm)" 1250 --seed="$seed" $narrow $fast
    train mdlm "$(name mdlm_pieces)" 1250 --seed="$seed" $narrow $fast --dataset=shakespeare_pieces \
        --block_size=58
    train mdlm "$(name mdlm_as_long)" 3250 --seed="$seed" $narrow
} &> "$out/others.txt" &
others=$!
trap 'kill -- -$others 2> /dev/null' EXIT

# beside them Di-LADD, all stages half as long as in its config, and MDLM with as many weights
echo "the other trainings write to $out/others.txt"
train di_ladd_learned "$(name di_ladd)" 2750 --seed="$seed" --stage1_iters="$(part_of 500)" \
    --vq_start="$(part_of 200)" --stage3_start="$(part_of 1250)" --eval_interval=1250
train mdlm "$(name mdlm_192)" 1250 --seed="$seed" $fast
wait $others || { tail -n 3 "$out/others.txt"; exit 1; }
trap - EXIT

unset OMP_NUM_THREADS  # from here on, one after another

# Gen PPL against cost, with the controls, for all seeds
python eval.py "$out"/{di_ladd,mdlm}* --teacher="$out/ar" --steps=1,2,3,4,6,8,16 --latent_steps=4,8 \
    --latent=generated,none,data,shuffled --recited --num_samples="$(part_of 64)" --time=cpu \
    --save="$out/frontier.png"
python -m examples.figures latents "$out"/{di_ladd,mdlm}* --save="$out/latents.png"

# how long each training took
python -m lib.plot log "$out"/{ar,di_ladd,mdlm}* --save="$out/log.png"

# what half a GFLOP writes
python sample.py --out_dir="$(name di_ladd)" --strategy=seq --latent_steps=8 --steps=2 --num_samples=1
python sample.py --out_dir="$(name mdlm)" --steps=4 --num_samples=1
