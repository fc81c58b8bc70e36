"""A small language model on disk: the architecture of gemma-2, random weights, a tokenizer of its own."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast


def save_tiny_gemma(directory):
    """Two layers of width 16, a vocabulary of letters; returns the directory."""
    vocabulary = {
        word: number for number, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *map(chr, range(97, 123))])
    }
    save_tokenizer(directory, vocabulary, pre_tokenizers.Split("", "isolated"))
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=32,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    Gemma2ForCausalLM(config).save_pretrained(directory)
    return directory


def save_tokenizer(directory, vocabulary, pre_tokenizer):
    """One that knows whole tokens, with <pad>, <eos>, <bos> and <unk> among them; `vocabulary` has their ids."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(directory)
