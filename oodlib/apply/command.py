"""``python -m oodlib score``: an OOD score, and a decision, for each of a user's own images, as a
CSV file.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from oodlib.apply.class_order import check_classes
from oodlib.apply.inputs import FEATURE_SUFFIXES, FeatureFile, Images, Transform, plain_errors
from oodlib.apply.network import load_network
from oodlib.apply.score_csv import write_scores
from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank
from oodlib.files import sha256, write_json
from oodlib.metrics import threshold
from oodlib.models.device import pick_device, weights_hash
from oodlib.scores import Detector, create, load_detector, names

__all__ = ["main"]

OF_LOGITS = {"energy", "gen", "kl_matching", "max_logit", "msp", "odin"}


def _source(
    path: str, network: tuple[nn.Module, Transform] | None, given: argparse.Namespace
) -> Images | FeatureFile:
    if Path(path).suffix.lower() in FEATURE_SUFFIXES:
        if network is not None:
            raise OodlibError(
                f"score: {path} holds features and brings its own head. Omit --model, and give "
                "feature files for all sets."
            )
        return FeatureFile(path)
    if network is None:
        raise OodlibError(
            f"score: {path} is not a file of features ({', '.join(sorted(FEATURE_SUFFIXES))}), so "
            "--model is needed."
        )
    return Images(path, *network, given)


def _fitted(fit: Images | FeatureFile | None, given: argparse.Namespace) -> tuple[Detector, str]:
    """The detector named on the command line, fitted where it learns something, and what it was
    made from.
    """
    name = given.detector or "msp"
    detector = create(name, **{key: _literal(value) for key, value in given.parameter or []})
    identity = f"{name} {vars(detector)}"  # with those that its repr leaves out
    if not detector.needs_fit:
        if fit is not None:
            print(f"{name} needs no fitting; --fit-images is ignored.")
        return detector, identity
    if fit is None:
        raise OodlibError(
            f"score: {name} learns from ID training images. Give them with --fit-images, or a "
            "detector saved earlier with --detector-file."
        )
    bank = fit.bank()
    if detector.info.needs == "labels" and check_classes(bank) is None:
        found = 0 if bank.labels is None else int((np.unique(bank.labels) >= 0).sum())
        raise OodlibError(
            f"score: {name} learns from classes, so {given.fit_images} needs one folder for each "
            f"of the model's {bank.head.num_classes} classes, in the model's order by name (a "
            f"feature file: labels); it holds {found}."
        )
    print(f"Fitted on {len(bank)} images{_accuracy(bank, given.fit_images)}.")
    return detector.fit(bank), f"{identity} {fit.identity} {fit.stamp(0, len(fit))}"


def _accuracy(bank: FeatureBank, where: str) -> str:
    """The model's accuracy, where the labels can be its classes: wrong weights or a wrong transform
    show here first.
    """
    check = check_classes(bank)
    if check is None:
        return (
            ""
            if bank.labels is None or (bank.labels < 0).all()
            else ", accuracy unknown: not one folder per class"
        )
    if check.hint:
        print(f"warning: {where}: {check.hint}", file=sys.stderr)
    left_out = f" ({check.unknown} of unknown label left out)" if check.unknown else ""
    return f", accuracy {check.accuracy:.1%}{left_out}"


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _sidecar(path: str) -> Path:
    return Path(path + ".json")


def _load(path: str, weights: str) -> tuple[Detector, float | None]:
    """A saved detector and its threshold, if both belong to this network and to each other."""
    detector = load_detector(path)
    try:
        record = json.loads(_sidecar(path).read_text(encoding="utf-8"))
        made_with, checksum, limit = record["weights"], record["sha256"], record["threshold"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise OodlibError(
            f"score: {_sidecar(path)} should stand beside the detector and hold its threshold "
            f"({error}). Save the detector again with --save-detector."
        ) from error
    if checksum != sha256(path):
        raise OodlibError(
            f"score: {path} and {_sidecar(path).name} do not belong together. Save the detector "
            "again."
        )
    if made_with != weights:
        raise OodlibError(
            f"score: {path} was fitted on a network with weights {made_with[:8]}, this one has "
            f"{weights[:8]}. Fit it again on this network, or use the old weights."
        )
    return detector, limit


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m oodlib score",
        allow_abbrev=False,
        description="Write an OOD score for each image into a CSV "
        "file (path, score, decision). Larger scores mean further from the training data. An image "
        "that cannot be decoded gets no score and the decision unreadable, and the exit code is 1; "
        "among fit and ID images it stops the run. Images may be replaced by a file of features "
        "and head, or of logits (.npz, .safetensors), in all three places.",
    )
    add = parser.add_argument
    add(
        "--model",
        help="your function, as package.module:function or path/to/file.py:function, that returns (model, "
        "transform); a timm name with its tag; or cifar10_fast, latin_fast, resnet20_cifar10, ...",
    )
    add(
        "--images",
        required=True,
        help="folder, list file (one path per line), image or feature file to score",
    )
    add("--output", default="scores.csv", help="CSV file to write (default: scores.csv)")
    add(
        "--weights",
        help="weights of a timm model (.safetensors, .pth, .npz); without it timm downloads the tag's",
    )
    add(
        "--num-classes",
        type=int,
        help="of the file given by --weights, where not the timm model's own",
    )
    add("--detector", choices=sorted(names()), help="default: msp")
    add(
        "-p",
        dest="parameter",
        nargs=2,
        action="append",
        metavar=("NAME", "VALUE"),
        help="set a detector's parameter, for example -p k 10",
    )
    add("--fit-images", help="ID training images, for detectors that learn; one folder per class")
    add(
        "--id-images",
        help="held-out ID images that set the threshold; without it the decision stays empty",
    )
    add(
        "--tpr",
        type=float,
        default=0.95,
        help="share of the ID images to be called ID (default: 0.95)",
    )
    add("--save-detector", metavar="FILE", help="keep the fitted detector and its threshold")
    add(
        "--detector-file",
        metavar="FILE",
        help="use a kept one instead of --detector and --fit-images",
    )
    add("--cache", help="folder for features of fit and ID images (default: data/cache/banks)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, help="processes that decode images (default: one per core)")
    return parser


@plain_errors(OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 where images could not be decoded, or raises OodlibError for
    bad input.
    """
    given = _parser().parse_args(arguments)
    if given.detector_file and (given.detector or given.parameter or given.fit_images):
        raise OodlibError(
            "score: --detector-file brings a fitted detector; --detector, -p and --fit-images "
            "would make another one. Give one or the other."
        )
    if not 0 < given.tpr <= 1:
        raise OodlibError(
            f"score: --tpr must lie in (0, 1], got {given.tpr}. It is a fraction, not per cent."
        )
    if given.batch_size < 1 or (given.workers or 0) < 0:
        raise OodlibError(
            "score: --batch-size must be at least 1 and --workers at least 0, got "
            f"{given.batch_size} and {given.workers}."
        )
    places = [("--output", Path(given.output))]
    if given.save_detector is not None:
        places += [
            ("--save-detector", Path(given.save_detector)),
            ("--save-detector", _sidecar(given.save_detector)),
        ]
    if given.cache is not None:
        places += [("--cache", Path(given.cache) / "features")]
    for option, path in places:
        _check_writable(option, path)
    pick_device(given.device)
    network, weights = None, ""
    if given.model:
        network = load_network(given.model, weights=given.weights, num_classes=given.num_classes)
        weights = weights_hash(network[0])
    # all are opened before the work, so that a wrong path costs no time
    images = _source(given.images, network, given)
    ids, fit = (
        _source(path, network, given) if path is not None else None
        for path in (given.id_images, given.fit_images)
    )
    if isinstance(images, FeatureFile):
        weights = _one_head([x for x in (images, ids, fit) if isinstance(x, FeatureFile)])
    limit = None
    if given.detector_file:
        detector, limit = _load(given.detector_file, weights)
        identity = sha256(given.detector_file)
    else:
        detector, identity = _fitted(fit, given)
    if (
        isinstance(images, FeatureFile)
        and images.only_logits
        and detector.info.key not in OF_LOGITS
    ):
        raise OodlibError(
            f"score: {detector.info.key} needs features; {images.path} holds logits alone. Add "
            f"features, weight and bias, or use one of {', '.join(sorted(OF_LOGITS))}."
        )
    if ids is not None:
        bank = ids.bank()
        limit = threshold(detector.score(bank), tpr=given.tpr)
        print(
            f"Threshold {limit:.6g}: {given.tpr:.0%} of {len(bank)} ID images score at most this"
            f"{_accuracy(bank, given.id_images)}."
        )
    if given.save_detector:
        detector.save(given.save_detector)
        write_json(
            _sidecar(given.save_detector),
            {
                "detector": detector.info.key,
                "model": given.model,
                "weights": weights,
                "threshold": limit,
                "tpr": given.tpr,
                "sha256": sha256(given.save_detector),
            },
        )
    n, counts = write_scores(
        images, detector, limit, given.output, identity=f"{weights} {identity}"
    )
    unreadable = counts["unreadable"]
    verdict = "no threshold: give --id-images" if limit is None else f"{counts['OOD']} called OOD"
    print(
        f"{n - unreadable} images scored with {detector.info.key}, {verdict}. Written: "
        f"{given.output}"
    )
    if unreadable:
        print(
            f"warning: {unreadable} of {n} images cannot be decoded; their rows say unreadable.",
            file=sys.stderr,
        )
    return int(unreadable > 0)


def _check_writable(option: str, path: Path) -> None:
    """Before the work: a file can be made at this place, and what stands there may be replaced."""
    if path.exists() and not path.is_file():
        raise OodlibError(
            f"score: {option} {path} is not a regular file, so it cannot be overwritten. Give "
            "the path of a file."
        )
    place = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OodlibError(
            f"score: {option} {path} cannot be written ({error.strerror}: {place}). Give another "
            "place."
        ) from error


def _one_head(files: Sequence[FeatureFile]) -> str:
    """The hash of the head that all files share, in the place of the network's weights."""
    heads = [file.bank(0, 1).head.digest for file in files]
    for file, digest in zip(files, heads, strict=True):
        if digest != heads[0]:
            raise OodlibError(
                f"score: {file.path} and {files[0].path} hold the heads of two networks. Write all "
                "feature files with one network."
            )
    return heads[0]
