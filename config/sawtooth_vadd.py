"""
VADD on sawtooth: the network, texts and optimizer of sawtooth_mdlm.py, and a recognition of one layer.

In half of the texts everything is masked. In most others the visible tokens say more about the shift than z
could, and then the recognition learns nothing; nor does it if lambda is 1 from the start. z has two
dimensions: with more, z from N(0, I) stands for some shifts far more often than for others (see RESULTS.md).
"""
dataset = 'sawtooth'
method = 'vadd'

hidden = 64
num_layers = 4
num_heads = 2
cond_dim = 32
z_dim = 2
encoder_layers = 1
kl_warmup = 1000
p_start = 0.5
weighting = 'constant'  # the same optimum with less noise than 1/t; the paper's choice, too

optimizer = 'muon'
batch_size = 32
max_iters = 1750
learning_rate = 2e-3
warmup_iters = 50
decay_lr = 'linear'
weight_decay = 0.03
ema = 0.999
eval_seqs = 2048
