"""Random models small enough for every test, with a tokenizer that every format can hold."""

import dataclasses
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_danube.model import Decoder, DecoderConfig, RopeScaling
from lightning_danube.weights.huggingface import save_hf

# Room for the tokenizer's 262 tokens. Weights ten times the usual size, as in test_parity.py.
CONFIG = DecoderConfig(64, 96, 2, 4, 2, vocab_size=272, max_position_embeddings=128, initializer_range=0.2)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
# A decoder of each family of checkpoints. The window is shorter than the texts of most tests. Of the frequencies that
# theta gives, some are unchanged, one is in between, some are slowed.
VARIANTS = {
    "llama 3.2": dataclasses.replace(TIED, rope_theta=500000.0, rope_scaling=RopeScaling(factor=32.0)),
    "mistral": dataclasses.replace(CONFIG, sliding_window=7),
    "qwen2": dataclasses.replace(CONFIG, qkv_bias=True, rms_norm_eps=1e-6),
    "qwen3": dataclasses.replace(TIED, qk_norm=True, head_dim=24),
    "smollm3": dataclasses.replace(TIED, nope_interval=4, num_hidden_layers=5),
}
TEMPLATE = "{% for message in messages %}{{ bos_token }}{{ message['content'] }}{{ eos_token }}{% endfor %}"


def tiny_decoder(config: DecoderConfig = CONFIG, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        if parameter.ndim == 1:  # gains of 1, and biases of 0, would hide one that is left out
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return decoder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, split as in GPT-2, with three merges and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "th", "the", "Ġthe"])}
    backend = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e"), ("Ġ", "the")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<bos>", "<eos>", "<pad>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=128
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_bos_token = True  # type: ignore[misc]  # its setter is not next to its getter
    return tokenizer


def save_tiny(directory: Path, config: DecoderConfig = CONFIG, seed: int = 0) -> Path:
    """A Hugging Face directory with a tokenizer."""
    tokenizer = tiny_tokenizer()
    save_hf(
        tiny_decoder(config, seed),
        directory,
        tokenizer,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    return directory
