"""Where one document ends and the next begins: the tokens between them, the same in training and in evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prosparse_core.errors import BadInput

DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|endofdoc|>", "</s>", "<eos>")
"""What models are pretrained with between documents. A chat model's EOS often ends a turn instead (``<|im_end|>``)."""


@dataclass(frozen=True)
class Separator:
    """The tokens around a document, as ids."""

    prefix: tuple[int, ...]
    """A real BOS: the tokenizer itself puts it before a text, or there is no EOS."""
    suffix: tuple[int, ...]
    """What ends a document: EOS, or where that ends a turn of a chat, the end of a document from before."""

    @property
    def before(self) -> int:
        """The token that a document follows, in training as at the head of whatever is evaluated."""
        return self.prefix[-1] if self.prefix else self.suffix[-1]


def separator_of(tokenizer: Any) -> Separator:
    """The document separator of a tokenizer.

    Raises:
        BadInput: it has neither BOS nor EOS, so documents cannot be told apart.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and eos is None:
        raise BadInput(
            "the tokenizer has neither a BOS nor an EOS token, so documents cannot be separated",
            hint="set bos_token or eos_token in the model's tokenizer_config.json",
        )
    adds_bos = bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]
    prefix = (bos,) if adds_bos or eos is None else ()
    return Separator(prefix, () if eos is None else (_document_end(tokenizer, eos),))


def special_tokens(tokenizer: Any) -> set[int]:
    """Ids of the tokens that are never a part of a text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


def _document_end(tokenizer: Any, eos: int) -> int:
    """EOS, unless it is of no known name and the vocabulary has one that is: then EOS ends a turn."""
    special = {tokenizer.convert_ids_to_tokens(number): number for number in special_tokens(tokenizer)}
    if tokenizer.convert_ids_to_tokens(eos) in DOCUMENT_ENDS:
        return eos
    return next((special[name] for name in DOCUMENT_ENDS if name in special), eos)
