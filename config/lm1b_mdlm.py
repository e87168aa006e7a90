"""
MDLM on LM1B with the paper's settings (LADD section 5.2): 184M parameters without embeddings and head, Qwen3
vocabulary (151,669 ids and [mask]).

    python data/lm1b/prepare.py --tokenizer=Qwen/Qwen3-Embedding-0.6B --wrap
    torchrun --standalone --nproc_per_node=8 train.py config/lm1b_mdlm.py

The paper keeps the learning rate constant; --decay_lr=cosine (or linear) ends lower. The number of steps is
derived, not stated: 10 billion tokens, of which a masked diffusion model is charged half. --wrap makes the
official chunks: BOS, 126 ids, EOS, all of them scored. Without it perplexities are not comparable.
"""
dataset = 'lm1b'
method = 'mdlm'
block_size = 128
seed = 42

hidden = 1024
num_layers = 13
num_heads = 16
cond_dim = 256
dropout = 0.1
weighting = 'constant'

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
