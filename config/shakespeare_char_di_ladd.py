"""
Di-LADD on Tiny Shakespeare by characters: minutes on a CPU. As shakespeare_char_co_ladd.py, but the pooled
states are quantised.

    python data/shakespeare_char/prepare.py
    python train.py config/shakespeare_char_ar.py
    python train.py config/shakespeare_char_di_ladd.py
    python sample.py --out_dir=out/shakespeare_char_di_ladd --steps=16 [--strategy=seq --latent_steps=8]
"""
dataset = 'shakespeare_char'
method = 'ladd'
block_size = 128  # characters

hidden = 128  # with two modalities, as many parameters as shakespeare_char_mdlm.py
num_layers = 4
num_heads = 2
cond_dim = 48
weighting = 'constant'

latent = 'discrete'
encoder = 'out/shakespeare_char_ar'
num_latents = 16
latent_dim = 32
codebook_size = 255
vq_decay = 0.99   # .95 and a threshold of 2 are for batches in which every code is chosen often;
dead_below = 0.1  # here 16 texts of 16 latents choose each once
latent_schedule = 'linear'
times = 'independent'
stage1_iters = 1000  # for the quantizer

batch_size = 16
max_iters = 6000  # 12 million characters, 12 times the text; many small steps beat few large ones
learning_rate = 2e-3
warmup_iters = 100
decay_lr = 'linear'
beta2 = 0.99  # small batches of little text
weight_decay = 0.03
ema = 0.999
eval_seqs = 871  # the whole validation text
compile = True  # a third off each step; without a C++ compiler: --compile=False
