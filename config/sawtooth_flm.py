"""
FLM on sawtooth: the network, texts and optimizer of sawtooth_mdlm.py.

One step writes the likeliest token everywhere, which on sawtooth is a guess between two; two steps are better
than any MDLM's.
"""
dataset = 'sawtooth'
method = 'flm'

hidden = 64
num_layers = 4
num_heads = 2
cond_dim = 32

optimizer = 'muon'
batch_size = 32
max_iters = 2200
learning_rate = 2e-3
warmup_iters = 50
decay_lr = 'linear'
weight_decay = 0.03
ema = 0.999
eval_seqs = 2048
