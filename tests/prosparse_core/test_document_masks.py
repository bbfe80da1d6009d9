"""Documents of a packed window, in every family, are what they are alone: logits, gradients, compiled layers."""

from __future__ import annotations

from typing import Any

import document_mask_cost
import pytest
import torch
from models import MODEL_TYPES, tiny, tokens
from torch import Tensor

from prosparse_core.distributed.parallel import Forward, compile_layers
from prosparse_core.distributed.ranks import ALONE
from prosparse_core.document_masks import block_mask, forward_arguments, is_proven, positions_of, require_apart
from prosparse_core.errors import BadInput
from prosparse_core.families import FAMILIES, LLAMA, family_of, find_ffns, require_family
from prosparse_core.family import way_of
from prosparse_core.loss import next_token_loss
from prosparse_core.perplexity import measure
from prosparse_core.precision import autocast

LENGTHS = [5, 1, 7, 11]
APART = [t for t in MODEL_TYPES if t != "bloom"]
WINDOWED = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
"""Shorter than a document, so that a mask of documents alone would not be enough."""


def loud(model_type: str, **changes: Any) -> Any:
    """With weights so large that what a token sees decides its logits."""
    model = tiny(model_type, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.normal_(std=0.3, generator=generator)
    return model


def positions(rows: int = 2) -> Tensor:
    return torch.cat([torch.arange(n) for n in LENGTHS]).expand(rows, -1).contiguous()


def run(model: Any, x: Tensor, places: Tensor | None = None) -> Tensor:
    found: Tensor = model(input_ids=x, use_cache=False, **forward_arguments(model, places)).logits
    return found.float()


def alone(model: Any, x: Tensor) -> Tensor:
    """One document at a time."""
    return torch.cat([run(model, part) for part in x.split(LENGTHS, 1)], 1)


@pytest.mark.parametrize("model_type", APART)
@torch.no_grad()
def test_a_packed_document_has_the_logits_it_has_alone(model_type: str) -> None:
    model, x = loud(model_type), tokens(2, sum(LENGTHS))
    expected, packed, mixed = alone(model, x), run(model, x, positions()), run(model, x)
    scale = float(expected.abs().max())
    assert float((packed - expected).abs().max()) < 1e-5 * scale
    assert float((mixed - expected).abs().max()) > 0.1 * scale, "the documents see each other without a mask"
    one = torch.arange(x.shape[1]).expand(2, -1)  # windows of one document: nothing changes
    assert float((run(model, x, one) - mixed).abs().max()) < 1e-5 * scale
    with autocast("bf16", "cpu"):
        rough, expected = run(model, x, positions()), alone(model, x)
    assert float((rough - expected).abs().mean()) < 0.02 * scale


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gemma3_text", "cohere2", "olmo3", "qwen2", "starcoder2"])
@torch.no_grad()
def test_a_sliding_window_slides_within_a_document(model_type: str) -> None:
    model, x = loud(model_type, **WINDOWED), tokens(2, sum(LENGTHS))
    expected = alone(model, x)
    assert float((run(model, x, positions()) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    full = loud(model_type, **{**WINDOWED, "sliding_window": 64})
    assert float((alone(full, x) - expected).abs().max()) > 0.01, "the window is shorter than a document"


@pytest.mark.parametrize(("model_type", "changes"), [("bloom", {}), ("falcon", {"alibi": True})])
def test_what_cannot_keep_documents_apart_is_refused(model_type: str, changes: dict[str, Any]) -> None:
    model = tiny(model_type, **changes)
    with pytest.raises(BadInput, match="ALiBi") as caught:
        forward_arguments(model, positions())
    assert "data.attend_across_documents: true" in str(caught.value.hint)
    assert forward_arguments(model, None) == {}


def test_the_mask_is_the_one_of_loops() -> None:
    mask = block_mask(positions(1))[0, 0]
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    for row in range(24):
        for column in range(24):
            may_look = column <= row and document[row] == document[column]
            assert mask[row, column] == (0 if may_look else torch.finfo(torch.float32).min)


def test_positions_begin_anew_wherever_a_document_does() -> None:
    begins = torch.zeros(2, 24, dtype=torch.bool)
    begins[0, [5, 6, 13]] = True
    assert positions_of(begins).tolist() == [positions(1)[0].tolist(), list(range(24))]
    begins[1, 0] = True
    assert positions_of(begins)[1].tolist() == list(range(24))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # both are of torch's own compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["plain", "checkpointed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_gradients_of_a_window_are_the_sum_of_those_of_its_documents(how: str) -> None:
    model, x = loud("llama"), tokens(2, sum(LENGTHS))
    labels = x.masked_fill(positions() == 0, -100)
    for part, label in zip(x.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True):
        next_token_loss(run(model, part), label).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if how == "checkpointed":
        model.train()
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    elif how == "compiled":
        compile_layers(model)
    next_token_loss(Forward(model, ALONE)(x, positions()), labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4 * expected[name].abs().max())


def test_perplexity_of_windows_is_that_of_their_documents() -> None:
    model, x = loud("qwen3"), tokens(6, sum(LENGTHS))
    labels = x.masked_fill(positions(6) == 0, -100)
    packed = measure(model, x, labels, positions(6), precision="fp32", batch_size=4)
    parts = [measure(model, part, part, precision="fp32") for part in x.split(LENGTHS, 1) if part.shape[1] > 1]
    assert packed.num_tokens == sum(part.num_tokens for part in parts)
    assert packed.nll == pytest.approx(sum(part.nll for part in parts), rel=1e-5)
    assert measure(model, x, labels, precision="fp32").nll != pytest.approx(packed.nll, rel=1e-2)


class _Deaf(torch.nn.Module):
    """An architecture whose code takes positions and does nothing with them."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids: Tensor, use_cache: bool, position_ids: Tensor | None = None) -> Any:
        return self.inner(input_ids=input_ids, use_cache=use_cache)


def test_an_architecture_that_is_only_described_is_tried() -> None:
    model = loud("llama")
    require_apart(model)
    with pytest.raises(BadInput, match="do not keep the documents") as caught:
        require_apart(_Deaf(model))
    assert "data.attend_across_documents: true" in str(caught.value.hint)
    described = LLAMA.model_copy(update={"name": "own", "model_types": ()})
    assert is_proven(model.config, require_family(model.config, where="test"))
    assert not is_proven(model.config, described)


def test_every_family_says_how() -> None:
    found = {family.name: way for family in FAMILIES if (way := family.documents) != "positions"}
    assert found == {"opt": "mask", "bloom": "none", "falcon": "mask"}
    llama = family_of({"model_type": "llama"})
    assert llama is not None
    assert way_of({"model_type": "llama"}, llama) == "positions"
    assert len(find_ffns(tiny("llama"))) == 3


def test_the_cost_is_measured_in_pairs() -> None:
    sizes = {"vocab_size": 96, "max_position_embeddings": 256}
    said = document_mask_cost.measure(seq_len=64, sequences=2, document=10, pairs=3, sizes=sizes)
    assert said["documents"] > 4  # type: ignore[operator]
    for clock in ("cpu", "wall"):
        low, middle, high = (said[f"{clock}_ratio{end}"] for end in ("_20", "", "_80"))
        assert 0 < low <= middle <= high  # type: ignore[operator]
