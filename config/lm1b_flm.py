"""
FLM on LM1B with the published settings: a DiT of width 768 with 12 layers, bert-base-uncased (30,522 ids),
sequences of 128.

    python data/lm1b/prepare.py --tokenizer=bert-base-uncased --wrap
    torchrun --standalone --nproc_per_node=8 train.py config/lm1b_flm.py

1.5 million steps are those of the released scripts; their README says one million. --wrap makes the chunks
of MDLM's code: BOS, 126 ids, EOS. The learning rate stays constant, as published; --decay_lr=cosine (or
linear) ends lower.
"""
dataset = 'lm1b'
method = 'flm'
block_size = 128

hidden = 768
num_layers = 12
num_heads = 12
cond_dim = 128
dropout = 0.1

batch_size = 512  # over all processes; where memory is short: --micro_batch=16
max_iters = 1500000
learning_rate = 3e-4
warmup_iters = 2500
decay_lr = 'constant'
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.0
grad_clip = 1.0
ema = 0.9999
dtype = 'bfloat16'
compile = True
eval_interval = 10000
