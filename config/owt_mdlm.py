"""
MDLM on OpenWebText with the paper's settings (LADD section 5.3): 184M parameters without embeddings and head,
Qwen3 vocabulary (151,669 ids and [mask]), sequences of 512.

    python data/openwebtext/prepare.py --tokenizer=Qwen/Qwen3-Embedding-0.6B --wrap
    torchrun --standalone --nproc_per_node=8 train.py config/owt_mdlm.py

The paper keeps the learning rate constant; --decay_lr=cosine (or linear) ends lower. 500k steps are the
default of the official scripts. --wrap makes the official chunks: BOS, 510 ids, EOS, all of them scored.
Without it a perplexity is about 1.3 % higher.
"""
dataset = 'openwebtext'
method = 'mdlm'
block_size = 512
seed = 42

hidden = 1024
num_layers = 13
num_heads = 16
cond_dim = 256
dropout = 0.1
weighting = 'constant'

batch_size = 512  # over all processes; where memory is short: --micro_batch=16
max_iters = 500000
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
