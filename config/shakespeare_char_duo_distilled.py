"""
The distillation of shakespeare_char_duo.py's network, which has to be trained first:

    python train.py config/shakespeare_char_duo.py
    python train.py config/shakespeare_char_duo_distilled.py

Four rounds, with gaps of 1/16, 1/8, 1/4 and 1/2.
"""
dataset = 'shakespeare_char'
method = 'duo_distilled'
init_from = 'out/shakespeare_char_duo'
block_size = 128

hidden = 192
num_layers = 4
num_heads = 3
cond_dim = 32
round_iters = 400
first_gap = 0.0625

batch_size = 16
max_iters = 1600
learning_rate = 1e-3
warmup_iters = 50
decay_lr = 'constant'
beta2 = 0.99
weight_decay = 0.03
ema = 0.99
eval_seqs = 871
compile = True
