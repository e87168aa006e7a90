"""
LDLM on Tiny Shakespeare whose latents are trained embeddings. It needs no other model, and of our LDLMs on
text it is the one that writes: RESULTS.md, "an LDLM that writes".

    python data/shakespeare_char/prepare.py
    python train.py config/shakespeare_char_ldlm_embeddings.py
    python sample.py --out_dir=out/shakespeare_char_ldlm_embeddings --steps=64

How it departs from shakespeare_char_ldlm.py:
- a latent is the embedding of its character, without a pretrained model below it or an encoder above it. The
  token loss trains the embeddings (reconstruction), and so does the diffusion's (encoder_warmup)
- noise and schedule fit such latents, which are small: less of the first, and a smaller tangent
- Muon, which needs fewer steps
"""
dataset = 'shakespeare_char'
method = 'ldlm'
block_size = 128  # characters

token_encoder = 'scratch'
latent_encoder = 'none'
latent_dim = 64
decoder_layers = 1
reconstruction = 'ce'
sigma_dec = 0.5
tangent = 1.5

hidden = 128
num_layers = 4
num_heads = 2
cond_dim = 32

encoder_warmup = 2500    # gamma is .56 at the end
adaptive_bins = 20
adaptive_memory = 0.995
adaptive_every = 100

optimizer = 'muon'
batch_size = 32
max_iters = 2000
learning_rate = 4e-3
warmup_iters = 100
decay_lr = 'linear'
beta2 = 0.98
weight_decay = 0.01
ema = 0.999
eval_interval = 1000
compile = True  # without a C++ compiler: --compile=False
