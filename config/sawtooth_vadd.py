"""
MDLM on sawtooth, tuned for a CPU (training takes five minutes on one core).

How it departs from the official settings (sawtooth_mdlm_paper.py) to learn within minutes: a narrow network,
because a CPU is worst at attention over 128 positions with many heads; many small steps instead of few large
ones; Muon, which needs half as many of them as AdamW; a rate that falls to zero. Two layers reach the same
likelihood, but only a deeper network samples nearly as well in few steps as the exact denoiser: see
RESULTS.md.
"""
dataset = 'sawtooth'
method = 'vadd'

hidden = 64
num_layers = 4
num_heads = 2
cond_dim = 32
z_dim = 8
encoder_layers = 1
kl_warmup = 500
weighting = 'constant'  # the same optimum with less noise than 1/t; the paper's choice, too

optimizer = 'muon'
batch_size = 32
max_iters = 2200
learning_rate = 2e-3
warmup_iters = 50
decay_lr = 'linear'
weight_decay = 0.03
ema = 0.999
eval_seqs = 2048
