"""``python -m oodlib score``: an OOD score and a decision for each of a user's images, as CSV."""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from oodlib.apply.class_order import check_classes
from oodlib.apply.inputs import (
    FEATURE_SUFFIXES,
    FeatureFile,
    Images,
    Inputs,
    Transform,
    open_images,
    plain_errors,
)
from oodlib.apply.network import load_network
from oodlib.apply.score_csv import write_scores
from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank
from oodlib.files import read_sealed, sha256, write_sealed
from oodlib.metrics import threshold
from oodlib.models.device import pick_device, weights_hash
from oodlib.scores import Detector, create, load_detector, names

OF_LOGITS = {"energy", "gen", "kl_matching", "max_logit", "msp", "odin"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0, or 1 where images could not be decoded; OodlibError for bad input."""
    given = _parser().parse_args(arguments)
    try:
        with plain_errors(OSError):
            return _run(given)
    except OodlibError as error:
        raise OodlibError(f"score: {error}") from error


def _run(given: argparse.Namespace) -> int:
    _check(given)
    pick_device(given.device)
    network, weights = None, ""
    if given.model:
        network = load_network(given.model, weights=given.weights, num_classes=given.num_classes)
        weights = weights_hash(network[0])
    # all are opened before the work, so that a wrong path costs no time
    images = _open(given.images, network, weights, given)
    ids, fit = (
        None if path is None else _open(path, network, weights, given)
        for path in (given.id_images, given.fit_images)
    )
    for other, path in ((ids, given.id_images), (fit, given.fit_images)):
        if other is not None and other.weights != images.weights:
            raise OodlibError(
                f"{path} and {given.images} hold the heads of two networks. Write all feature "
                "files with one network."
            )
    # the detector
    limit = None
    if given.detector_file:
        detector, limit = _load(given.detector_file, images.weights)
        identity = sha256(given.detector_file)
    else:
        detector, identity = _fitted(fit, given)
    if images.only_logits and detector.info.key not in OF_LOGITS:
        raise OodlibError(
            f"{detector.info.key} needs features; {given.images} holds logits alone. Add features, "
            f"weight and bias, or use one of {', '.join(sorted(OF_LOGITS))}."
        )
    # its threshold
    if ids is not None:
        bank = ids.bank()
        limit = threshold(detector.score(bank), tpr=given.tpr)
        print(
            f"Threshold {limit:.6g}: {given.tpr:.0%} of {len(bank)} ID images score at most this"
            f"{_accuracy(bank, given.id_images)}."
        )
    if given.save_detector:
        record = {
            "detector": detector.info.key,
            "model": given.model,
            "weights": images.weights,
            "threshold": limit,
            "tpr": given.tpr,
        }
        sidecar = _sidecar(given.save_detector)
        write_sealed(given.save_detector, detector.save, record, record_path=sidecar)
    # the scores
    identity = f"{images.weights} {identity}"
    n, counts = write_scores(images, detector, limit, given.output, identity=identity)
    unreadable = counts["unreadable"]
    verdict = "no threshold: give --id-images" if limit is None else f"{counts['OOD']} called OOD"
    scored = f"{n - unreadable} images scored with {detector.info.key}, {verdict}."
    print(f"{scored} Written: {given.output}")
    if unreadable:
        print(
            f"warning: {unreadable} of {n} images cannot be decoded; their rows say unreadable.",
            file=sys.stderr,
        )
    return int(unreadable > 0)


def _check(given: argparse.Namespace) -> None:
    """Refuse options that contradict each other, lie out of range, or cannot be written."""
    if given.detector_file and (given.detector or given.parameter or given.fit_images):
        raise OodlibError(
            "--detector-file brings a fitted detector; --detector, -p and --fit-images would make "
            "another one. Give one or the other."
        )
    if not 0 < given.tpr <= 1:
        raise OodlibError(
            f"--tpr must lie in (0, 1], got {given.tpr}. It is a fraction, not per cent."
        )
    if given.batch_size < 1 or (given.workers or 0) < 0:
        raise OodlibError(
            "--batch-size must be at least 1 and --workers at least 0, got "
            f"{given.batch_size} and {given.workers}. Correct them."
        )
    _check_writable("--output", Path(given.output))
    if given.save_detector is not None:
        _check_writable("--save-detector", Path(given.save_detector))
        _check_writable("--save-detector", _sidecar(given.save_detector))
    if given.cache is not None:
        _check_writable("--cache", Path(given.cache) / "features")


def _check_writable(option: str, path: Path) -> None:
    """A file can be created at this place, and what is there may be replaced."""
    if path.exists() and not path.is_file():
        raise OodlibError(
            f"{option} {path} is not a regular file, so it cannot be overwritten. Give the path of "
            "a file."
        )
    place = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OodlibError(
            f"{option} {path} cannot be written ({error.strerror}: {place}). Give another place."
        ) from error


def _open(
    path: str,
    network: tuple[nn.Module, Transform] | None,
    weights: str,
    given: argparse.Namespace,
) -> Inputs:
    if Path(path).suffix.lower() in FEATURE_SUFFIXES:
        if network is not None:
            raise OodlibError(
                f"{path} holds features and brings its own head. Omit --model, and give feature "
                "files for all sets."
            )
        return FeatureFile(path)
    if network is None:
        raise OodlibError(
            f"{path} is not a file of features ({', '.join(sorted(FEATURE_SUFFIXES))}), so --model "
            "is needed."
        )
    model, transform = network
    return Images(
        open_images(path, transform),
        model,
        weights=weights,
        model_name=given.model,
        batch_size=given.batch_size,
        workers=given.workers,
        device=given.device,
        cache=given.cache,
    )


def _fitted(fit: Inputs | None, given: argparse.Namespace) -> tuple[Detector, str]:
    """The detector named on the command line, fitted where it learns, and what it depends on."""
    name = given.detector or "msp"
    detector = create(name, **{key: _literal(value) for key, value in given.parameter or []})
    identity = f"{name} {vars(detector)}"  # with those that its repr leaves out
    if not detector.needs_fit:
        if fit is not None:
            print(f"{name} needs no fitting; --fit-images is ignored.")
        return detector, identity
    if fit is None:
        raise OodlibError(
            f"{name} learns from ID training images. Give them with --fit-images, or a detector "
            "saved earlier with --detector-file."
        )
    bank = fit.bank()
    if detector.info.needs == "labels" and check_classes(bank) is None:
        found = 0 if bank.labels is None else int((np.unique(bank.labels) >= 0).sum())
        raise OodlibError(
            f"{name} learns from classes, so {given.fit_images} needs one folder for each of the "
            f"model's {bank.head.num_classes} classes, in the model's order by name (a feature "
            f"file: labels); it holds {found}."
        )
    print(f"Fitted on {len(bank)} images{_accuracy(bank, given.fit_images)}.")
    return detector.fit(bank), f"{identity} {fit.identity} {fit.stamp(0, len(fit))}"


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _accuracy(bank: FeatureBank, where: str) -> str:
    """The accuracy, where labels can be classes: wrong weights or a wrong transform show here."""
    check = check_classes(bank)
    if check is None:
        unlabelled = bank.labels is None or (bank.labels < 0).all()
        return "" if unlabelled else ", accuracy unknown: not one folder per class"
    if check.hint:
        print(f"warning: {where}: {check.hint}", file=sys.stderr)
    left_out = f" ({check.unknown} of unknown label left out)" if check.unknown else ""
    return f", accuracy {check.accuracy:.1%}{left_out}"


def _sidecar(path: str) -> Path:
    return Path(path + ".json")


def _load(path: str, weights: str) -> tuple[Detector, float | None]:
    """A saved detector and its threshold, if both belong to this network and to each other."""
    detector = load_detector(path)
    remedy = "Save the detector again with --save-detector."
    record = read_sealed(path, "saved detector", remedy, record_path=_sidecar(path))
    if not {"weights", "threshold"} <= record.keys():
        raise OodlibError(f"{_sidecar(path)} does not hold the detector's threshold. {remedy}")
    if record["weights"] != weights:
        raise OodlibError(
            f"{path} was fitted on a network with weights {record['weights'][:8]}, this one has "
            f"{weights[:8]}. Fit it again on this network, or use the old weights."
        )
    return detector, record["threshold"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m oodlib score",
        allow_abbrev=False,
        description="Write an OOD score for each image into a CSV file (path, score, decision). "
        "Larger scores mean further from the training data. An image that cannot be decoded gets "
        "no score and the decision unreadable, and the exit code is 1; among fit and ID images it "
        "stops the run. Images may be replaced by a file of features and head, or of logits (.npz, "
        ".safetensors), in all three places.",
    )

    def add(option: str, help: str, **settings: Any) -> None:
        parser.add_argument(option, help=help, **settings)

    add(
        "--model",
        "your function, as package.module:function or path/to/file.py:function, that returns "
        "(model, transform); a timm name with its tag; or cifar10_fast, latin_fast, "
        "resnet20_cifar10, ...",
    )
    images = "folder, list file (one path per line), image or feature file to score"
    add("--images", images, required=True)
    add("--output", "CSV file to write (default: scores.csv)", default="scores.csv")
    add(
        "--weights",
        "weights of a timm model (.safetensors, .pth, .npz); without it timm downloads the tag's",
    )
    classes = "of the file given by --weights, where not the timm model's own"
    add("--num-classes", classes, type=int)
    add("--detector", "default: msp", choices=sorted(names()))
    example = "set a detector's parameter, for example -p k 10"
    add("-p", example, dest="parameter", nargs=2, action="append", metavar=("NAME", "VALUE"))
    add("--fit-images", "ID training images, for detectors that learn; one folder per class")
    add(
        "--id-images",
        "held-out ID images that set the threshold; without it the decision stays empty",
    )
    tpr = "share of the ID images to be called ID (default: 0.95)"
    add("--tpr", tpr, type=float, default=0.95)
    add("--save-detector", "save the fitted detector and its threshold", metavar="FILE")
    saved = "use a saved one instead of --detector and --fit-images"
    add("--detector-file", saved, metavar="FILE")
    add("--cache", "folder for features of fit and ID images (default: data/cache/banks)")
    add("--device", "auto, cpu, cuda or mps", default="auto")
    add("--batch-size", "images per batch (default: 64)", type=int, default=64)
    add("--workers", "processes that decode images (default: one per core)", type=int)
    return parser
