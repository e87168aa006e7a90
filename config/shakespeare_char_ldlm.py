"""
LDLM on Tiny Shakespeare by characters. The token encoder is our own left-to-right model; the denoiser has
the size of shakespeare_char_mdlm.py, batches and texts are the same.

    python data/shakespeare_char/prepare.py
    python train.py config/shakespeare_char_ar.py
    python train.py config/shakespeare_char_ldlm.py
    python sample.py --out_dir=out/shakespeare_char_ldlm --steps=128 [--sampler=ddim]

The recipe, one part at a time (each needs an out_dir of its own):
    reconstruction (table 1)      --reconstruction=ce        or both: the token loss shapes the latents, too
    warmup (without adaptive t)   --adaptive_t=False --encoder_warmup=0
    times                         --adaptive_t=False
    decoder-input noise           --sigma_dec=0              or .5, 1, 5; less is better here (RESULTS.md)
Spaces compared (table 2), by the same denoiser and token decoder, with --latent_encoder=none
--decoder_layers=3 --sigma_dec=.5 (a latent of unit variance does not survive 3 [choice]) and
    trained embeddings            --token_encoder=scratch --reconstruction=ce
    frozen embeddings             --layer=0
    frozen states (TEncDM-like)   nothing more
    autoencoder first, frozen     --stage=autoencoder --mask_states=.3 --sigma_dec=1 --out_dir=out/autoencoder
      then (COSMOS-like)          --stage=diffusion --init_from=out/autoencoder
    (the last two keep latent encoder and decoder_layers as they are)
Architecture (appendix B):
    self-attention                --latent_encoder=attention
    layer of the states           --layer=-1                 or -2, ..., down to 0, the embeddings
    token decoder afterwards      --token_loss=False --out_dir=out/no_tokens, then
                                  --stage=decoder --init_from=out/no_tokens
    a smaller one in its place    --stage=decoder --decode_from=latents --decoder_layers=2
                                  --init_from=out/shakespeare_char_ldlm
"""
dataset = 'shakespeare_char'
method = 'ldlm'
block_size = 128  # characters

token_encoder = 'out/shakespeare_char_ar'
layer = -3               # after two of its four blocks
latent_dim = 192         # its width
latent_layers = 2
decoder_layers = 1

hidden = 192
num_layers = 4
num_heads = 3
cond_dim = 32

# Twice the run: gamma ends at .05. With a warmup of 1,000 steps the denoiser had not learnt enough to guide
# the encoder: while gamma rose to 1, the variance of the latents fell from 9.9 to .2 and the accuracy from
# .9 to .5
encoder_warmup = 5000
adaptive_bins = 20       # 16 texts a step tell little about 100 of them
adaptive_memory = 0.995
adaptive_every = 250

batch_size = 16
max_iters = 2500  # each takes three times as long as one of shakespeare_char_mdlm.py
learning_rate = 1e-3
warmup_iters = 100
decay_lr = 'linear'
beta2 = 0.98
weight_decay = 0.01
ema = 0.999
compile = True  # without a C++ compiler: --compile=False
