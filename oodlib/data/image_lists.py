"""ImageNet-scale sets: image lists in OpenOOD's format or plain folders, decoded by worker processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from oodlib.errors import OodlibError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PAPER_SETS", "ImageList", "PaperSet", "class_remap", "describe_paper_sets", "image_loader",
           "open_paper_set", "paper_set_status", "read_list"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class PaperSet:
    """One set of the ``paper`` profile; nothing of it can be downloaded here, so this says what a user must provide.

    Attributes
    ----------
    tree : the folder expected below the data root
    counts : image counts that a correct copy may have, with the protocol each belongs to
    list_name : OpenOOD's list below ``benchmark_imglist/imagenet/``, "" if it has none
    size : on disk, "unknown" where our sources do not say
    needs_list : its folder holds other sets' images too, so it exists through its list only
    """

    name: str
    title: str
    role: str
    source: str
    terms: str
    tree: str
    counts: dict[str, int]
    list_name: str = ""
    size: str = "unknown"
    root: str = "images_largescale"
    needs_list: bool = False


_MOS = "sampled for MOS (arXiv 2105.01879): pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset/"
PAPER_SETS: dict[str, PaperSet] = {entry.name: entry for entry in (
    PaperSet("imagenet-1k", "ImageNet-1k (ILSVRC 2012) validation", "ID", "image-net.org, on registration",
             "ImageNet terms: non-commercial research", "images_largescale/imagenet_1k/val/<WordNet id>/*.JPEG",
             {"GradNorm": 50_000, "OpenOOD test": 45_000}, "test_imagenet.txt"),
    PaperSet("imagenet-1k-train", "ImageNet-1k training images", "for methods that are fitted",
             "image-net.org, on registration", "ImageNet terms: non-commercial research",
             "images_largescale/imagenet_1k/train/<WordNet id>/*.JPEG", {"ImageNet": 1_281_167}, "train_imagenet.txt"),
    PaperSet("inaturalist", "iNaturalist, 10,000 plant images", "far-OOD", _MOS + "iNaturalist.tar.gz", "unknown",
             "images_largescale/inaturalist/**/*.jpg", {"GradNorm": 10_000, "OpenOOD": 10_000}, "test_inaturalist.txt"),
    PaperSet("sun", "SUN, 10,000 images", "OOD of the GradNorm paper", _MOS + "SUN.tar.gz", "unknown",
             "images_largescale/sun/**/*.jpg", {"GradNorm": 10_000}),
    PaperSet("places", "Places, 10,000 images", "OOD of the GradNorm paper", _MOS + "Places.tar.gz", "unknown",
             "images_largescale/places/**/*.jpg", {"GradNorm": 10_000}),
    PaperSet("textures", "Describable Textures", "far-OOD", "www.robots.ox.ac.uk/~vgg/data/dtd/",
             "research use (Oxford VGG)", "images_classic/texture/<class>/*.jpg",
             {"GradNorm": 5_640, "OpenOOD": 5_160}, "test_textures.txt", root="images_classic"),
    PaperSet("ninco", "NINCO, 64 classes", "near-OOD", "github.com/j-cb/NINCO (arXiv 2306.00826)", "unknown",
             "images_largescale/ninco/<class>/*", {"OpenOOD": 5_879}, "test_ninco.txt"),
    PaperSet("ssb-hard", "SSB-hard", "near-OOD", "OpenOOD v1.5 (arXiv 2306.09301)", "unknown",
             "images_largescale/ssb_hard/<WordNet id>/*", {"OpenOOD": 49_000}, "test_ssb_hard.txt"),
    PaperSet("openimage-o", "OpenImage-O", "far-OOD", "OpenOOD v1.5 (arXiv 2306.09301)", "unknown",
             "images_largescale/openimage_o/**/*.jpg", {"OpenOOD": 15_869}, "test_openimage_o.txt"),
    PaperSet("openimage-o-val", "OpenImage-O, OpenOOD's validation part", "OOD validation", "OpenOOD v1.5 "
             "(arXiv 2306.09301)", "unknown", "images_largescale/openimage_o/**/*.jpg", {"OpenOOD": 1_763},
             "val_openimage_o.txt", needs_list=True),
)}


def read_list(list_file: str | os.PathLike[str]) -> list[tuple[str, int]]:
    """Rows ``path label`` of an image list in OpenOOD's format, split at the first space only.

    A label that is not an integer (OpenOOD's ``_mos`` lists hold a mapping there) raises OodlibError, as do a missing
    and an empty list.
    """
    try:
        text = Path(list_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OodlibError(f"{list_file}: the image list cannot be read ({error}). Check its path.") from error
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            path, _, label = line.strip().partition(" ")
            try:
                rows.append((path, int(label)))
            except ValueError as error:
                raise OodlibError(f"{list_file}, line {number}: expected 'path label' with an integer label, got "
                                  f"{line.strip()[:80]!r}. Use a list in OpenOOD's format.") from error
    if not rows:
        raise OodlibError(f"{list_file}: the image list is empty. Check the file.")
    return rows


def _folder_rows(root: Path) -> list[tuple[str, int]]:
    """All images below a folder, sorted; the label is the rank of the first-level folder, -1 without such folders."""
    paths = sorted(p.relative_to(root) for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise OodlibError(f"{root}: no image was found in this folder. Check the path, and that it was unpacked.")
    classes = sorted({p.parts[0] for p in paths if len(p.parts) > 1})
    rank = {name: i for i, name in enumerate(classes)}
    return [(p.as_posix(), rank[p.parts[0]] if len(p.parts) > 1 else -1) for p in paths]


class ImageList(Dataset[tuple[Any, int]]):
    """Images on disk with labels, decoded on access and passed through any transform of PIL images.

    Parameters
    ----------
    root : folder that the list's paths are relative to
    rows : the list file, or (path, label) pairs; without it, every image below ``root`` (label = rank of its folder)
    transform : for example timm's ``create_transform(**resolve_model_data_config(model), is_training=False)`` or
        torchvision's ``weights.transforms()``; without it, items are PIL images
    name : for messages and provenance

    Attributes
    ----------
    paths, labels : in the order of the rows; ``labels`` is (n,) int64

    Raises
    ------
    OodlibError : empty list, a listed file is missing, or (on access) an image does not decode
    """

    def __init__(self, root: str | os.PathLike[str],
                 rows: str | os.PathLike[str] | Sequence[tuple[str, int]] | None = None, *,
                 transform: Callable[[Any], Any] | None = None, name: str = ""):
        self.root, self.transform = Path(root), transform
        self.name = name or self.root.name
        origin = f"{self.root} (list)"
        if rows is None:
            rows = _folder_rows(self.root)
        elif isinstance(rows, str | os.PathLike):
            origin, rows = str(rows), read_list(rows)
        if not rows:
            raise OodlibError(f"ImageList {self.name}: no rows were given. Check the list or the filter.")
        self.paths = [path for path, _ in rows]
        self.labels = np.array([label for _, label in rows], dtype=np.int64)
        missing = [path for path in self.paths if not (self.root / path).is_file()]
        if missing:
            raise OodlibError(f"{origin}: {len(missing)} of {len(self.paths)} listed files are missing, the first is "
                              f"{self.root / missing[0]}. Check the image root, or unpack the archive again.")

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over the rows, the sizes and times of the files, and what the transform does."""
        digest = hashlib.sha256(repr(self.transform).encode())
        for path, label in zip(self.paths, self.labels, strict=True):
            stat = (self.root / path).stat()
            digest.update(f"{path} {label} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def picture(self, index: int) -> Image.Image:
        """An image as it is on disk, in RGB; OodlibError if it does not decode."""
        from PIL import Image

        path = self.root / self.paths[index]
        try:
            with Image.open(path) as picture:
                return picture.convert("RGB")
        except Exception as error:                # Pillow raises many types for broken data
            raise OodlibError(f"{path}: the image cannot be decoded ({type(error).__name__}). Copy or download it "
                              "again.") from error

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.picture(index)
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])


def image_loader(images: ImageList, *, batch_size: int = 64, workers: int | None = None) -> DataLoader:
    """Batches in the order of the list, decoded by worker processes (default: one per core, at most 16)."""
    if images.transform is None:
        raise OodlibError(f"image_loader: {images.name} has no transform, so its images cannot be stacked. "
                          "Give ImageList the model's transform.")
    workers = min(16, os.cpu_count() or 1) if workers is None else workers
    return DataLoader(images, batch_size=batch_size, num_workers=workers, shuffle=False,
                      pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0)


def class_remap(checkpoint_list: str | os.PathLike[str], reference: Sequence[tuple[str, int]]) -> NDArray[np.int64]:
    """Which reference class each output of a checkpoint means, from two lists of the same images.

    The BiT checkpoint of the GradNorm paper has MOS's class order (``imagenet2012_val_list.txt`` of its repository);
    with folder order its accuracy is about 0.1 %. ``logits[:, np.argsort(class_remap(...))]`` is in reference order.

    Parameters
    ----------
    checkpoint_list : list file in the checkpoint's label order
    reference : rows in the order wanted, for example ``read_list(...)``; images are matched by file name

    Returns
    -------
    (C,) int64, a permutation

    Raises
    ------
    OodlibError : the lists share too few images, or contradict each other
    """
    labels = {Path(path).name: label for path, label in reference}
    pairs = {(label, labels[Path(path).name]) for path, label in read_list(checkpoint_list)
             if Path(path).name in labels}
    n = len(pairs)
    if n == 0 or {a for a, _ in pairs} != set(range(n)) or {b for _, b in pairs} != set(range(n)):
        raise OodlibError(f"class_remap: {checkpoint_list} and the reference list do not give a one-to-one map of "
                          f"classes ({n} pairs of labels seen). Both must list the same images of every class.")
    return np.array([b for _, b in sorted(pairs)], dtype=np.int64)


def open_paper_set(name: str, data_root: str | os.PathLike[str], *, transform: Callable[[Any], Any] | None = None,
                   list_file: str | os.PathLike[str] | None = None) -> ImageList:
    """A set of the paper profile below ``data_root``: by ``list_file``, else OpenOOD's list, else all of its folder."""
    if name not in PAPER_SETS:
        raise OodlibError(f"There is no paper-profile set {name!r}. Known: {', '.join(PAPER_SETS)}.")
    entry, root = PAPER_SETS[name], Path(data_root)
    default = root / "benchmark_imglist" / "imagenet" / entry.list_name
    if list_file is None and entry.list_name and default.is_file():
        list_file = default
    if list_file is not None:
        return ImageList(root / entry.root, list_file, transform=transform, name=name)
    folder = _folder(entry, root)
    if entry.needs_list:
        raise OodlibError(f"{name}: the list {default} is missing; its folder alone does not say which images belong "
                          f"to it. Source: {entry.source}.")
    if not folder.is_dir():
        raise OodlibError(f"{name}: the folder {folder} is missing. Expected tree: {entry.tree}; "
                          f"source: {entry.source}.")
    return ImageList(folder, transform=transform, name=name)


def _folder(entry: PaperSet, root: Path) -> Path:
    return root / entry.tree.split("/<")[0].split("/**")[0]


def paper_set_status(data_root: str | os.PathLike[str]) -> dict[str, str]:
    """For each set, what is present: "absent", or the number of images and which protocol's count it meets."""
    out = {}
    for name, entry in PAPER_SETS.items():
        try:
            n = len(open_paper_set(name, data_root))
        except OodlibError as error:
            folder = _folder(entry, Path(data_root))
            out[name] = f"damaged: {error}" if folder.is_dir() and any(folder.iterdir()) else "absent"
            continue
        meets = [protocol for protocol, count in entry.counts.items() if count == n]
        out[name] = f"{n:,} images, " + (f"as {' and '.join(meets)}" if meets else "which no known protocol has")
    return out


def describe_paper_sets(data_root: str | os.PathLike[str]) -> str:
    """For each set of the paper profile: source, terms, size, expected tree and counts, and what is present."""
    status, lines = paper_set_status(data_root), []
    for name, entry in PAPER_SETS.items():
        counts = ", ".join(f"{count:,} ({protocol})" for protocol, count in entry.counts.items())
        lines += [f"{name}: {entry.title} [{entry.role}]", f"  source    {entry.source}", f"  terms     {entry.terms}",
                  f"  size      {entry.size}", f"  expected  {entry.tree}", f"  counts    {counts}"]
        if entry.list_name:
            lines.append(f"  list      benchmark_imglist/imagenet/{entry.list_name} (optional)")
        lines.append(f"  present   {status[name]}")
    lines += ["imagenet200_resnet18:0, :1, :2: OpenOOD v1.5's networks for ImageNet-200 [images of ImageNet-1k]",
              "  source    OpenOOD's archive imagenet200_res18_v1.5, and its benchmark_imglist",
              "  expected  results/imagenet200_resnet18_224x224_base_e90_lr0.1_default/s<seed>/best.ckpt",
              "  lists     benchmark_imglist/imagenet200/{train,test}_imagenet200.txt"]
    return "\n".join(lines)
