r"""
Co-LADD-32 on LM1B with the paper's settings (LADD section 5.2): 184M parameters without embeddings and heads,
Qwen3 vocabulary (151,669 ids and [mask]). The latents are the states of the frozen Qwen3-Embedding, averaged
over 31 pieces of the text, and the state of its EOS.

    python data/lm1b/prepare.py --tokenizer=Qwen/Qwen3-Embedding-0.6B --wrap
    torchrun --standalone --nproc_per_node=8 train.py config/lm1b_co_ladd.py
    torchrun --standalone --nproc_per_node=8 train.py config/lm1b_co_ladd.py --num_latents=128 \
        --out_dir=out/lm1b_co_ladd_128

The last command is Co-LADD-128: one latent per token, which is CCDD-like. The encoder reads every batch,
because encoder_dropout hides from it a part of what the mask hides. Without that the latents can be stored
once:

    python data/encode.py config/lm1b_co_ladd.py
    torchrun --standalone --nproc_per_node=8 train.py config/lm1b_co_ladd.py --stored_latents=True \
        --encoder_dropout=False

The paper keeps the learning rate constant; --decay_lr=cosine (or linear) ends lower. The number of steps is
derived, see lm1b_mdlm.py.
"""
dataset = 'lm1b'
method = 'ladd'
block_size = 128
seed = 42

hidden = 768
num_layers = 12
num_heads = 12
cond_dim = 128
dropout = 0.1
weighting = 'constant'

latent = 'continuous'
encoder = 'Qwen/Qwen3-Embedding-0.6B'
num_latents = 32
latent_dim = 32
latent_schedule = 'vp_sqrt'
times = 'same'
p_drop = 0.15
encoder_dropout = True

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
