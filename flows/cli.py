"""``prosparse``: the verbs. Parsing and exit codes only: 0 done, 1 failed, 2 bad input, 3 environment."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from prosparse_core.errors import ProSparseError

EXAMPLES = """examples:
  prosparse run tiny                     the whole chain in a minute
  prosparse plan smollm2-135m            what would run, what is cached, what it costs
  prosparse run smollm2-135m --set train.lr=2e-4
  prosparse evaluate MODEL --limit 100   the paper's benchmarks for any checkpoint
  prosparse bench                        how fast the newest model is here, and how fast it could be
  prosparse query "FROM results"
  prosparse up && prefect deployment run prosparse/full --watch
Running the same command again goes on where it stopped. Data lives under $PROSPARSE_HOME (default ./.prosparse).
"""


def build_parser() -> argparse.ArgumentParser:
    """Every verb with its arguments."""
    parser = argparse.ArgumentParser(
        prog="prosparse",
        description="Turn a dense language model into one whose FFN activations are mostly zeros, and measure it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, help_: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help_, description=help_)
        sub.add_argument("--json", action="store_true", help="print JSON for machines instead of tables")
        return sub

    def recipe_verb(name: str, help_: str) -> argparse.ArgumentParser:
        sub = verb(name, help_)
        sub.add_argument("recipe", metavar="RECIPE", help="a recipe's name or the path of a .yaml file")
        sub.add_argument("--set", dest="overrides", metavar="a.b=c", action="append", default=[], help="change a key")
        return sub

    for name, help_ in (
        ("run", "run a recipe; goes on where it stopped"),
        ("compare", "every setting of the paper's tables under equal tokens"),
        ("plan", "what would run, and what it costs"),
    ):
        sub = recipe_verb(name, help_)
        sub.add_argument("--force", metavar="STEP", action="append", default=[], help="run this step again")
        if name == "plan":
            _add_plan(sub)
        else:
            sub.add_argument("--until", metavar="STEP", help="stop after this step")
            sub.add_argument(
                "--inline", action="store_true", help="without Prefect: same steps, same store, same ledger"
            )
    _add_evaluate(verb("evaluate", "measure any checkpoint on benchmarks, without training"))
    _add_bench(verb("bench", "time a checkpoint: kernels on its own masks, predictors, decoding; or a shape alone"))
    recipe_verb("validate", "check a recipe; reports every error at once")
    verb("recipes", "the recipes that come with the product")
    for name, help_ in (
        ("up", "bring up the Prefect server, pool, deployments and worker; safe to repeat"),
        ("down", "stop the worker and the server"),
        ("status", "what is up, and what the last runs came to"),
        ("recover", "mark runs whose process died as crashed, so that they can be retried"),
    ):
        sub = verb(name, help_)
        if name == "up":
            sub.add_argument(
                "--pool", metavar="NAME", help="also register prefect.yaml's deployments for this pool of a cluster"
            )
    doctor = verb("doctor", "check this machine: packages, compiler, server, disk")
    doctor.add_argument("--verify", action="store_true", help="also hash every artifact of the store")
    query = verb("query", "ask the ledger in SQL (DuckDB)")
    query.add_argument(
        "sql", metavar="SQL", nargs="?", help='for example "FROM results"; without it, example questions'
    )
    report = verb("report", "write the report of a run as one HTML file, or the results page of a comparison")
    report.add_argument("run", metavar="RUN", nargs="*", help="a run id (default: the newest finished run)")
    form = report.add_mutually_exclusive_group()
    form.add_argument("--out", metavar="FILE", help="where to write it (default: report.html)")
    form.add_argument(
        "--markdown",
        metavar="DIR",
        nargs="?",
        const="docs",
        help="write DIR/results.md (default: docs) about a comparison, with the curves of other runs named beside it; "
        "of evaluations alone, DIR/benchmarks.md",
    )
    _add_export(verb("export", "write the model of a run in the format of another program"))
    return parser


def _add_plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--compare", action="store_true", help="of `prosparse compare` instead of `prosparse run`")
    sub.add_argument("--gpu", metavar="NAME", help="on which GPU, such as a100-80g (default: the recipe's hardware)")
    sub.add_argument("--gpus", metavar="N", type=_positive, help="GPUs of a node")
    sub.add_argument("--nodes", metavar="N", type=_positive, help="nodes")
    sub.add_argument("--parallel", choices=["ddp", "fsdp"], help="default: ddp where a rank has the memory, else fsdp")
    sub.add_argument("--micro-batch", metavar="N", type=_positive, help="sequences a rank takes at a time")
    sub.add_argument(
        "--gradient-checkpointing",
        action="store_const",
        const=True,
        help="keep the layers' inputs only, and compute the rest again",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _add_export(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", nargs="?", help="a run id (default: the newest finished run)")
    sub.add_argument(
        "--to",
        choices=["hf", "hf-relu", "powerinfer", "vllm"],
        default="hf",
        help="hf: the Hugging Face folder the run made, with its FATReLU code; hf-relu: without code and threshold; "
        "powerinfer: one file for PowerInfer's own binary, with the run's predictors and t = 0; vllm: a folder that "
        "vLLM serves, with one threshold",
    )
    sub.add_argument("--out", metavar="PATH", help="where to (default: ./<recipe>-prosparse, with the format's ending)")
    sub.add_argument("--strict", action="store_true", help="refuse what the format cannot say exactly")
    sub.add_argument("--cutoff", metavar="P", type=float, help="powerinfer: compute a neuron from this probability on")
    sub.add_argument("--dtype", choices=["f16", "q4_0"], default="f16", help="powerinfer: how matrices are stored")


def _add_evaluate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "model", metavar="MODEL", help="a folder, an exported model, a hub id, a variant's id or setting, or a digest"
    )
    sub.add_argument("--tasks", metavar="a,b", help="benchmarks, groups (code, commonsense, reading, paper), lm-eval's")
    sub.add_argument("--datasets", metavar="DIR", help="a folder laid out like the hub (default: the hub)")
    sub.add_argument("--limit", metavar="N", type=int, help="at most N documents a task; rows are marked partial")
    sub.add_argument("--run-code", action="store_true", help="let HumanEval and MBPP execute what the model wrote")
    sub.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")
    sub.add_argument("--recipe", metavar="RECIPE", help="also measure on its held-out corpora (prepares them)")
    sub.add_argument("--batch-size", metavar="N", type=int, help="sequences per forward pass (default: 4)")
    sub.add_argument("--precision", choices=["auto", "fp32", "bf16"], help="default: the recipe's, or auto")
    sub.add_argument("--force", action="store_true", help="measure again though the store has it")
    sub.add_argument("--inline", action="store_true", help="without Prefect: same step, same store, same ledger")


def _add_bench(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a folder, an exported model, a hub id, a variant's id or setting, or a digest (default: the newest run's "
        "prosparse variant)",
    )
    sub.add_argument("--shape", metavar="DxF", help="instead of a model: one layer of random weights, as 4096x11008")
    sub.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of that layer (default: fp32)")
    sub.add_argument(
        "--sparsity",
        metavar="S",
        type=float,
        help="of its random masks; of a model, what thresholds are raised to for timing (default: 0.89)",
    )
    sub.add_argument("--threads", metavar="N", type=int, help="default: the recipe's, or 1")
    sub.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")
    sub.add_argument(
        "--budget", dest="budget_s", metavar="S", type=float, help="seconds (default: the recipe's, or 40)"
    )
    sub.add_argument("--inline", action="store_true", help="without Prefect: same step, same store, same ledger")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    from flows import verbs

    action: Callable[[argparse.Namespace], int] = getattr(verbs, f"verb_{arguments.verb}")
    try:
        return action(arguments)
    except ProSparseError as error:
        verbs.console.print_error(str(error), error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        forced = " (without --force, which would begin anew)" if getattr(arguments, "force", None) else ""
        verbs.console.print_error("interrupted", f"run the same command again{forced}: it goes on where it stopped")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
