"""
CANDI on sawtooth: the network, texts and optimizer of sawtooth_mdlm.py.

The tokens of a text share the noise that their hints start from, so one step is better than any MDLM's. But
that noise is not quite what the hints of texts are: with the default range, .05 to .25, one step is better
still, and many steps are far from the data. This range is that of the paper's shorter run.
"""
dataset = 'sawtooth'
method = 'candi'

hidden = 64
num_layers = 4
num_heads = 2
cond_dim = 32
weighting = 'constant'
r_min = 0.1
r_max = 0.4

optimizer = 'muon'
batch_size = 32
max_iters = 2200
learning_rate = 2e-3
warmup_iters = 50
decay_lr = 'linear'
weight_decay = 0.03
ema = 0.999
eval_seqs = 2048
