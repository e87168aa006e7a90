"""
The distillation of sawtooth_duo.py's network, which has to be trained first:

    python train.py config/sawtooth_duo.py
    python train.py config/sawtooth_duo_distilled.py

Four rounds, with gaps of 1/16, 1/8, 1/4 and 1/2.
"""
dataset = 'sawtooth'
method = 'duo_distilled'
init_from = 'out/sawtooth_duo'

hidden = 64
num_layers = 4
num_heads = 2
cond_dim = 32
round_iters = 150
first_gap = 0.0625

optimizer = 'muon'
batch_size = 32
max_iters = 600
learning_rate = 1e-3
warmup_iters = 50
decay_lr = 'constant'
weight_decay = 0.03
ema = 0.99
eval_seqs = 2048
