"""
LDLM on a text of your own: a denoiser of the size of text_mdlm.py on top of a small pretrained encoder (BERT
family, width 384).

    python data/text/prepare.py --input FILE... --tokenizer=sentence-transformers/all-MiniLM-L6-v2 --name=text
    python train.py config/text_ldlm.py [--dataset=NAME]

Without a network give the folder of a model to both: --tokenizer=FOLDER and --token_encoder=FOLDER. The data
must have the encoder's tokenizer, and latent_dim is the encoder's width; with GPT-2:

    python data/text/prepare.py --input FILE... --tokenizer=gpt2 --name=text
    python train.py config/text_ldlm.py --token_encoder=gpt2 --latent_dim=768

For the ablations see shakespeare_char_ldlm.py.
"""
dataset = 'text'  # the --name given to prepare.py
method = 'ldlm'
block_size = 256

token_encoder = 'sentence-transformers/all-MiniLM-L6-v2'
latent_dim = 384
latent_layers = 3
decoder_layers = 1

hidden = 384
num_layers = 6
num_heads = 6
cond_dim = 128

encoder_warmup = 2000    # like the lengths below, scaled to a run of 20,000 small steps
adaptive_bins = 50
adaptive_every = 500

batch_size = 32
max_iters = 20000  # 164 million tokens
learning_rate = 5e-4
warmup_iters = 500
decay_lr = 'cosine'
beta2 = 0.98
weight_decay = 0.01
ema = 0.999
