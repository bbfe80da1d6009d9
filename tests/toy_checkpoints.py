"""Small random checkpoints of the families that the shipped recipes name, each with its kind of tokenizer.

- LLaMA2: SentencePiece's BPE with byte fallback and a word mark, ``<s>`` before a text, no chat template (the base
  models have none).
- MiniCPM: the same kind; its config with ``scale_emb`` and its like; a template that ends no turn with a token
  (``<用户>...<AI>...``).
- SmolLM2: a GGUF file with byte-level BPE, ``<|im_start|>`` and ``<|im_end|>``, and a template with a system turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

VOCAB_SIZE = 448
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
MINICPM_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{'<用户>' + message['content'].strip() + '<AI>'}}"
    "{% else %}{{message['content'].strip()}}{% endif %}{% endfor %}"
)
SMOLLM_CHAT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_llama2(folder: Path, texts: Iterable[str], *, num_kv_heads: int) -> Path:
    _write_model(folder, {"num_key_value_heads": num_kv_heads, "bos_token_id": 1, "eos_token_id": 2})
    sentencepiece_like(texts).save_pretrained(folder)
    return folder


def write_minicpm(folder: Path, texts: Iterable[str], *, num_kv_heads: int) -> Path:
    """Weights under LLaMA's names with MiniCPM's config and ``auto_map``; the code it names is not here."""
    _write_model(
        folder,
        {"num_key_value_heads": num_kv_heads, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True},
        {
            "model_type": "minicpm",
            "architectures": ["MiniCPMForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 16,
        },
    )
    sentencepiece_like(texts, MINICPM_CHAT).save_pretrained(folder)
    return folder


def write_smollm2(path: Path, texts: Iterable[str], *, num_kv_heads: int) -> Path:
    """A GGUF file, as the package that the recipes name carries one."""
    from prosparse_core.formats import gguf_dense

    folder = path.with_suffix("")
    _write_model(
        folder,
        {"num_key_value_heads": num_kv_heads, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True},
    )
    byte_level(texts).save_pretrained(folder)
    add_keys: Callable[..., None] = gguf_dense.add_model_keys

    def with_chat_template(writer: Any, *args: Any, **options: Any) -> None:
        add_keys(writer, *args, **options)
        writer.add_chat_template(SMOLLM_CHAT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_dense, "add_model_keys", with_chat_template)
        gguf_dense.write_dense_gguf(folder, path)
    return path


def _write_model(folder: Path, config: dict[str, Any], written: dict[str, Any] | None = None) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = AutoConfig.for_model("llama", **SIZES, **config)
    AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (written or {})))


def sentencepiece_like(texts: Iterable[str], chat: str | None = None) -> Any:
    """LLaMA2's: ids 0 to 2 are ``<unk>``, ``<s>``, ``</s>``, then the 256 bytes, then pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
    trained.train_from_iterator((text for text in texts if text.isascii()), trainer)
    learnt = json.loads(trained.to_str())["model"]
    return LlamaTokenizer(
        vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]], chat_template=chat, legacy=False
    )


def byte_level(texts: Iterable[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=SMOLLM_CHAT
    )
