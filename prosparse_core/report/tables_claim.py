"""What a comparison says of the paper's claim: both arms at the same sparsity, in words and as a table, and what the
words cannot carry."""

from __future__ import annotations

from collections.abc import Iterable

from prosparse_core.report.courses import course_order
from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import MINUS, SPACE, count, is_number, number, pct, plain
from prosparse_core.report.grid import Cell, Column, Grid
from prosparse_core.report.names import factor, name_of, seeds

CLAIM = "prosparse_star"
"""The setting the paper's claim is about: progressive factors, before threshold shifting."""
SHIFTED = "prosparse"
"""The same with thresholds."""
FIXED = ("fixed_l1", "fixed_l1_fatrelu")
"""The other arm, before thresholds and with them."""
_NO_DIFFERENCE = "the perplexities do not allow a comparison"


def matched(data: ReportData) -> Grid:
    """Both arms at the same sparsity, tokens and seed: where one was measured, the other is read between its points."""
    columns = [Column("Setting", is_number=False), Column("At the sparsity of", is_number=False), Column("Sparsity")]
    columns += [Column("Setting", group="Perplexity"), Column("Fixed factor", group="Perplexity")]
    columns += [Column("Mean", group="Difference"), Column(f"95{SPACE}% interval", group="Difference")]
    columns += [Column("Pairs", "seeds"), Column("Between the factors")]
    grid = Grid("At the same sparsity as a fixed factor", columns)
    for row in sorted(data["matched"], key=_order):
        line = [Cell(name_of(row["setting"])), Cell(_point(row)), Cell(pct(row["sparsity"], 2))]
        if row["reason"] or not is_number(row["difference_pct"]):
            absent = grid.missing(row["reason"] or _NO_DIFFERENCE)
            own = Cell(number(row["perplexity"])) if is_number(row["perplexity"]) else absent
            fixed = Cell(number(row["fixed_perplexity"])) if is_number(row["fixed_perplexity"]) else absent
            grid.rows.append([*line, own, fixed, absent, absent, Cell("0"), absent])
            continue
        line += [Cell(number(row["perplexity"])), Cell(number(row["fixed_perplexity"]))]
        line += [Cell(signed(row["difference_pct"]))]
        is_known = is_number(row["difference_low_pct"])
        line.append(Cell(_interval(row)) if is_known else grid.missing(row["no_interval"] or _NO_DIFFERENCE))
        between = [plain(row["l1_below"]), plain(row["l1_above"])]
        line += [Cell(str(row["num_pairs"]), seeds(row["seeds"])), Cell(" and ".join(dict.fromkeys(between)))]
        grid.rows.append(line)
    return grid


def _order(row: Record) -> tuple[object, ...]:
    return (*course_order({"setting": row["setting"]}, None), row["measured"] == "fixed", row["l1"] or 0.0,
            row["variant"])  # fmt: skip


def _point(row: Record) -> str:
    arm = "Fixed L1" if row["measured"] == "fixed" else name_of(row["setting"])
    return f"{arm} {factor(row['l1'])}".strip()


def signed(value: float) -> str:
    """``−1.2 %``."""
    return f"{value:+.1f}{SPACE}%".replace("-", MINUS)


def _interval(row: Record) -> str:
    return f"{signed(row['difference_low_pct'])} to {signed(row['difference_high_pct'])}"


def verdict(data: ReportData) -> str:
    """What progressive factors cost beside fixed ones in this run, whichever way the numbers fall, and how far the run
    reaches: never what the paper found of billions of tokens."""
    asked = "whether at matched sparsity progressive regularization has a lower perplexity than a fixed factor"
    rows = sorted((r for r in data["matched"] if r["setting"] in (CLAIM, SHIFTED)), key=_order)
    there = [r for r in rows if is_number(r["difference_pct"])]
    if not there:
        why = next((r["reason"] for r in rows if r["reason"]), None)
        why = why or (_NO_DIFFERENCE if rows else f"{name_of(CLAIM)} was not measured in it")
        return f"This run cannot tell {asked}: {why}."
    said = []
    for setting in (CLAIM, SHIFTED):
        told = [_told(r) for r in there if r["setting"] == setting]
        if told:
            said.append(
                f"Against a fixed factor at the same sparsity, the perplexity of {name_of(setting)} is {_and(told)}."
            )
    return " ".join([f"In {_transient(data)}: {said[0][0].lower()}{said[0][1:]}", *said[1:], _judged(there)])


def _told(row: Record) -> str:
    pairs = f"{row['num_pairs']} pair{'' if row['num_pairs'] == 1 else 's'} of seeds"
    known = f"95{SPACE}% interval {_interval(row)}, {pairs}" if is_number(row["difference_low_pct"]) else (
        f"no interval: {pairs}"
    )  # fmt: skip
    return f"{signed(row['difference_pct'])} at {pct(row['sparsity'], 1)} ({known})"


def _judged(rows: list[Record]) -> str:
    """One sentence for all the points: the intervals decide, and points without one decide nothing."""
    known = [r for r in rows if is_number(r["difference_low_pct"])]
    lower = sum(r["difference_high_pct"] < 0 for r in known)
    higher = sum(r["difference_low_pct"] > 0 for r in known)
    if not known:
        return "Without two pairs of seeds this decides nothing."
    of = f"of {len(known)} intervals" if len(known) > 1 else "of one interval"
    parts = [f"{lower} lie{'s' if lower == 1 else ''} below 0"] if lower else []
    parts += [f"{higher} lie{'s' if higher == 1 else ''} above 0"] if higher else []
    parts += [f"{len(known) - lower - higher} hold{'s' if len(known) - lower - higher == 1 else ''} it"] if (
        len(known) > lower + higher
    ) else []  # fmt: skip
    return f"{of.capitalize()} {_and(parts)}; that is a statement about trainings of this length alone."


def _transient(data: ReportData) -> str:
    """``a 120-step transient (80 regularized steps, 122,880 tokens)``."""
    rows = [r for r in data["comparison"] if r["setting"] in (CLAIM, SHIFTED, *FIXED)]
    steps = {r["num_steps"] for r in rows if r["num_steps"]}
    regularized = {round(r["regularized_steps"]) for r in rows if r["regularized_steps"]}
    tokens = {r["tokens_seen"] for r in rows if r["tokens_seen"]}
    if not steps or not regularized:
        return f"trainings of {_or(tokens)} tokens"
    article = "an" if str(min(steps)).startswith("8") or min(steps) in (11, 18) else "a"
    return f"{article} {_or(steps)}-step transient ({_or(regularized)} regularized steps, {_or(tokens)} tokens)"


def caveats(data: ReportData) -> list[str]:
    """How the arms differ by more than the course of lambda, and what the interval does not hold, from this run."""
    arms = {
        arm: [r for r in data["comparison"] if r["setting"] == arm and is_number(r["l1"])] for arm in (CLAIM, FIXED[0])
    }
    said = []
    if all(arms.values()):
        lasts = [sorted({r["l1"] for r in rows}) for rows in arms.values()]
        own, fixed = (_and([plain(l1) for l1 in last]) for last in lasts)
        same = lasts[0] == lasts[1]
        said.append(f"Both arms end at λ {own}." if same else f"The arms end at different λ: {own} against {fixed}.")
        courses = [[r for r in rows if is_number(r["lr_left"])] for rows in arms.values()]
        if all(courses):
            left = [_range(r["lr_left"] for r in rows) for rows in courses]
            steps = [_or({round(r["steps_at_last_l1"]) for r in rows}) for rows in courses]
            said.append(
                f"When λ reaches its last value, {left[0]} of the learning rate, summed over the regularized steps, is "
                f"left to the progressive stages ({steps[0]} steps), {left[1]} to a fixed factor ({steps[1]} steps)."
            )
    there = {r["setting"] for r in data["comparison"]}
    if CLAIM in there and (SHIFTED in there) != (FIXED[1] in there):
        said.append("Thresholds were calibrated for one arm only.")
    if _share_stage_0(data):
        said.append("Seeds share stage 0: what they repeat is only what comes after it.")
    said.append(
        "All settings read the same held-out text; how far other text would move a difference is in no interval."
    )
    return said


def _share_stage_0(data: ReportData) -> bool:
    seeds_of: dict[str, set[object]] = {}
    inputs: dict[str, list[str]] = {}
    for edge in data["lineage"]:
        if edge["role"] == "before":
            inputs.setdefault(edge["artifact"], []).append(edge["input"])
    for row in data["checkpoints"]:
        todo, seen = [str(row["checkpoint"])], set[str]()
        while todo:
            artifact = todo.pop()
            if artifact in inputs and artifact not in seen:  # a stage of training: others go on from nothing
                seen.add(artifact)
                seeds_of.setdefault(artifact, set()).add(row["seed"])
                todo += inputs[artifact]
    return any(len(found) > 1 for found in seeds_of.values())


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    ends = dict.fromkeys((pct(found[0], 1), pct(found[-1], 1)))
    return " to ".join(ends)


def _or(values: Iterable[int]) -> str:
    return " or ".join(count(v) for v in sorted(values)) or "an unknown number of"


def _and(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
