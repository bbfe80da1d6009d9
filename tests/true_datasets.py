"""A mirror with the true layout and schema of every dataset that a shipped recipe names; its rows are made up here.

Where each is from, as of November 2026:

- ``bigcode/starcoderdata``: its card (``data_dir="python"``; "GitHub issues, GitHub commits and Jupyter
  notebooks subsets have different columns from the rest so loading the entire dataset at once may fail") and file tree:
  a folder of ``train-*-of-*.parquet`` for each of 86 languages and for the four odd ones; no ``configs:``.
- ``wikimedia/wikipedia``: its card, whose ``configs:`` names ``20231101.en/train-*`` and whose ``dataset_info:`` has
  id, url, title, text.
- ``monology/pile-uncopyrighted``: its file tree (``train/00.jsonl.zst`` to ``29``, ``val`` and ``test`` beside it) and
  the rows of the Pile: text, and meta with pile_set_name.
- ``openbmb/UltraChat``: its card ("Each line in the downloaded data file is a json dict containing the data id and
  dialogue data in a list format") and file tree: ``train_0.jsonl`` to ``train_9``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
WORDS = [
    a + b + c for a in ("", "ba", "ko", "mi", "tu") for b in ("la", "re", "so", "ni") for c in ("", "n", "rk", "ste")
]
LANGUAGES = ("c", "c-sharp", "cpp", "go", "java", "javascript", "php", "python", "ruby", "rust", "shell", "typescript")
NUM_ROWS = 480


def write_mirror(folder: Path) -> Path:
    """Every dataset of :data:`DATASETS` under its name."""
    for name, write in DATASETS.items():
        write(folder / name, random.Random(name))
    return folder


def write_parquet(path: Path, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_jsonl(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_lines(rows))


def write_zstd(path: Path, rows: Rows, frames: int = 2) -> None:
    """As zstd tools write large files: in several frames, which readers must go through."""
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as handle:
        for i in range(frames):
            buffer = pyarrow.BufferOutputStream()
            with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
                stream.write(_lines(rows[len(rows) * i // frames : len(rows) * (i + 1) // frames]))
            handle.write(buffer.getvalue().to_pybytes())


def _lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def said(rng: random.Random, words: int) -> str:
    """Words with the odd character that a small vocabulary does not have."""
    return " ".join(rng.choice(WORDS) for _ in range(words)) + rng.choice([".", "?", " ü.", " 好。", "\n\t- x"])


def _starcoderdata(folder: Path, rng: random.Random) -> None:
    for language in LANGUAGES:
        rows = [
            {
                "max_stars_repo_path": f"src/{i}.{language}",
                "max_stars_repo_name": f"someone/{language}",
                "max_stars_count": rng.randrange(100),
                "id": str(i),
                "content": f"<reponame>someone/{language}\n" + said(rng, 60),
            }
            for i in range(NUM_ROWS // len(LANGUAGES))
        ]
        for part in range(2):
            write_parquet(folder / language / f"train-{part:05d}-of-00002.parquet", rows[part::2])
    commit = {
        "commit": "0", "old_file": "a.py", "new_file": "a.py", "old_contents": "", "new_contents": "x = 1\n",
        "subject": "Add x", "message": "Add x\n", "lang": "Python", "license": "mit", "repos": "someone/python",
    }  # fmt: skip
    for odd, row in {
        "git-commits-cleaned": commit,
        "github-issues-filtered-structured": {"repo": "someone/go", "issue_id": "1", "content": "<issue_start>"},
        "jupyter-scripts-dedup-filtered": {"content": "# %%\nx = 1\n", "path": "a.ipynb", "repo_name": "someone/a"},
        "jupyter-structured-clean-dedup": {"structured_content": "<jupyter_start>", "path": "a.ipynb"},
    }.items():
        write_parquet(folder / odd / "train-00000-of-00001.parquet", [row])


def _wikipedia(folder: Path, rng: random.Random) -> None:
    lines = ["---", "configs:"]
    for config in ("20231101.de", "20231101.en"):
        lines += [f"- config_name: {config}", "  data_files:", "  - split: train", f"    path: {config}/train-*"]
        rows = [
            {"id": str(i), "url": f"https://en.wikipedia.org/wiki/{i}", "title": f"{config} {i}", "text": said(rng, 60)}
            for i in range(NUM_ROWS if config.endswith("en") else 2)
        ]
        for part in range(2):
            write_parquet(folder / config / f"train-{part:05d}-of-00002.parquet", rows[part::2])
    lines.append("dataset_info:")
    for config in ("20231101.de", "20231101.en"):
        lines += [f"- config_name: {config}", "  features:"]
        lines += [f"  - name: {name}\n    dtype: string" for name in ("id", "url", "title", "text")]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# Wikipedia", ""]), encoding="utf-8")


def _pile(folder: Path, rng: random.Random) -> None:
    rows: Rows = [{"text": said(rng, 60), "meta": {"pile_set_name": "Pile-CC"}} for _ in range(NUM_ROWS)]
    for part in range(2):
        write_zstd(folder / "train" / f"{part:02d}.jsonl.zst", rows[part::2])
    for split in ("val", "test"):
        write_zstd(folder / f"{split}.jsonl.zst", [{"text": f"{split} only", "meta": {"pile_set_name": "Pile-CC"}}])
    (folder / "README.md").write_text("---\nlicense: other\n---\n# Pile Uncopyrighted\n", encoding="utf-8")


def _ultrachat(folder: Path, rng: random.Random) -> None:
    rows = [{"id": str(i), "data": [said(rng, 12) for _ in range(2 * rng.randrange(1, 4))]} for i in range(NUM_ROWS)]
    for part in range(2):
        write_jsonl(folder / f"train_{part}.jsonl", rows[part::2])
    (folder / "README.md").write_text("---\nlicense: mit\npretty_name: UltraChat\n---\n", encoding="utf-8")


DATASETS: dict[str, Callable[[Path, random.Random], None]] = {
    "bigcode/starcoderdata": _starcoderdata,
    "wikimedia/wikipedia": _wikipedia,
    "monology/pile-uncopyrighted": _pile,
    "openbmb/UltraChat": _ultrachat,
}
