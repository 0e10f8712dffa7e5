"""The command line: ``python -m oodlib <command>``. Every make target is one call of it; ``--help``
lists them.

The command's body lives in the package that it is about. Nothing heavy is imported before a command
is known, so that nothing-to-do costs no time.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from oodlib.errors import OodlibError
from oodlib.studies.vits.sweep.command import sweep, sweep_options, train_options, train_vit
from oodlib.suite.commands import (
    clean,
    docs,
    doctor,
    lab,
    lint,
    notebook,
    report,
    reproduce,
    student,
    test,
    test_quick,
    verify,
)


def data(given: argparse.Namespace) -> int:
    from oodlib.data.public.prepare import DatasetNotFound, load
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
                except DatasetNotFound as error:
                    print(f"{name}/{split}: not available. {error}", flush=True)
    else:
        print(f"The {given.profile} profile needs no download: its images are drawn on the spot.")
    return 0


def train(given: argparse.Namespace) -> int:
    from oodlib.models.shipped import SPECS, train_and_save
    from oodlib.studies.flows.runs import train_and_ship
    from oodlib.studies.flows.specs import FLOWS

    unknown = [name for name in given.names if name not in {**SPECS, **FLOWS}]
    if unknown:
        raise OodlibError(
            f"There is no training recipe {unknown[0]!r}. Known ones: "
            f"{', '.join({**SPECS, **FLOWS})}."
        )
    for name in given.names:
        make = train_and_ship if name in FLOWS else train_and_save
        print(make(name, seed=given.seed or 0, device=given.device or "auto"))
    return 0


_HELP = {
    "reproduce": (
        reproduce,
        "run every notebook of the profile, build the report, print the verdicts",
    ),
    "notebook": (notebook, "run the named notebooks only"),
    "test": (test, "run the tests on all cores (further arguments go to pytest)"),
    "test-quick": (test_quick, "run the tests that are not marked slow"),
    "lab": (lab, "open JupyterLab"),
    "data": (
        data,
        "fetch and prepare the image sets of the profile; for paper: list what is needed and where",
    ),
    "report": (report, "build REPORT.md and report.html from finished runs"),
    "verify": (verify, "run afresh and compare with the committed reference results"),
    "student": (student, "write the student, solution and code-only copies into build/course/"),
    "docs": (
        docs,
        "write the API reference into build/docs/ and the generated text of README.md and docs/",
    ),
    "lint": (lint, "check the code: ruff, its format, and the types with mypy"),
    "train": (train, "train the named checkpoints"),
    "train-vit": (
        train_vit,
        "train and score a pool of small ViTs (laptop: embedded, benchmark: cifar); resumable",
    ),
    "sweep": (
        sweep,
        "score every model of a pool that has no scores yet, on this machine or a SLURM cluster",
    ),
    "doctor": (
        doctor,
        "say what is installed, mismatched or missing, and what each profile could run",
    ),
    "score": (None, "score your own images: see `score --help`"),
    "clean": (clean, "remove what runs have made (not data, not checkpoints)"),
}


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument(
        "--profile",
        default="laptop",
        metavar="NAME",
        help="smoke, laptop (default), benchmark or paper",
    )
    common.add_argument("--device", help="auto, cpu, cuda or mps")
    common.add_argument("--seed", type=int)
    parser = argparse.ArgumentParser(
        prog="python -m oodlib",
        description="Papers on out-of-distribution detection, "
        "reproduced. Every make target is one of these commands.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, text) in _HELP.items():
        command = commands.add_parser(
            name, parents=[common], allow_abbrev=False, help=text, description=text
        )
        if name in ("reproduce", "notebook", "verify"):
            command.add_argument(
                "-p",
                dest="parameter",
                nargs=2,
                action="append",
                metavar=("NAME", "VALUE"),
                help="set a notebook's parameter",
            )
            command.add_argument(
                "--jobs", type=int, help="notebooks at a time (default: as cores and memory allow)"
            )
            command.add_argument("--force", action="store_true", help="run even what is up to date")
        if name in ("notebook", "train"):
            command.add_argument(
                "names", nargs="+", help="for example gradnorm" if name == "notebook" else None
            )
        if name == "train-vit":
            train_options(command)
        if name == "notebook":
            command.add_argument("--output", type=Path, help="folder instead of figures/")
        if name == "verify":
            command.add_argument(
                "--update", action="store_true", help="make the finished run the reference"
            )
        if name == "sweep":
            sweep_options(command)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 fine, 1 something failed, 2 bad input, 130
    interrupted.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["score"]:
        return _guarded(_score, given[1:])
    parser = _parser()
    parsed, parsed_rest = parser.parse_known_args(given)
    if parsed_rest and parsed.command not in ("test", "test-quick", "lint", "lab"):
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
    """Call ``function``; bad input is one line on stderr, a termination meanwhile cleans up as an
    interrupt does.
    """

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return function(argument)
    except OodlibError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. Nothing half-done was kept; the same command resumes.", file=sys.stderr)
        return 130
    finally:
        signal.signal(
            signal.SIGTERM, before or signal.SIG_DFL
        )  # None: a handler that Python did not install


if __name__ == "__main__":
    sys.exit(main())
