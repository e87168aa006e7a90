"""
The left-to-right model on LM1B: as many parameters, tokens and steps as lm1b_mdlm.py, the paper's settings.

    python data/lm1b/prepare.py --tokenizer=Qwen/Qwen3-Embedding-0.6B --wrap
    torchrun --standalone --nproc_per_node=8 train.py config/lm1b_ar.py

The paper keeps the learning rate constant; --decay_lr=cosine (or linear) ends lower.
"""
dataset = 'lm1b'
method = 'ar'
block_size = 128
seed = 42

hidden = 1024
num_layers = 13
num_heads = 16
cond_dim = 256
dropout = 0.1

batch_size = 512  # over all processes; where memory is short: --micro_batch=16
max_iters = 300000
learning_rate = 3e-4
warmup_iters = 2500
decay_lr = 'constant'
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.03
grad_clip = 1.0
ema = 0.9999
dtype = 'bfloat16'
compile = True
eval_interval = 10000
