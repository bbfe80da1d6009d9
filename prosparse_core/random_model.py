"""A small random model with a real tokenizer: the whole chain in a minute, on any machine, without a download."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from prosparse_core.families import family_of

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAMPLE_FILES = 60


def build_random(model_type: str, config: dict[str, Any], seed: int, folder: Path) -> Any:
    """Write a randomly initialised model of ``model_type`` and a byte-level BPE tokenizer trained on Python source;
    returns the model.

    ``intermediate_size`` is d_ff whatever the architecture calls it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = train_tokenizer(int(config.get("vocab_size", 1024)))
    settings = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        **config,
        "vocab_size": len(tokenizer),
    }
    family = family_of({"model_type": model_type})
    if family is not None:
        settings = family.named(settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32)
    _fill_padding(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def _fill_padding(model: Any) -> None:
    """Give the padding token, which is also EOS and so between all documents, an embedding like every other's.

    transformers leaves it zero, which makes x1 zero there: a dense model would seem sparse.
    """
    import torch

    embedding = model.get_input_embeddings()
    if embedding.padding_idx is not None:
        with torch.no_grad():
            embedding.weight[embedding.padding_idx].normal_(std=getattr(model.config, "initializer_range", 0.02))


def train_tokenizer(vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with BOS, EOS and a chat template, trained on standard-library source."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py"))[:SAMPLE_FILES]
    texts = [f.read_text(encoding="utf-8", errors="ignore") for f in files]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )
