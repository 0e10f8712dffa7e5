"""The images that the models of a small pool are scored on, checked and cached on disk.

Beside pretrained checkpoints lie the hashes of the images that they were pretrained on,
``seen_<set>-<fingerprint>.safetensors``: what counts is what a checkpoint has seen, not what would
be drawn today.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from oodlib.data.images import ImageSet
from oodlib.files import atomic_folder, key_of, locked, read_sealed, write_sealed
from oodlib.studies.vits.image_sets import (
    TASKS,
    assert_never_trained_on,
    pool_sets,
    short_hashes,
    training_images,
)
from oodlib.studies.vits.recipes import shipped_folder, trained_folder
from oodlib.workspace import code_hash, root


def scored_sets(pool: str, *, n_fit: int, n_test: int, n_ood: int) -> dict[str, ImageSet]:
    """`pool_sets`, drawn and checked by the first process that asks, then memory-mapped.

    Raises
    ------
    OodlibError : as `pool_sets`; an image that a model of the pool is trained on
    """
    sizes = {"n_fit": n_fit, "n_test": n_test, "n_ood": n_ood}
    seen = sorted(path.name for path in _seen(pool))
    folder = (
        root() / "data" / "cache" / "vit_sets" / key_of([pool, sizes, seen, code_hash(__name__)])
    )
    with locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            sets = pool_sets(pool, **sizes)
            check_test_images(pool, sets)
            with atomic_folder(folder) as temporary:
                for number, (name, images) in enumerate(sets.items()):
                    np.save(temporary / f"{number:02d}.{name}.images.npy", images.images)
                    np.save(temporary / f"{number:02d}.{name}.labels.npy", images.labels)
    found = {}
    for path in sorted(folder.glob("*.images.npy")):
        labels = np.load(path.with_name(path.name.replace(".images.", ".labels.")))
        name = path.name.split(".")[1]
        found[name] = ImageSet(name, pool, np.load(path, mmap_mode="r"), labels)
    return found


def check_test_images(pool: str, sets: Mapping[str, ImageSet]) -> None:
    """`assert_never_trained_on`, with the hashes of what the pool's checkpoints have seen.

    The pretraining set itself is read or drawn where there are none.
    """
    from safetensors.numpy import load_file

    task = TASKS[pool]
    known: set[str] = set()
    for path in _seen(pool):
        read_sealed(path, "check_test_images", "Restore both files from git, or delete both.")
        hashes = load_file(path)["hashes"].view(np.uint64)
        known |= {f"{value:016x}" for value in hashes}
    training = {
        task.id_set: short_hashes(training_images(pool, task.id_set)),
        task.pretraining: known or short_hashes(training_images(pool, task.pretraining)),
    }
    assert_never_trained_on(pool, sets, training=training)


def write_seen(folder: Path, name: str, images: ImageSet) -> None:
    """Write the hashes of the images of a set that a checkpoint in ``folder`` is pretrained on."""
    from safetensors.numpy import save_file

    fingerprint = images.fingerprint
    hashes = np.array([int(digest, 16) for digest in short_hashes(images)], dtype=np.uint64)
    arrays = {"hashes": np.sort(hashes).view(np.int64)}
    record = {
        "set": f"{images.name}/{images.split}",
        "images": len(images),
        "fingerprint": fingerprint,
        "hashes": "first 64 bits of the BLAKE2b hash of each image's pixels, sorted, unsigned",
    }
    path = folder / f"seen_{name}-{fingerprint[:16]}.safetensors"
    write_sealed(path, lambda temporary: save_file(arrays, temporary), record)


def _seen(pool: str) -> list[Path]:
    pattern = f"seen_{TASKS[pool].pretraining}-*.safetensors"
    folders = (shipped_folder(pool), trained_folder(pool) / "pretrained")
    return [path for folder in folders for path in folder.glob(pattern)]
