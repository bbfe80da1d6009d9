"""The step as a whole, against plain torch on the same windows; what it writes down; that it repeats to the bit."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prosparse_core.data.packing import Encoder
from prosparse_core.errors import BadInput
from prosparse_core.store import Artifact, write_json
from prosparse_core.substitute import use_relu
from prosparse_core.variants import THRESHOLDS, Variant
from tasks.evaluate import evaluate
from tasks.evaluation.evaluation import Evaluation
from tasks.evaluation.measure_held_out import measure_loaded
from tasks.step import Run
from tests.tasks.held_out_files import CONTEXT, PROMPTS, QUESTIONS, TEXTS, WINDOW, make_model, write_held_out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_held_out(tmp_path_factory.mktemp("held-out"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    model, tokenizer = make_model(tmp_path_factory.mktemp("tiny"))
    use_relu(model)
    return model, tokenizer


@pytest.fixture(scope="module")
def found(tiny: tuple[Any, Any], folder: Path) -> Evaluation:
    return measure_loaded(*tiny, folder, precision="fp32", batch_size=4)


def nll(model: Any, context: list[int], continuation: list[int]) -> tuple[float, list[torch.Tensor], int]:
    """(nats, x1 of the first layer per forward pass, number of inputs): one window after the other, no batches."""
    total, inputs, seen = 0.0, 0, []
    whole, start = context + continuation, len(context)
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0][0].clone()))
    end = max(WINDOW + 1, start + WINDOW // 2)
    while start < len(whole):
        end = min(end, len(whole))
        ids = torch.tensor(whole[max(0, end - 1 - WINDOW) : end])
        with torch.no_grad():
            logits = model(input_ids=ids[None, :-1]).logits[0].double()
        count = end - start
        total += float(torch.nn.functional.cross_entropy(logits[-count:], ids[-count:], reduction="sum"))
        inputs += len(ids) - 1
        start, end = end, end + WINDOW
    handle.remove()
    return total, seen, inputs


def twin(model: Any, tokenizer: Any, corpus: str) -> tuple[float, int, torch.Tensor, int]:
    """(nats, tokens, x1 of the first layer, inputs) of a corpus."""
    separator = [tokenizer.eos_token_id]
    if corpus in TEXTS:
        pairs = [(separator, tokenizer(text)["input_ids"]) for text in TEXTS[corpus]]
    else:
        before, between, _ = Encoder(tokenizer).chat_format()
        heads = [(tokenizer(f"{before}{p}{between}")["input_ids"], text) for p, text in PROMPTS[corpus]]
        assert all(head[0] == tokenizer.bos_token_id for head, _ in heads), "what its chat template begins with"
        pairs = [(head, tokenizer(text)["input_ids"]) for head, text in heads]
    parts = [nll(model, context, continuation) for context, continuation in pairs]
    x1 = torch.cat([x for _, seen, _ in parts for x in seen])
    return sum(p[0] for p in parts), sum(len(c) for _, c in pairs), x1, sum(p[2] for p in parts)


@pytest.mark.parametrize("corpus", ["code", "docs", "chat"])
def test_perplexity_and_sparsity_equal_plain_torch(tiny: tuple[Any, Any], found: Evaluation, corpus: str) -> None:
    nats, num_tokens, x1_TF, num_inputs = twin(*tiny, corpus)
    score = next(s for s in found.scores if s.corpus == corpus and s.metric == "token_perplexity")
    assert score.n == num_tokens
    assert found.perplexity[corpus] == score.value == pytest.approx(math.exp(nats / num_tokens), rel=1e-5)
    texts = TEXTS.get(corpus) or [answer for _, answer in PROMPTS[corpus]]
    num_bytes = sum(len(text.encode()) for text in texts)
    num_words = sum(len(text.split()) for text in texts)
    by_metric = {s.metric: s.value for s in found.scores if s.corpus == corpus}
    assert by_metric["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert by_metric["byte_perplexity"] == pytest.approx(math.exp(nats / num_bytes), rel=1e-5)
    assert by_metric["word_perplexity"] == pytest.approx(math.exp(nats / num_words), rel=1e-4)
    first = found.layers[corpus][0]
    assert first.num_tokens == num_inputs == len(x1_TF)
    assert first.sparsity == pytest.approx(float((x1_TF == 0).double().mean()), abs=1e-4)
    assert first.dead_frac == pytest.approx(float((x1_TF == 0).all(dim=0).double().mean()), abs=0.021)
    assert first.mean_abs_x1 == pytest.approx(float(x1_TF.abs().double().mean()), rel=1e-4)
    assert found.sparsity[corpus] == pytest.approx(sum(s.sparsity for s in found.layers[corpus]) / 2)
    assert 0.2 < found.sparsity[corpus] < 0.8, "ReLU of a random net"


def test_only_the_turns_of_the_assistant_are_scored(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    """Token by token in plain torch, with the labels found by re-rendering each beginning of the conversation."""
    model, tokenizer = tiny
    said = [("user", "What is `x`?"), ("assistant", "x = 1"), ("user", "And y?"), ("assistant", "y = 2 * x\n" * 20)]
    talks = [said, [("system", "Be brief."), *said[:2]], [("user", "Go on."), ("assistant", "No.")]]
    rows = [
        {
            "id": str(i),
            "file": "x",
            "text": "\n".join(text.strip() for role, text in talk if role == "assistant"),
            "messages": [{"role": role, "content": text.strip()} for role, text in talk],
        }
        for i, talk in enumerate(talks)
    ]
    folder = write_held_out(tmp_path, choices=False)
    (folder / "evaluation" / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["corpora"].append({"name": "talk"})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    nats, num_tokens, num_inputs = 0.0, 0, 0
    for row in rows:
        turns = row["messages"]
        labels, tokens = [], []
        for i, turn in enumerate(turns):
            before, after = (n and tokenizer.apply_chat_template(turns[:n], tokenize=False) for n in (i, i + 1))
            before = before or ""
            part = tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"]
            head = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
            end = part.index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
            labels += [turn["role"] == "assistant" and len(head) <= k <= end for k in range(len(part))]
            tokens += part
        assert tokens == tokenizer(after, add_special_tokens=False)["input_ids"]
        at = 1  # the first token is what the template begins with: nothing before it
        while at < len(tokens):
            stop = min(len(tokens), at + WINDOW)
            ids = torch.tensor(tokens[max(0, stop - 1 - WINDOW) : stop])
            with torch.no_grad():
                logits = model(input_ids=ids[None, :-1]).logits[0].double()[at - stop :]
            loss = torch.nn.functional.cross_entropy(logits, ids[at - stop :], reduction="none")
            nats += float(loss[torch.tensor(labels[at:stop])].sum())
            num_inputs += len(ids) - 1
            at = stop
        num_tokens += sum(labels)
    found = measure_loaded(model, tokenizer, folder, corpora=["talk"], precision="fp32", batch_size=2)
    score = next(s for s in found.scores if s.metric == "token_perplexity")
    assert score.n == num_tokens
    assert score.value == pytest.approx(math.exp(nats / num_tokens), rel=1e-5)
    assert "assistant's turns only" in str(score.note)
    words = next(s for s in found.scores if s.metric == "word_perplexity")
    assert words.n == sum(len(row["text"].split()) for row in rows)
    assert found.layers["talk"][0].num_tokens == num_inputs


def test_accuracy_equals_plain_torch(tiny: tuple[Any, Any], found: Evaluation) -> None:
    model, tokenizer = tiny
    right = right_norm = 0
    for question, choices, answer in QUESTIONS:
        head = tokenizer(question.rstrip())["input_ids"]
        lls = []
        for choice in choices:
            whole = tokenizer(question + choice)["input_ids"]
            assert whole[: len(head)] == head
            lls.append(-nll(model, [tokenizer.eos_token_id, *head], whole[len(head) :])[0])
        right += lls.index(max(lls)) == answer
        norms = [ll / len(choice) for ll, choice in zip(lls, choices, strict=True)]
        right_norm += norms.index(max(norms)) == answer
    acc, norm = (next(s for s in found.scores if s.metric == m) for m in ("acc", "acc_norm"))
    assert (acc.value, norm.value) == (pytest.approx(right / 3), pytest.approx(right_norm / 3))
    assert acc.stderr == pytest.approx(math.sqrt(right / 3 * (1 - right / 3) / 2))
    assert (acc.task, acc.n, acc.headline, acc.higher_is_better) == ("code-choices", 3, True, True)
    assert found.accuracy == {"code-choices": acc.value}
    assert "code-choices" not in found.sparsity


def test_batch_size_moves_nothing_but_the_last_digits(tiny: tuple[Any, Any], folder: Path, found: Evaluation) -> None:
    alone = measure_loaded(*tiny, folder, precision="fp32", batch_size=1)
    for one, four in zip(alone.scores, found.scores, strict=True):
        assert one.value == pytest.approx(four.value, rel=1e-5)
        assert one.n == four.n
    for corpus, layers in alone.layers.items():
        for one_layer, four_layer in zip(layers, found.layers[corpus], strict=True):
            assert one_layer.num_tokens == four_layer.num_tokens
            assert one_layer.sparsity == pytest.approx(four_layer.sparsity, abs=1e-4)


def test_twice_the_same_and_bf16_is_another_condition(tiny: tuple[Any, Any], folder: Path, found: Evaluation) -> None:
    again = measure_loaded(*tiny, folder, precision="fp32", batch_size=4)
    assert (again.scores, again.layers, again.raw) == (found.scores, found.layers, found.raw)
    half = measure_loaded(*tiny, folder, precision="bf16", batch_size=4)
    assert half.conditions["precision"] == "bf16"
    assert half.perplexity["code"] != found.perplexity["code"]
    assert half.perplexity["code"] == pytest.approx(found.perplexity["code"], rel=0.2)


def test_conditions_and_notes(found: Evaluation) -> None:
    assert found.conditions == {
        "precision": "fp32",
        "batch_size": 4,
        "max_length": WINDOW,
        "prefix": "<|im_end|>",
        "limit": None,
        "harness_version": importlib.metadata.version("lm_eval"),
    }
    notes = {s.corpus: s.note for s in found.scores if s.metric == "token_perplexity"}
    assert notes["code"] == (
        "stderr by the delta method over 3 documents; prefix <|im_end|> (between documents, in training as here), "
        "windows of 64 tokens"
    )
    assert notes["chat"] == notes["code"] + "; loss on the answers only"


def test_a_limit_marks_what_it_cuts(tiny: tuple[Any, Any], folder: Path) -> None:
    found = measure_loaded(*tiny, folder, corpora=["docs", "code"], precision="fp32", batch_size=4, limit=2)
    partial = {s.corpus or s.task: s.partial for s in found.scores}
    assert partial == {"docs": False, "code": True, "code-choices": True}
    one = measure_loaded(*tiny, folder, precision="fp32", batch_size=4, limit=1)
    assert {s.stderr for s in one.scores} == {None}
    with pytest.raises(BadInput, match="limit=0"):
        measure_loaded(*tiny, folder, precision="fp32", batch_size=4, limit=0)


def test_max_length_rolls_without_losing_a_token(tiny: tuple[Any, Any], folder: Path, found: Evaluation) -> None:
    short = measure_loaded(*tiny, folder, choice=False, precision="fp32", batch_size=4, max_length=16)
    longer, longest = (
        measure_loaded(*tiny, folder, choice=False, precision="fp32", batch_size=4, max_length=length)
        for length in (CONTEXT, 10_000)
    )
    assert [s.n for s in short.scores] == [s.n for s in found.scores if s.corpus]
    assert short.perplexity["code"] != pytest.approx(found.perplexity["code"], rel=1e-3)
    assert longer.perplexity != found.perplexity
    assert longest.perplexity == longer.perplexity, "never beyond the model's context"
    assert not short.accuracy, "nobody asked for the questions"


def test_without_questions_the_row_says_so(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    found = measure_loaded(*tiny, write_held_out(tmp_path, choices=False), precision="fp32", batch_size=4)
    acc = found.scores[-1]
    assert (acc.metric, acc.value, acc.note) == ("acc", None, "the held-out data has no multiple-choice questions")
    assert found.accuracy == {"code-choices": None}


def test_a_corpus_must_not_mix_documents_with_and_without_prompt(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    path = write_held_out(tmp_path) / "evaluation" / "chat.jsonl"
    path.write_text(path.read_text() + '{"id": 9, "text": "x"}\n')
    with pytest.raises(BadInput, match="'chat' mixes"):
        measure_loaded(*tiny, tmp_path, precision="fp32", batch_size=4)


def rows(artifact: Artifact, table: str) -> list[dict[str, Any]]:
    lines = (artifact.path / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    return [fact for fact in map(json.loads, lines) if fact.pop("table") == table]


def with_thresholds(home: Path, values: Sequence[float]) -> Artifact:
    home.mkdir()
    write_json(home / THRESHOLDS, {"per_layer": list(values)})
    return Artifact("calibrate", "calibrate", "f" * 64, "d" * 64, home)


def test_the_step_writes_every_fact_with_its_conditions(base: Any, tmp_path: Path) -> None:
    run, seen = base.run(evaluate={"batch_size": 3, "limit": 2})
    corpora = Artifact("mixture", "mixture", "0" * 64, "1" * 64, write_held_out(tmp_path / "m", choices=False))
    variant = Variant("prosparse", base.dense, "fatrelu", with_thresholds(tmp_path / "t", [0.0, 0.1, 0.2]), 64)
    artifact = evaluate(run, variant, corpora)
    assert artifact.label == "evaluate · prosparse"
    assert [r["variant"] for r in rows(artifact, "variants")] == [variant.id]
    scores = [r for r in rows(artifact, "evaluations") if r["metric"] == "token_perplexity"]
    assert [r["corpus"] for r in scores] == ["code", "docs", "chat"]
    assert [r["limit"] for r in scores] == [2, None, 2], "docs has two documents: nothing was cut"
    for row in scores:
        known = {k: row[k] for k in ("task", "batch_size", "dtype", "num_fewshot", "higher_is_better")}
        assert known == {
            "task": None,
            "batch_size": 3,
            "dtype": "fp32",
            "num_fewshot": 0,
            "higher_is_better": False,
        }
        assert row["harness_version"] == importlib.metadata.version("lm_eval")
        assert row["stderr"] > 0
        assert row["n"] > 10
    missing = rows(artifact, "evaluations")[-1]
    assert (missing["task"], missing["value"]) == ("code-choices", None)
    layers = rows(artifact, "sparsity")
    assert [(r["corpus"], r["layer"], r["threshold"]) for r in layers] == [
        (corpus, layer, threshold)
        for corpus in ("code", "docs", "chat")
        for layer, threshold in enumerate([0.0, 0.1, 0.2])
    ]
    meta = artifact.meta()
    assert meta["perplexity"] == {r["corpus"]: r["value"] for r in scores}
    assert meta["sparsity"]["code"] == pytest.approx(sum(r["sparsity"] for r in layers[:3]) / 3)
    assert (meta["max_length"], meta["precision"], meta["prefix"]) == (64, "fp32", "<|im_end|>")
    shares = [done / total for done, total, _ in seen.updates]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert {fields["task"] for _, _, fields in seen.updates} == {"code", "docs", "chat"}
    assert evaluate(run, variant, corpora).digest == artifact.digest
    assert [outcome for _, _, outcome in run.history[-2:]] == ["done", "cached"]


def test_the_ledger_takes_every_fact(base: Any, tmp_path: Path) -> None:
    from prosparse_core.ledger import Ledger

    ledger = Ledger(tmp_path)
    recipe = base.run()[0].recipe
    ledger.start_run(
        run_id="r", flow="prosparse", recipe="test", recipe_yaml="", overrides=[], model="tiny", provenance={}
    )
    run = Run(recipe, base.home, "r", ledger, base.run()[1], force=frozenset({"evaluate"}))
    artifact = evaluate(run, Variant("original", base.dense, "original"), base.corpora)
    ledger.end_run("r", "done")
    board = ledger.query("SELECT setting, perplexity_by_corpus, sparsity_by_corpus, not_measured FROM leaderboard").rows
    assert len(board) == 1
    setting, perplexity, sparsity, missing = board[0]
    assert (setting, dict(perplexity)) == ("original", artifact.meta()["perplexity"])
    assert dict(sparsity) == pytest.approx(artifact.meta()["sparsity"], abs=1e-12)
    assert missing == ["code-choices: the held-out data has no multiple-choice questions"]


def test_thresholds_raise_sparsity_and_the_dense_model_has_next_to_none(base: Any) -> None:
    run, _ = base.run()
    dense = evaluate(run, Variant("original", base.dense, "original"), base.corpora)
    relu = evaluate(run, Variant("substituted", base.dense, "relu"), base.corpora)
    assert dense.meta()["sparsity"]["code"] < 0.01
    assert relu.meta()["sparsity"]["code"] > 0.3
    assert {r["threshold"] for r in rows(dense, "sparsity")} == {None}
    assert {r["threshold"] for r in rows(relu, "sparsity")} == {0.0}


def test_the_artifact_repeats_to_the_bit_and_names_no_place(base: Any) -> None:
    run, _ = base.run()
    variant = Variant("original", base.dense, "original")
    first = evaluate(run, variant, base.corpora)
    run.force = frozenset({"evaluate"})
    second = evaluate(run, variant, base.corpora)
    assert run.history[-1][2] == "done"
    assert second.digest == first.digest
    text = (second.path / "results.json").read_text(encoding="utf-8")
    assert str(base.home) not in text
    raw = json.loads(text)
    assert set(raw) == {"conditions", "results", "versions", "n-shot", "higher_is_better", "n-samples"}
    code = second.meta()["perplexity"]["code"]
    assert raw["results"]["code"]["token_perplexity,none"] == pytest.approx(code, rel=1e-12)


def test_planning_asks_the_store_only(base: Any) -> None:
    run, _ = base.run(evaluate={"batch_size": 7})
    run.planning = True
    later = Artifact("stage", "stage 1", None, None, None)
    assert evaluate(run, Variant("prosparse", later, "relu"), base.corpora).digest is None
    assert run.history[-1][2] == "would run"


def test_damaged_held_out_files_stop_the_step_before_the_model_is_read(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = Artifact("mixture", "mixture", "0" * 64, "1" * 64, tmp_path)
    monkeypatch.setattr("prosparse_core.variants.load_variant", lambda *a: pytest.fail("the model was read"))
    run, _ = base.run()
    with pytest.raises(BadInput, match="no manifest"):
        evaluate(run, Variant("original", base.dense, "original"), empty)
