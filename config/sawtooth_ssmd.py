"""
SSMD on sawtooth: the network, texts and optimizer of sawtooth_mdlm.py, and the causal block on top.

With --sampler=speculative, a text takes as many calls as draft and target make of it: 5.2 if they are exact.
"""
dataset = 'sawtooth'
method = 'ssmd'

hidden = 64
num_layers = 4
num_heads = 2
cond_dim = 32
weighting = 'constant'  # as there

optimizer = 'muon'
batch_size = 32
max_iters = 1500
learning_rate = 2e-3
warmup_iters = 50
decay_lr = 'linear'
weight_decay = 0.03
ema = 0.999
eval_seqs = 512          # a walk along the order takes five calls or six
