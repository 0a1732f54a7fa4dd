"""Folders with the names of public models that the pages read, holding tiny ones with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LLAMA = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def tokenizer(folder: Path, end: str) -> None:
    """Byte-level BPE of 300 tokens."""
    import tokenizers

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=[end], initial_alphabet=alphabet)
    trained.train_from_iterator(["the cat sat on a mat, and purred softly"] * 9, trainer)
    trained.save(str(folder / "tokenizer.json"))
    entries = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(entries), encoding="utf-8")


def language_model(folder: Path) -> None:
    """A LLaMA of two layers."""
    import transformers

    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.LlamaConfig(
        **SIZES, **ends, num_key_value_heads=2, vocab_size=300, max_position_embeddings=512, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(folder, "<|endoftext|>")


def encoder(folder: Path) -> None:
    """A BERT of two layers."""
    import transformers

    config = transformers.BertConfig(**SIZES, vocab_size=300, max_position_embeddings=64)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer(folder, "[PAD]")


STAND_INS = {LLAMA: language_model, ENCODER: encoder}


def make(text: str, folder: Path) -> None:
    """Make a stand-in for every public model that a page names, below the folder."""
    for name, write in STAND_INS.items():
        if name in text:
            (folder / name).mkdir(parents=True)
            write(folder / name)
