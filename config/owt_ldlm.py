"""
LDLM on OpenWebText with the paper's settings (section 8, appendix C), sequences of 1024; as lm1b_ldlm.py but
for a longer warmup.

    python data/openwebtext/prepare.py --tokenizer=gpt2
    torchrun --standalone --nproc_per_node=8 train.py config/owt_ldlm.py

OWT-128, where the paper ablates:  --block_size=128 --encoder_warmup=10000 --max_iters=500000  and one of
these lines, with an out_dir of its own (out/owt128_ldlm is the full recipe):
    table 1  --reconstruction=ce                                    or both
             --reconstruction=ce --layer=0                          frozen GPT-2 embeddings
             --reconstruction=ce --token_encoder=scratch            trained ones
             --adaptive_t=False --encoder_warmup=0                  or 5000, 10000, 25000, 50000, 100000
             --adaptive_t=False
             --sigma_dec=0                                          or other levels
    table 2, with --latent_encoder=none --decoder_layers=9 --sigma_dec=.5 (this noise is our choice) and
             --token_encoder=scratch --reconstruction=ce            trained embeddings
             --layer=0                                              frozen embeddings
             nothing more                                           TEncDM-like
    table 2  --stage=autoencoder --mask_states=.3 --sigma_dec=1     COSMOS-like, and then, from that run:
             --stage=diffusion --init_from=out/THAT
    table 4  --layer=-1                                             or another
    table 5  --stage=decoder --decode_from=latents --decoder_layers=1 --max_iters=200000
             --init_from=out/owt128_ldlm                            or 2, 3, 6 layers; the paper's start anew,
                                                                    ours from the weights that fit
    table 6  --token_encoder=bert-base-uncased --dataset=NAME       with data prepared by that tokenizer
    table 7  --latent_encoder=attention
"""
dataset = 'openwebtext'
method = 'ldlm'
block_size = 1024

token_encoder = 'gpt2'
layer = -3
latent_dim = 768
latent_layers = 6
decoder_layers = 3

hidden = 768
num_layers = 12
num_heads = 12
cond_dim = 768

reconstruction = 'mse'
encoder_warmup = 50000  # longer than LM1B's [paper]; 50k is one of the two [second-hand], our choice here
adaptive_t = True
sigma_dec = 3.0

batch_size = 512  # over all processes; where memory is short: --micro_batch=8
max_iters = 1000000
learning_rate = 2e-4
warmup_iters = 5000
decay_lr = 'constant'
beta1 = 0.9
beta2 = 0.98
adam_eps = 1e-6
weight_decay = 0.01
grad_clip = 1.0
ema = 0.9999
dtype = 'bfloat16'
compile = True
eval_interval = 10000
