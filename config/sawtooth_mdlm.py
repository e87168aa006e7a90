"""
MDLM on sawtooth, tuned for two CPU cores (four minutes).

How it departs from the official settings (sawtooth_mdlm_paper.py) to learn within minutes: a narrow network,
because a CPU is worst at attention over 128 positions with many heads; many small steps instead of few large
ones; a rate ten times higher that falls to zero. Two layers reach the same likelihood, but only a deeper
network samples nearly as well in few steps as the exact denoiser: see RESULTS.md.
"""
dataset = 'sawtooth'
method = 'mdlm'

hidden = 64
num_layers = 4
num_heads = 4
cond_dim = 32
weighting = 'constant'  # the same optimum with less noise than 1/t; the paper's choice, too

batch_size = 32
max_iters = 4000
learning_rate = 3e-3
warmup_iters = 50
decay_lr = 'linear'
weight_decay = 0.03
ema = 0.999
eval_seqs = 2048
