"""
CADD on sawtooth: the network, texts and optimizer of sawtooth_mdlm.py.

Hints of one dimension are all that two words need.
"""
dataset = 'sawtooth'
method = 'cadd'

hidden = 64
num_layers = 4
num_heads = 2
cond_dim = 32
hint_dim = 1
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
