"""``python -m oodlib score``: an OOD score, and a decision, for each of a user's own images, as a CSV file."""

from __future__ import annotations

import argparse
import ast
import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from oodlib.bank import FeatureBank
from oodlib.data.image_lists import SUFFIXES, ImageList, image_loader
from oodlib.errors import OodlibError
from oodlib.extraction import extract, weights_hash
from oodlib.files import sha256, write_json, write_text
from oodlib.metrics import threshold
from oodlib.project import root
from oodlib.scores import Detector, create, load_detector, names

__all__ = ["load_network", "main", "open_images"]


def load_network(name: str, *, weights: str | None = None, num_classes: int | None = None,
                 ) -> tuple[nn.Module, Callable[[Any], Any]]:
    """A classifier in evaluation mode and the transform of PIL images that goes with it.

    Parameters
    ----------
    name : one of the suite's networks (``cifar10_fast``, ``cifar10_fast:1`` for training seed 1, ``latin_fast``), a
        public CIFAR network (``resnet20_cifar10``), or a timm model, best with its tag
    weights, num_classes : for timm only: a file to use instead of timm's download, and its number of classes where
        that is not the model's own
    """
    from oodlib.checkpoints import SPECS, load_trained
    from oodlib.models.public import PUBLIC, paper_model, public_model

    base, _, variant = name.partition(":")
    if base not in SPECS and base not in PUBLIC:
        return paper_model(name, weights, num_classes=num_classes)
    if weights is not None or num_classes is not None:
        raise OodlibError(f"score: {base} comes with its own weights; --weights and --num-classes are for timm models.")
    if variant and (base in PUBLIC or not variant.isdecimal()):
        raise OodlibError(f"score: there is no network {name!r}. The suite's own take a training seed, as in "
                          "cifar10_fast:1; public ones take none.")
    if base in SPECS:
        trained = load_trained(base, seed=int(variant or 0))
        model, mean, std = trained.model, trained.mean, trained.std
    else:
        model, info = public_model(base)
        mean, std = info.mean, info.std
    from torchvision import transforms

    return model, transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor(),
                                      transforms.Normalize(mean, std)])


def open_images(path: str | Path, transform: Callable[[Any], Any]) -> ImageList:
    """The images of a folder (all below it; label = rank of the first-level folder), of a list file, or one image.

    A list holds one path per line, relative to the list's own folder, alone or followed by a space and a label.

    Raises
    ------
    OodlibError : nothing there, no image in it, or a listed file is missing
    """
    path = Path(path)
    if path.is_dir():
        return ImageList(path, transform=transform)
    if not path.is_file():
        raise OodlibError(f"score: {path} is neither a folder nor a file. Give a folder of images, or a text file with "
                          "one path per line.")
    if path.suffix.lower() in SUFFIXES:
        return ImageList(path.parent, [(path.name, -1)], transform=transform)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise OodlibError(f"score: {path} is neither an image ({', '.join(sorted(SUFFIXES))}) nor a text file with "
                          "one path per line.") from error
    return ImageList(path.parent, [_list_row(path.parent, line) for line in lines], transform=transform, name=path.stem)


def _list_row(folder: Path, line: str) -> tuple[str, int]:
    before, _, last = line.rpartition(" ")
    if before and last.removeprefix("-").isdecimal() and not (folder / line).is_file():
        return before, int(last)
    return line, -1


def _bank(model: nn.Module, images: ImageList, given: argparse.Namespace) -> FeatureBank:
    """One pass over the images; a finished one is read from the cache, an interrupted one goes on."""
    try:
        # small shards: on a CPU, 500 large images are minutes of work that an interruption may cost
        return extract(model, image_loader(images, batch_size=given.batch_size, workers=given.workers),
                       cache=given.cache or root() / "data" / "cache" / "banks", shard_rows=500, device=given.device,
                       model_name=given.model.replace(":", "-").replace("/", "-"))
    except OodlibError as error:      # from a worker process it comes wrapped in that process's traceback
        raise OodlibError(str(error).strip().splitlines()[-1].removeprefix("oodlib.errors.OodlibError: ")) from error


def _require_classes(detector: Detector, bank: FeatureBank, where: str) -> None:
    found, classes = np.unique(bank.labels), bank.head.num_classes      # type: ignore[arg-type]
    if detector.info.needs == "labels" and not np.array_equal(found, np.arange(classes)):
        raise OodlibError(f"score: {detector.info.key} learns from classes, so {where} needs one folder for each of "
                          f"the model's {classes} classes, in the model's order by name; it holds "
                          f"{(found >= 0).sum()}.")


def _fitted(model: nn.Module, transform: Callable[[Any], Any], given: argparse.Namespace) -> Detector:
    """The detector named on the command line, fitted where it learns something."""
    name = given.detector or "msp"
    detector = create(name, **{key: _literal(value) for key, value in given.parameter or []})
    if not detector.needs_fit:
        if given.fit_images:
            print(f"{name} learns nothing: --fit-images is not read.")
        return detector
    if not given.fit_images:
        raise OodlibError(f"score: {name} learns from ID training images. Give them with --fit-images, or a "
                          "detector saved earlier with --detector-file.")
    bank = _bank(model, open_images(given.fit_images, transform), given)
    _require_classes(detector, bank, given.fit_images)
    print(f"Fitted on {len(bank)} images{_accuracy(bank)}.")
    return detector.fit(bank)


def _accuracy(bank: FeatureBank) -> str:
    """The model's accuracy, where the labels can be its classes: wrong weights or a wrong transform show here first."""
    known = np.array_equal(np.unique(bank.labels), np.arange(bank.head.num_classes))    # type: ignore[arg-type]
    return f", accuracy {bank.accuracy:.1%}" if known else ""


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
        raise OodlibError(f"score: {_sidecar(path)} should stand beside the detector and hold its threshold ({error}). "
                          "Save the detector again with --save-detector.") from error
    if checksum != sha256(path):
        raise OodlibError(f"score: {path} and {_sidecar(path).name} do not belong together. Save the detector again.")
    if made_with != weights:
        raise OodlibError(f"score: {path} was fitted on a network with weights {made_with[:8]}, this one has "
                          f"{weights[:8]}. Fit it again on this network, or use the old weights.")
    return detector, limit


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m oodlib score", allow_abbrev=False, description="Write an OOD "
                                     "score for each image into a CSV file (path, score, decision). Larger scores "
                                     "mean further from the training data.")
    add = parser.add_argument
    add("--model", required=True, help="timm name with its tag, or cifar10_fast, latin_fast, resnet20_cifar10, ...")
    add("--images", required=True, help="folder, list file (one path per line) or image to score")
    add("--output", default="scores.csv", help="CSV file to write (default: scores.csv)")
    add("--weights", help="weights of a timm model (.safetensors, .pth, .npz); without it timm downloads the tag's")
    add("--num-classes", type=int, help="of the file given by --weights, where not the timm model's own")
    add("--detector", choices=sorted(names()), help="default: msp")
    add("-p", dest="parameter", nargs=2, action="append", metavar=("NAME", "VALUE"),
        help="set a detector's parameter, for example -p k 10")
    add("--fit-images", help="ID training images, for detectors that learn; one folder per class")
    add("--id-images", help="held-out ID images that set the threshold; without it the decision stays empty")
    add("--tpr", type=float, default=0.95, help="share of the ID images to be called ID (default: 0.95)")
    add("--save-detector", metavar="FILE", help="keep the fitted detector and its threshold")
    add("--detector-file", metavar="FILE", help="use a kept one instead of --detector and --fit-images")
    add("--cache", help="folder for features, so that an interrupted run goes on (default: data/cache/banks)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, help="processes that decode images (default: one per core)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or raises OodlibError for bad input."""
    given = _parser().parse_args(arguments)
    if given.detector_file and (given.detector or given.parameter or given.fit_images):
        raise OodlibError("score: --detector-file brings a fitted detector; --detector, -p and --fit-images would "
                          "make another one. Give one or the other.")
    model, transform = load_network(given.model, weights=given.weights, num_classes=given.num_classes)
    images = open_images(given.images, transform)          # before the work, so that a wrong path costs no time
    ids = open_images(given.id_images, transform) if given.id_images else None
    weights, limit = weights_hash(model), None
    if given.detector_file:
        detector, limit = _load(given.detector_file, weights)
    else:
        detector = _fitted(model, transform, given)
    if ids is not None:
        bank = _bank(model, ids, given)
        limit = threshold(detector.score(bank), tpr=given.tpr)
        print(f"Threshold {limit:.6g}: {given.tpr:.0%} of {len(bank)} ID images score at most this{_accuracy(bank)}.")
    if given.save_detector:
        detector.save(given.save_detector)
        write_json(_sidecar(given.save_detector), {
            "detector": detector.info.key, "model": given.model, "weights": weights, "threshold": limit,
            "tpr": given.tpr, "sha256": sha256(given.save_detector)})
    scores = detector.score(_bank(model, images, given))
    flagged = None if limit is None else scores > limit
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "score", "decision"])
    for i, (path, score) in enumerate(zip(images.paths, scores.tolist(), strict=True)):
        writer.writerow([images.root / path, score, "" if flagged is None else "OOD" if flagged[i] else "ID"])
    write_text(given.output, text.getvalue())
    verdict = "no threshold: give --id-images" if flagged is None else f"{int(flagged.sum())} called OOD"
    print(f"{len(scores)} images scored with {detector.info.key}, {verdict}. Written: {given.output}")
    return 0
