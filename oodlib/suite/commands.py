"""The commands of the suite: run the notebooks, report, verify, make the course and the pages,
check, tidy up.

Each takes what the command line parsed and returns its exit code. Heavy imports wait until a
command needs them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from oodlib.errors import OodlibError
from oodlib.suite.notebooks import find_notebooks, list_notebooks
from oodlib.suite.runner import Options, make_plans, run_all
from oodlib.workspace import PROFILES, root


def _options(given: argparse.Namespace, output: Path | None = None) -> Options:
    return Options(
        profile=given.profile,
        seed=given.seed,
        device=given.device,
        extra=dict(given.parameter or []),
        jobs=given.jobs,
        force=given.force,
        output=output,
    )


def reproduce(given: argparse.Namespace) -> int:
    """Run what is not up to date in the profile; then print the report's path and the verdicts."""
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
        print(
            f"Failed: {', '.join(failed)}. The others are done and will not run again.",
            file=sys.stderr,
        )
    return 1 if failed else 0


def notebook(given: argparse.Namespace) -> int:
    """Run the named notebooks only."""
    options = _options(given, given.output and given.output.resolve())
    paths = dict.fromkeys(path for name in given.names for path in find_notebooks(name))
    plans, skipped = make_plans(list(paths), options)
    for name, reason in skipped.items():
        print(f"{name}  skipped: {reason}")
    failed = run_all(plans, options)
    for plan in plans:
        if plan.notebook.name not in failed:
            print(f"Output: {plan.folder}")
    return 1 if failed else 0


def report(given: argparse.Namespace) -> int:
    """Build the report from finished runs."""
    from oodlib.suite.report import build_report, collect, verdict_lines

    path = build_report(given.profile)
    print(*verdict_lines(collect(given.profile)), "", f"Report: {path}", sep="\n")
    return 0


def verify(given: argparse.Namespace) -> int:
    """Run afresh and compare with the reference results; with ``--update``, make the finished runs
    the reference.
    """
    from oodlib.suite.verify import compare_runs, referenced, update_reference

    if given.update:
        print("Copied to figures/reference:", ", ".join(update_reference(given.profile)))
        _update_pages()
        return 0
    known = referenced(given.profile)
    with tempfile.TemporaryDirectory() as folder:
        options = _options(given, Path(folder).resolve())
        plans, _ = make_plans([path for path in list_notebooks() if path.stem in known], options)
        failed = run_all(plans, options)
        names = [plan.notebook.name for plan in plans if plan.notebook.name not in failed]
        differences = compare_runs(given.profile, Path(folder) / given.profile, names)
    print(*differences, f"{len(differences)} difference(s) from the reference.", sep="\n")
    return 1 if failed or differences else 0


def student(given: argparse.Namespace) -> int:
    """Write the course copies."""
    from oodlib.suite.course import make_course

    target = root() / "build" / "course"
    for name in make_course(target):
        print(name)
    print(f"Course: {target}")
    return 0


def docs(given: argparse.Namespace) -> int:
    """Write the API reference and the generated text of the pages."""
    from oodlib.suite.docs import build_docs

    print(f"API reference: {build_docs(root() / 'build' / 'docs')}")
    _update_pages()
    return 0


def _update_pages() -> None:
    from oodlib.suite.readme import update_pages

    print("Generated text brought up to date:", ", ".join(update_pages()) or "nothing had changed")


def doctor(given: argparse.Namespace) -> int:
    """Say what is installed, mismatched or missing; 1 where something is wrong."""
    from oodlib.suite.doctor import describe

    text, problems = describe()
    print(text)
    return 1 if problems else 0


def clean(given: argparse.Namespace) -> int:
    """Remove what runs have made."""
    folders = [root() / "build", *[root() / "figures" / profile for profile in PROFILES]]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        "Removed build/ and figures/<profile>/. Data, checkpoints and figures/reference/ are "
        "untouched."
    )
    return 0


def test(given: argparse.Namespace) -> int:
    """Run pytest on all cores, one thread each."""
    return _python(
        "pytest",
        *("-n", "logical", "--dist", "worksteal"),
        *given.rest,
        environment={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )


def test_quick(given: argparse.Namespace) -> int:
    """Run the tests that are not marked slow."""
    given.rest = ["-m", "not slow", *given.rest]
    return test(given)


def lint(given: argparse.Namespace) -> int:
    """Check the code with ruff, its format, and the types with mypy; runs all three."""
    results = [
        _python("ruff", "check", ".", *given.rest),
        _python("ruff", "format", "--check", "."),
        _python("mypy"),
    ]
    return max(results)


def lab(given: argparse.Namespace) -> int:
    """JupyterLab in notebooks/, with this interpreter's kernel and the chosen device."""
    device = {"OODLIB_DEVICE": given.device} if given.device else {}
    return _python("jupyterlab", str(root() / "notebooks"), *given.rest, environment=device)


def _python(module: str, *arguments: str, environment: dict[str, str] | None = None) -> int:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=root(),
        env={**os.environ, **(environment or {})},
    ).returncode
