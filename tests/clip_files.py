"""Small tokenizers and text encoders in the folders of transformers, as checkpoints have them."""

import json
import pathlib
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = ("a", "red", "green", "blue", "circle", "square", "star", "photo", "of", "above", "the")


def byte_characters() -> list[str]:
    """The characters that byte-level tokenizers write bytes as, in OpenAI's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def merged(symbols: list[str], merge: tuple[str, str]) -> list[str]:
    """Symbols of a word after a merge of two neighbours."""
    found: list[str] = []
    for symbol in symbols:
        if found and (found[-1], symbol) == merge:
            found[-1] += symbol
        else:
            found.append(symbol)
    return found


def make_tokenizer_folder(path: pathlib.Path, pad: str = END) -> int:
    """Writes a tokenizer with CLIP's layout, which knows all text; returns its vocabulary's size.

    256 bytes, the same at the end of a word, merges for some words, start and end. The files are
    those of Stable Diffusion's checkpoints; `pad` is "!" in version 2.
    """
    merges: list[tuple[str, str]] = []
    for word in WORDS:  # each becomes one token
        symbols = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:
            symbols = merged(symbols, merge)
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols = merged(symbols, merges[-1])
    characters = byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *map("".join, merges), START, END]
    assert len(set(tokens)) == len(tokens)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    path.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "special_tokens_map.json").write_text(json.dumps(special))
    return len(tokens)


def make_bert_tokenizer_folder(path: pathlib.Path) -> int:
    """Writes a tokenizer with BERT's layout; returns its vocabulary's size."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *WORDS[1:], *letters, *("##" + letter for letter in letters), ",", "##ed"]
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 77}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return len(tokens)


def text_model(vocab_size: int, seed: int = 0, **changes: Any) -> CLIPTextModel:
    """A CLIP text encoder of transformers with every tensor random; small but for `changes`."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    special = dict(bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1)
    config = CLIPTextConfig(vocab_size=vocab_size, **special, **(sizes | changes))
    model = CLIPTextModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def make_text_encoder_folder(path: pathlib.Path, vocab_size: int, **changes: Any) -> CLIPTextModel:
    """Lets transformers write the folder of a `text_model`."""
    model = text_model(vocab_size, **changes)
    model.save_pretrained(path)
    return model
