"""
Di-LADD on Tiny Shakespeare with latents that are learned and have a prior of their own. Here sequential
sampling is ahead of MDLM at few steps. RESULTS.md has the numbers and the controls, and one command trains
and compares it with its opponents: bash examples/latents_on_text.sh

    python data/shakespeare_char/prepare.py
    python train.py config/shakespeare_char_di_ladd_learned.py
    python sample.py --out_dir=out/shakespeare_char_di_ladd_learned --strategy=seq --steps=2

How it departs from shakespeare_char_di_ladd.py:
- the encoder is learned, and each of the 32 codes stands for a piece of four characters: it is placed in the
  middle of its piece, for the encoder and for the MM-DiT
- stage 1 shows the token denoiser texts that are at least half masked, and the clean codes, so that the codes
  learn to say what the tokens do not
- stage 2 shows clean codes to half of the texts, as sequential sampling has them, and masks all codes of 15 %
- stage 3 trains the latent denoiser alone, because sequential sampling needs a good prior
- Muon, which needs fewer steps
"""
dataset = 'shakespeare_char'
method = 'ladd'
block_size = 128  # characters

hidden = 128
num_layers = 4
num_heads = 2
cond_dim = 48
weighting = 'constant'

latent = 'discrete'
num_latents = 32
latent_dim = 32
latents = 'spread'
latent_layers = 4
codebook_size = 511
vq_decay = 0.99
dead_below = 0.1
latent_schedule = 'linear'
times = 'independent'
p_start = 0.25
p_clean = 0.5
p_noise = 0.15

stage1_iters = 1000
stage1_t_min = 0.5
stage1_clean = True
vq_start = 400
stage3_start = 2500

optimizer = 'muon'
batch_size = 32
max_iters = 5500
learning_rate = 4e-3
warmup_iters = 100
decay_lr = 'linear'
beta2 = 0.99
weight_decay = 0.03
ema = 0.999
eval_interval = 500
eval_seqs = 871  # the whole validation text
compile = True
