"""The command line: ``python -m oodlib <command>``. Every make target is one call of it; ``--help`` lists them.

Only the standard library is imported before a command is known, so that nothing-to-do costs no time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodlib.errors import OodlibError

if TYPE_CHECKING:
    from oodlib.suite.runner import Options

__all__ = ["main"]


def _options(given: argparse.Namespace, output: Path | None = None) -> Options:
    from oodlib.suite.runner import Options

    return Options(profile=given.profile, seed=given.seed, device=given.device, extra=dict(given.parameter or []),
                   jobs=max(1, given.jobs), force=given.force, output=output)


def reproduce(given: argparse.Namespace) -> int:
    from oodlib.suite.runner import make_plans, run_all

    options = _options(given)
    plans, skipped = make_plans(None, options)
    if not plans:
        raise OodlibError(f"No notebook to run in the {given.profile} profile.")
    failed = run_all(plans, options)
    for name, reason in skipped.items():
        print(f"{name}  skipped: {reason}")
    from oodlib.suite.report import build_report, collect, verdict_lines

    if any(not entry.reference for entry in collect(given.profile)):
        path = build_report(given.profile)
        finished = [entry for entry in collect(given.profile) if not entry.reference]
        print("", *verdict_lines(finished), "", f"Report: {path}", sep="\n")
    if failed:
        print(f"Failed: {', '.join(failed)}. The others are done and will not run again.", file=sys.stderr)
    return 1 if failed else 0


def notebook(given: argparse.Namespace) -> int:
    from oodlib.suite.notebooks import find_notebook
    from oodlib.suite.runner import make_plans, run_all

    options = _options(given, given.output and given.output.resolve())
    plans, skipped = make_plans([find_notebook(name) for name in given.names], options)
    for name, reason in skipped.items():
        print(f"{name}  skipped: {reason}")
    failed = run_all(plans, options)
    for plan in plans:
        if plan.notebook.name not in failed:
            print(f"Output: {plan.folder}")
    return 1 if failed else 0


def report(given: argparse.Namespace) -> int:
    from oodlib.suite.report import build_report, collect, verdict_lines

    path = build_report(given.profile)
    print(*verdict_lines(collect(given.profile)), "", f"Report: {path}", sep="\n")
    return 0


def verify(given: argparse.Namespace) -> int:
    from oodlib.suite.verify import compare_runs, referenced, update_reference

    if given.update:
        print("Copied to figures/reference:", ", ".join(update_reference(given.profile)))
        _update_pages()
        return 0
    from oodlib.suite.notebooks import list_notebooks
    from oodlib.suite.runner import make_plans, run_all

    known = referenced(given.profile)
    with tempfile.TemporaryDirectory() as folder:
        options = _options(given, Path(folder).resolve())
        plans, _ = make_plans([path for path in list_notebooks() if path.stem in known], options)
        failed = run_all(plans, options)
        names = [plan.notebook.name for plan in plans if plan.notebook.name not in failed]
        differences = compare_runs(given.profile, Path(folder) / given.profile, names)
    print(*differences, f"{len(differences)} difference(s) from the reference.", sep="\n")
    return 1 if failed or differences else 0


def data(given: argparse.Namespace) -> int:
    from oodlib.data.public.prepare import NotAtHand, load
    from oodlib.data.public.registry import SETS
    from oodlib.workspace import data_root

    if given.profile == "paper":
        from oodlib.data.imagenet import describe_paper_sets

        print(describe_paper_sets(data_root()))
    elif given.profile == "benchmark":
        for name, info in SETS.items():
            for split in info.splits:
                try:
                    print(load(name, split), flush=True)
                except NotAtHand as error:
                    print(f"{name}/{split}: not at hand. {error}", flush=True)
    else:
        print(f"The {given.profile} profile needs no download: its images are drawn on the spot.")
    return 0


def train(given: argparse.Namespace) -> int:
    from oodlib.models.shipped import SPECS, train_and_save
    from oodlib.studies.flows.runs import train_and_ship
    from oodlib.studies.flows.specs import FLOWS

    unknown = [name for name in given.names if name not in {**SPECS, **FLOWS}]
    if unknown:
        raise OodlibError(f"There is no training recipe {unknown[0]!r}. Known ones: {', '.join({**SPECS, **FLOWS})}.")
    for name in given.names:
        make = train_and_ship if name in FLOWS else train_and_save
        print(make(name, seed=given.seed or 0, device=given.device or "auto"))
    return 0


def train_vit(given: argparse.Namespace) -> int:
    pool = given.pool or {"benchmark": "cifar", "paper": "imagenet"}.get(given.profile, "embedded")
    if given.ship:
        from oodlib.studies.vits.stored import ship

        print(ship(pool))
        return 0
    from oodlib.studies.vits.sweep.train_pool import train_pool

    done = train_pool(pool, models=given.models, jobs=max(1, given.jobs), device=given.device or "cpu")
    print(f"{len(done)} models of the pool {pool} are trained and scored.")
    return 0


def sweep(given: argparse.Namespace) -> int:
    from oodlib.studies.vits.pool_table import find_pool
    from oodlib.studies.vits.sweep.jobs import chosen, describe, make_jobs
    from oodlib.studies.vits.sweep.models_and_images import find_source
    from oodlib.workspace import root

    pool = find_pool(given.pool).resolve()
    output = (given.output or root() / "data" / "sweeps" / pool.stem).resolve()
    source = find_source(pool, output, data=given.data_root, weights=given.weights, workers=given.cpus or 8,
                         sizes=dict(given.parameter or []))
    cpus = given.cpus or (8 if source.files else 1)
    jobs = make_jobs(chosen(pool, given.models), source, output, all_features=given.all_features,
                     device=given.device or "auto")
    if given.dry_run:
        from oodlib.studies.vits.sweep.cost import describe_plan

        print(describe_plan(jobs, tflops=given.tflops, cpus=cpus))
        return 0
    if given.status:
        print(describe(jobs))
        return 0
    from oodlib.studies.vits.sweep.launch import Resources, run_sweep

    resources = Resources(given.jobs or (64 if given.where == "slurm" else 1), given.timeout, cpus,
                          int(source.files) if given.gpus is None else given.gpus, given.partition,
                          dict(given.slurm or []))
    return run_sweep(jobs, output, given.where, resources, shard=given.shard)


def student(given: argparse.Namespace) -> int:
    from oodlib.suite.course import make_course
    from oodlib.workspace import root

    target = root() / "build" / "course"
    for name in make_course(target):
        print(name)
    print(f"Course: {target}")
    return 0


def docs(given: argparse.Namespace) -> int:
    from oodlib.suite.docs import build_docs
    from oodlib.workspace import root

    print(f"API reference: {build_docs(root() / 'build' / 'docs')}")
    _update_pages()
    return 0


def _update_pages() -> None:
    from oodlib.suite.readme import update_pages

    print("Generated text brought up to date:", ", ".join(update_pages()) or "nothing had changed")


def doctor(given: argparse.Namespace) -> int:
    from oodlib.suite.doctor import describe

    text, problems = describe()
    print(text)
    return 1 if problems else 0


def clean(given: argparse.Namespace) -> int:
    from oodlib.workspace import PROFILES, root

    folders = [root() / "build", *[root() / "figures" / profile for profile in PROFILES]]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    print("Removed build/ and figures/<profile>/. Data, checkpoints and figures/reference/ are untouched.")
    return 0


def test(given: argparse.Namespace) -> int:
    return _python("pytest", *given.rest)


def lint(given: argparse.Namespace) -> int:
    return _python("ruff", "check", ".", *given.rest)


def lab(given: argparse.Namespace) -> int:
    """JupyterLab in notebooks/, with this interpreter's kernel and the chosen device."""
    from oodlib.workspace import root

    device = {"OODLIB_DEVICE": given.device} if given.device else {}
    return _python("jupyterlab", str(root() / "notebooks"), *given.rest, environment=device)


def _python(module: str, *arguments: str, environment: dict[str, str] | None = None) -> int:
    from oodlib.workspace import root

    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=root(),
                          env={**os.environ, **(environment or {})}).returncode


_HELP = {
    "reproduce": (reproduce, "run every notebook of the profile, build the report, print the verdicts"),
    "notebook": (notebook, "run the named notebooks only"),
    "test": (test, "run the tests (further arguments go to pytest)"),
    "lab": (lab, "open JupyterLab"),
    "data": (data, "fetch and prepare the image sets of the profile; for paper: list what is needed and where"),
    "report": (report, "build REPORT.md and report.html from finished runs"),
    "verify": (verify, "run afresh and compare with the committed reference results"),
    "student": (student, "write the student, solution and code-only copies into build/course/"),
    "docs": (docs, "write the API reference into build/docs/ and the generated text of README.md and docs/"),
    "lint": (lint, "check the code with ruff"),
    "train": (train, "train the named checkpoints"),
    "train-vit": (train_vit, "train and score a pool of small ViTs (laptop: embedded, benchmark: cifar); resumable"),
    "sweep": (sweep, "score every model of a pool, on this machine or a SLURM cluster; what is done is not done again"),
    "doctor": (doctor, "say what is installed, mismatched or missing, and what each profile could run"),
    "score": (None, "score your own images: see `score --help`"),
    "clean": (clean, "remove what runs have made (not data, not checkpoints)"),
}


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--profile", default="laptop", metavar="NAME",
                        help="smoke, laptop (default), benchmark or paper")
    common.add_argument("--device", help="auto, cpu, cuda or mps")
    common.add_argument("--seed", type=int)
    parser = argparse.ArgumentParser(prog="python -m oodlib", description="Papers on out-of-distribution detection, "
                                     "reproduced. Every make target is one of these commands.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, text) in _HELP.items():
        command = commands.add_parser(name, parents=[common], allow_abbrev=False, help=text, description=text)
        if name in ("reproduce", "notebook", "verify"):
            command.add_argument("-p", dest="parameter", nargs=2, action="append", metavar=("NAME", "VALUE"),
                                 help="set a notebook's parameter")
            command.add_argument("--jobs", type=int, default=1, help="notebooks at a time")
            command.add_argument("--force", action="store_true", help="run even what is up to date")
        if name in ("notebook", "train"):
            command.add_argument("names", nargs="+", help="for example gradnorm" if name == "notebook" else None)
        if name == "train-vit":
            command.add_argument("--pool", help="embedded, cifar, or a table of such rows")
            command.add_argument("--models", default="*", help="only rows whose name matches this pattern")
            command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
            command.add_argument("--ship", action="store_true",
                                 help="train nothing; pack what is finished into data/checkpoints")
        if name == "notebook":
            command.add_argument("--output", type=Path, help="folder instead of figures/")
        if name == "verify":
            command.add_argument("--update", action="store_true", help="make the finished run the reference")
        if name == "sweep":
            _sweep_options(command)
    return parser


def _sweep_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--pool", required=True, help="a file, or the name of one in data/pools")
    command.add_argument("--dry-run", action="store_true", help="print what it would cost, and stop")
    command.add_argument("--status", action="store_true", help="print what is done, running, failed and missing")
    command.add_argument("--output", type=Path, help="folder of results; default data/sweeps/<pool>")
    command.add_argument("--models", default="*", metavar="GLOB", help="only the rows with such names")
    command.add_argument("--where", default="local", choices=("local", "slurm", "submitit-local"))
    command.add_argument("--jobs", type=int, metavar="N", help="jobs at a time; default 1, on SLURM 64")
    command.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="only the I-th of N parts")
    command.add_argument("--cpus", type=int, metavar="N",
                         help="cores (and image decoders) of a job; default 8 for ImageNet, else 1")
    command.add_argument("--gpus", type=int, metavar="N", help="of a SLURM job; default 1 for ImageNet, else none")
    command.add_argument("--timeout", type=int, default=1440, metavar="MIN", help="longest time of a job; default 1440")
    command.add_argument("--partition", default="", help="of SLURM")
    command.add_argument("--slurm", type=_pair, action="append", metavar="KEY=VALUE",
                         help="any other option of sbatch, for example account=vision")
    command.add_argument("--data-root", type=Path, metavar="DIR",
                         help="of the ImageNet sets, as `data --profile paper` lists them")
    command.add_argument("--weights", type=Path, metavar="DIR", help="folder of the weight files")
    command.add_argument("--all-features", action="store_true", help="keep the features of every training image too")
    command.add_argument("--tflops", type=float, help="for --dry-run: what the device reaches in float32")
    command.add_argument("-p", dest="parameter", nargs=2, action="append", metavar=("NAME", "VALUE"),
                         help="n_fit, n_test or n_ood of the pools trained here")


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard: I/N with 1 <= I <= N, for example 2/8")
    return int(part), int(parts)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key.replace("-", "_"), value


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 fine, 1 something failed, 2 bad input, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["score"]:
        return _guarded(_score, given[1:])
    parser = _parser()
    parsed, parsed_rest = parser.parse_known_args(given)
    if parsed_rest and parsed.command not in ("test", "lint", "lab"):
        parser.error(f"unknown arguments: {' '.join(parsed_rest)}")
    parsed.rest = [part for part in parsed_rest if part != "--"]
    function = _HELP[parsed.command][0]
    assert function is not None

    def run(_: Any) -> int:
        from oodlib.workspace import check_profile

        check_profile(parsed.profile)
        return function(parsed)

    return _guarded(run, None)


def _score(arguments: list[str]) -> int:
    from oodlib.apply.command import main as score_main

    return score_main(arguments) or 0


def _guarded(function: Any, argument: Any) -> int:
    """Call ``function``; bad input is one line on stderr, and a termination cleans up as an interrupt does."""
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        return function(argument)
    except OodlibError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. Nothing half-done was kept; the same command resumes.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
