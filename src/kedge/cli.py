"""The command: ``kedge train``, ``measure``, ``report``, ``recipes``, ``certify``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kedge import __version__
from kedge.errors import KedgeError, UserError

EXAMPLES = """examples:
  kedge recipes                                     what ships with Kedge
  kedge train prose                                 train by a recipe that ships
  kedge train my.yaml seed=1 stages.grpo.steps=50   your own, with overrides
  kedge train my.yaml resume=true                   go on where it stopped
  kedge report runs/prose                           one self-contained page
  kedge measure tuned base --prompts p.jsonl        how far two models are apart
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0: done, 1: failed, 2: something given cannot be used, 3: above a limit, 130: interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [each for each in rest if "=" in each and not each.startswith("-")]
    if rest != overrides or (rest and not hasattr(options, "overrides")):
        parser.parse_args(arguments)  # says what is wrong
    if rest:  # behind an option, where argparse takes no more of them
        options.overrides += rest
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"kedge: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KedgeError as error:
        print(f"kedge: {error}", file=sys.stderr)  # noqa: T201
        return 130 if type(error).__name__ == "Interrupted" else 1
    except KeyboardInterrupt:
        print(f"kedge: stopped at once{options.stopped}", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        _print_nowhere()
        return 0


@contextmanager
def _read_or_not() -> Iterator[None]:
    """Print what is done: a reader who leaves before its end, as ``| head`` does, changes nothing of its status."""
    try:
        yield
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # rich makes the one into the other
        _print_nowhere()


def _print_nowhere() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kedge",
        description="Train language models by reinforcement learning on an exact KL anchor.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(stopped="")  # what else to say at Ctrl-C
    parser.add_argument("--version", action="version", version=f"kedge {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train by a recipe", description="Train by a recipe.")
    train.add_argument("recipe", help="a YAML file, or the name of a recipe that ships (see `kedge recipes`)")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. seed=1, stages.grpo.steps=50")
    train.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe with derived sizes; run nothing"
    )
    train.set_defaults(run=_train, stopped="; resume=true goes on from the last checkpoint")

    _add_measure(commands)

    report = commands.add_parser(
        "report", help="write one page about runs", description="Write one self-contained page."
    )
    report.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run directory, a folder of stages, or what `kedge measure` wrote",
    )
    report.add_argument(
        "--out", help="the page; report.html in the run, or in the folder of several, when left out"
    )
    report.set_defaults(run=_report)

    recipes = commands.add_parser(
        "recipes", help="recipes that ship with Kedge", description="List, show or copy recipes."
    )
    recipes.add_argument("action", nargs="?", choices=["show", "copy", "keys"], help="left out: list them")
    recipes.add_argument("name", nargs="?", help="which one")
    recipes.set_defaults(run=_recipes)

    _add_certify(commands)
    return parser


def _add_certify(commands: Any) -> None:
    certify = commands.add_parser(
        "certify",
        help="prove every KL value and gradient on this installation",
        description="Compare every value and expected gradient of the objective with enumeration; with --judge, "
        "where each objective ends with the optimum; with --head, the head in float32 and bfloat16 with float64.",
    )
    certify.add_argument("--device", default="cpu", help="a PyTorch device (default cpu)")
    certify.add_argument(
        "--dtype",
        choices=["float64", "float32", "bfloat16"],
        help="default float64; with --head: float32 and bfloat16, one after the other",
    )
    certify.add_argument(
        "--head",
        action="store_true",
        help="the head's errors against float64 at real vocabulary sizes instead",
    )
    certify.add_argument(
        "--judge",
        action="store_true",
        help="follow each objective to where it ends, beside the closed-form optimum, instead (minutes)",
    )
    certify.add_argument(
        "--sampled",
        action="store_true",
        help="with --judge: follow each with drawn responses, too (more minutes)",
    )
    certify.add_argument(
        "--backend",
        nargs="+",
        metavar="NAME",
        help="with --head: which ways of the head; its default if left out",
    )
    certify.set_defaults(run=_certify)


def _add_measure(commands: Any) -> None:
    measure = commands.add_parser(
        "measure",
        help="how far two models are apart",
        description="Exact KL between two models, on responses sampled from each and on given texts, with error bars. "
        "Writes measure.json, tokens.parquet and measure.html.",
        argument_default=argparse.SUPPRESS,  # what was not given is not there: what was, must act
    )
    add = measure.add_argument
    add("policy", metavar="POLICY", help="a folder, a name on the hub, or a folder with a PEFT adapter")
    add("reference", metavar="REFERENCE", help="the same; its tokenizer and chat template are used for both")
    add(
        "--prompts", metavar="FILE", help="JSONL, Parquet or a dataset: prompts that responses are sampled to"
    )
    add(
        "--texts",
        metavar="FILE",
        help="the same with texts, messages, or prompts and completions to be scored",
    )
    add("--responses", type=int, metavar="N", help="responses to each prompt (default 4)")
    add("--from", dest="sample_from", choices=["policy", "reference", "both"],
        help="whose responses: reverse KL, forward KL, both (default)")  # fmt: skip
    add("--max-new-tokens", type=int, metavar="N", help="of a response (default 128)")
    add("--temperature", type=float, help="of sampling and of both distributions (default 1)")
    add("--split", metavar="NAME", help="of a dataset that has several")
    add("--count", type=int, metavar="N", help="only the first N prompts and texts")
    add("--prompt-format", dest="prompt", metavar="F", help="columns in braces (default {prompt})")
    add("--text-column", dest="text", metavar="NAME", help="column of a text (default text)")
    add("--window", type=int, metavar="N",
        help="tokens of a text at once, longer ones in overlapping windows (default 2048 or the context)")  # fmt: skip
    add("--dtype", choices=["float32", "bfloat16", "float64", "saved"],
        help="of weights and hidden states; saved: as the files have it (default float32)")  # fmt: skip
    add("--device", help="a PyTorch device (default auto: CUDA where there is one)")
    add("--seed", type=int, help="of sampling and of the bootstrap (default 0)")
    add("--batch", type=int, metavar="N", help="sequences at once (default 16)")
    add(
        "--low-memory",
        action="store_true",
        help="one model at a time, hidden states on disk; the same figures",
    )
    add("--width", type=float, metavar="SHARE",
        help="say how many responses bring the interval to ± this share of the value (default 0.1)")  # fmt: skip
    add("--trust-remote-code", action="store_true", help="let the models' own Python code run")
    add("--fail-above", type=float, metavar="X",
        help="exit status 3 if the mean KL per token of any question is above X nats")  # fmt: skip
    add("--out", metavar="DIR", help="folder to write (default runs/measure-POLICY-REFERENCE)")
    add("--overwrite", action="store_true", help="replace what a measurement before left there")
    measure.set_defaults(run=_measure, stopped="; nothing was kept")


def _measure(options: argparse.Namespace) -> int:
    settings = vars(options).copy()
    policy, reference = settings.pop("policy"), settings.pop("reference")
    names = ("prompts", "texts", "out", "overwrite", "fail_above")
    prompts, texts, out, overwrite, fail_above = (settings.pop(name, None) for name in names)
    del settings["run"], settings["stopped"]
    if prompts is None and texts is None:
        raise UserError("give --prompts, --texts, or both: there is nothing to compare the models on")
    folder = (
        Path(out).expanduser() if out else Path("runs", f"measure-{Path(policy).name}-{Path(reference).name}")
    )
    if os.path.exists(folder) and not (overwrite and (folder / "measure.json").is_file()):
        remedy = (
            "give another --out, or --overwrite"
            if (folder / "measure.json").is_file()
            else "give another --out"
        )
        raise UserError(f"{folder} exists already: {remedy}")
    _quiet_libraries()
    from kedge.measure import compare, show
    from kedge.measure.progress import progress_for
    from kedge.report import write_audit_page

    found = compare(
        policy, reference, prompts=prompts, texts=texts, out=folder, progress=progress_for(), **settings
    )
    options.stopped = f"; the figures are in {folder}, `kedge report {folder}` adds the page"
    write_audit_page(folder)
    with _read_or_not():
        show(found)
        print(f"written: {folder}")  # noqa: T201
    if found.partial:
        return 130
    if fail_above is not None and not found.largest() <= fail_above:
        print(  # noqa: T201
            f"kedge: mean KL of {found.largest():.4g} nats per token is above --fail-above {fail_above:g}",
            file=sys.stderr,
        )
        return 3
    return 0


def _train(options: argparse.Namespace) -> int:
    from kedge import recipes
    from kedge.training.recipe import load_recipe

    for item in options.overrides:
        if "=" not in item:
            raise UserError(f"{item!r} is no override: write key=value, for example seed=1")
    recipe = load_recipe(recipes.find(options.recipe), options.overrides)
    if options.dry_run:
        from kedge.training.dry_run import print_plan

        print_plan(recipe)
        return 0
    from kedge.api import train
    from kedge.report import print_comparison

    _quiet_libraries()
    result = train(recipe)
    with _read_or_not():
        print_comparison([stage.path for stage in result.stages.values()])
        print(f"report: {result.report}")  # noqa: T201
    return 0


def _quiet_libraries() -> None:
    """Keep other libraries' notices off the screen; their errors still come as exceptions."""
    import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("transformers", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _report(options: argparse.Namespace) -> int:
    from kedge.report import print_comparison, write_report
    from kedge.runs.audit import SUMMARY

    runs = [Path(run) for run in options.runs]
    if (runs[0] / SUMMARY).is_file():
        return _report_audit(runs, options.out)
    shared = runs[0] if len(runs) == 1 else Path(os.path.commonpath([run.resolve().parent for run in runs]))
    out = Path(options.out) if options.out else shared / "report.html"
    path = write_report(runs, out)
    with _read_or_not():
        print_comparison(runs)
        print(f"report: {path}")  # noqa: T201
    return 0


def _report_audit(folders: Sequence[Path], out: str | None) -> int:
    from kedge.report import write_audit_page

    if len(folders) > 1 or out:
        raise UserError(
            f"{folders[0]} holds a measurement: its page goes into it, so give one folder, and no --out"
        )
    print(f"report: {write_audit_page(folders[0])}")  # noqa: T201
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from kedge import recipes

    if options.action is None:
        width = max(map(len, recipes.names()))
        for name in recipes.names():
            print(f"{name:<{width}}  {recipes.caption(name)}")  # noqa: T201
        print("\nkedge recipes show NAME · kedge recipes copy NAME · kedge recipes keys · kedge train NAME")  # noqa: T201
        return 0
    if options.action == "keys":
        from kedge.training.manual import manual

        print(manual(), end="")  # noqa: T201
        return 0
    if options.name is None:
        raise UserError(f"kedge recipes {options.action}: which one? There are: {', '.join(recipes.names())}")
    if options.action == "show":
        print(recipes.path(options.name).read_text(encoding="utf-8"), end="")  # noqa: T201
        return 0
    print(f"written: {recipes.copy(options.name, Path.cwd())}")  # noqa: T201
    return 0


def _certify(options: argparse.Namespace) -> int:
    from kedge.certify import print_table, run
    from kedge.models import DTYPES, device_named

    if options.head and options.judge:
        raise UserError("--head and --judge are two certificates; give one of them at a time")
    if options.sampled and not options.judge:
        raise UserError("--sampled is a setting of `kedge certify --judge`; give --judge, or leave it out")
    if options.head:
        return _certify_head(options)
    if options.backend:
        raise UserError("--backend is a setting of `kedge certify --head`; give --head, or leave it out")
    if options.judge:
        return _certify_judge(options)
    claims = run(device=str(device_named(options.device)), dtype=DTYPES[options.dtype or "float64"])
    with _read_or_not():
        print_table(claims)
    return 0 if all(claim.passed for claim in claims) else 1


def _certify_judge(options: argparse.Namespace) -> int:
    from kedge.certify import print_verdicts, verdicts
    from kedge.models import DTYPES, device_named

    if options.dtype == "bfloat16":
        raise UserError(
            "--judge needs digits to come to rest; give --dtype float64 or float32, or leave it out"
        )
    device, dtype = device_named(options.device), DTYPES[options.dtype or "float64"]
    found = list(verdicts(sampled=options.sampled, device=device, dtype=dtype))
    with _read_or_not():
        print_verdicts(found)
    return 0 if all(each.passed for each in found) else 1


def _certify_head(options: argparse.Namespace) -> int:
    from kedge.certify import HEAD_DTYPES, head_accuracy, print_accuracy
    from kedge.head.backend import chosen_runner
    from kedge.models import DTYPES, device_named

    if options.dtype == "float64":
        raise UserError("--head compares with float64; give --dtype float32 or bfloat16, or leave it out")
    device = device_named(options.device)
    for name in options.backend or ():
        try:
            chosen_runner(name, device)
        except ValueError as error:
            raise UserError(str(error)) from None
    found = list(
        head_accuracy(
            device,
            options.backend or (None,),
            [DTYPES[options.dtype]] if options.dtype else HEAD_DTYPES,
        )
    )
    with _read_or_not():
        print_accuracy(found)
    return 0 if all(each.passed for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
