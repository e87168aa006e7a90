"""
The flagship, Co-LADD-64 on OpenWebText with the paper's settings (LADD section 5.3): 184M parameters without
embeddings and heads, Qwen3 vocabulary (151,669 ids and [mask]), sequences of 512. The latents are the states
of the frozen Qwen3-Embedding, averaged over 63 pieces of the text, and the state of its EOS.

    python data/openwebtext/prepare.py --tokenizer=Qwen/Qwen3-Embedding-0.6B --wrap
    torchrun --standalone --nproc_per_node=8 train.py config/owt.py
    torchrun --standalone --nproc_per_node=8 train.py config/owt.py --num_latents=16 --out_dir=out/owt_16
    python sample.py --out_dir=out/owt --steps=32

The third command is Co-LADD-16; --num_latents=512, one latent per token, would be CCDD-like. The
encoder reads every batch, because encoder_dropout hides from it a part of what the mask hides; without that
the latents can be stored once, see lm1b_co_ladd.py. The official code trains with times shifted towards
clean texts; we do not. The learning rate stays constant, as in the paper; --decay_lr=cosine (or linear) ends
lower. 500k steps are the default of the official scripts.
"""
dataset = 'openwebtext'
method = 'ladd'
block_size = 512
seed = 42

hidden = 768
num_layers = 12
num_heads = 12
cond_dim = 128
dropout = 0.1
weighting = 'constant'

latent = 'continuous'
encoder = 'Qwen/Qwen3-Embedding-0.6B'
num_latents = 64
latent_dim = 32
latent_schedule = 'vp_sqrt'
times = 'same'
p_drop = 0.15
encoder_dropout = True

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
