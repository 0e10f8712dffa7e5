"""One forward pass over a data set, into a FeatureBank: features, logits, earlier layers."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler, Subset
from tqdm import tqdm

from oodlib.arrays import to_numpy
from oodlib.data.images import ImageSet
from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank, Head, check_head
from oodlib.features.stores import DiskStore, MemoryStore
from oodlib.files import key_of, locked
from oodlib.models.device import model_code_hash, pick_device, weights_hash
from oodlib.models.hooks import eval_mode, find_head
from oodlib.models.training.augment import normalise
from oodlib.workspace import code_hash

Stats = Sequence[float]
Batch = tuple[Tensor, Tensor]


class _Taps:
    """Forward hooks that record the head's input and the named layers of the current batch."""

    def __init__(self, model: nn.Module, head: str, layers: Sequence[str]):
        modules = dict(model.named_modules())
        unknown = [name for name in layers if name not in modules]
        if unknown:
            raise OodlibError(
                f"extract: the model has no layer {unknown[0]!r}. Its top-level layers are "
                f"{', '.join(n for n, _ in model.named_children())}."
            )
        self.features = torch.empty(0)
        self.layers: dict[str, Tensor] = {}
        self._aspect = 0.0
        self._handles = [
            model.register_forward_pre_hook(self._picture),
            modules[head].register_forward_pre_hook(self._head_input),
            *(modules[name].register_forward_hook(self._layer(name)) for name in layers),
        ]

    def _head_input(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0].flatten(1)

    def _picture(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].ndim == 4:
            self._aspect = math.log(inputs[0].shape[2] / inputs[0].shape[3])

    def _layer(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if output.ndim == 4:  # (n, channels, h, w), or Swin's (n, h, w, channels)
                output = output.mean((1, 2) if self._channels_last(output) else (2, 3))
            elif output.ndim == 3:  # (n, tokens, width): mean over tokens
                output = output.mean(1)
            self.layers[name] = output

        return hook

    def _channels_last(self, output: Tensor) -> bool:
        """Whether its first two dimensions fit the picture's shape better than the last two."""

        def misfit(height: int, width: int) -> float:
            return abs(math.log(height / width) - self._aspect)

        _, a, b, c = output.shape
        return misfit(a, b) < misfit(b, c)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _read_head(module: nn.Module) -> Head:
    weight = to_numpy(module.weight).reshape(len(module.weight), -1).copy()  # type: ignore[arg-type]
    if module.bias is None:
        return Head(weight, np.zeros(len(weight), weight.dtype))
    return Head(weight, to_numpy(module.bias).copy())


def batches(
    data: ImageSet | Iterable[Batch],
    *,
    batch_size: int = 250,
    mean: Stats | None = None,
    std: Stats | None = None,
    start: int = 0,
) -> Iterator[Batch]:
    """Batches of network input and labels, from row ``start`` on; arguments as in `extract`."""
    if isinstance(data, ImageSet):
        if mean is None or std is None:
            raise OodlibError(
                "extract: an ImageSet holds raw pixels, so mean= and std= of the network are "
                "needed (one number per channel, in units of pixel / 255)."
            )
        statistics = torch.tensor(mean), torch.tensor(std)
        for i in range(start, len(data), batch_size):
            pixels, labels = (
                torch.from_numpy(np.array(values[i : i + batch_size]))
                for values in (data.images, data.labels)
            )
            yield normalise(pixels, *statistics), labels
        return
    if isinstance(data, DataLoader) and start:
        data = DataLoader(
            Subset(data.dataset, range(start, len(data.dataset))),  # type: ignore[arg-type]
            batch_size=data.batch_size,
            num_workers=data.num_workers,
            collate_fn=data.collate_fn,
        )
        start = 0
    for x, y in data:
        if start >= len(x):
            start -= len(x)
        else:
            yield x[start:], y[start:]
            start = 0


def _count(data: ImageSet | Iterable[Batch]) -> int:
    if isinstance(data, ImageSet):
        return len(data)
    if isinstance(data, DataLoader):
        if not isinstance(data.sampler, SequentialSampler):
            raise OodlibError(
                "extract: the DataLoader shuffles or samples, so rows would have no fixed order. "
                "Build it with shuffle=False."
            )
        return len(data.dataset)  # type: ignore[arg-type]
    if isinstance(data, Sequence):
        return sum(len(x) for x, _ in data)
    raise OodlibError(
        f"extract: expected an ImageSet, a DataLoader or a list of (x, y) batches, got "
        f"{type(data).__name__}."
    )


def extract(
    model: nn.Module,
    data: ImageSet | Iterable[Batch],
    *,
    mean: Stats | None = None,
    std: Stats | None = None,
    layers: Sequence[str] = (),
    cache: str | Path | None = None,
    model_name: str | None = None,
    fingerprint: str | None = None,
    batch_size: int = 250,
    shard_rows: int = 10_000,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> FeatureBank:
    """Run ``model`` once over ``data``: the input of its linear head, its logits, named layers.

    Works for any classifier whose output is that of one linear layer (timm, torchvision, your own);
    see `find_head`.

    Parameters
    ----------
    model : moved to ``device`` and put in evaluation mode
    data : an ImageSet, an unshuffled DataLoader of (x, y), or a list of such batches
    mean, std : per channel, in units of pixel / 255; for an ImageSet only, other data come
        transformed
    layers : names as in ``model.named_modules()``; each is averaged over positions or tokens to
        (N, d)
    cache : folder for banks. A finished bank with the same model, weights, transform and data is
        opened instead of computed again, and an interrupted one is resumed after its last shard.
        ``None`` holds everything in memory.
    model_name : for the file name and the key; the class name where not given
    fingerprint : identity of the data behind a loader, needed with ``cache`` (an ImageSet knows its
        own)
    shard_rows : rows in memory at a time with ``cache``, and between two records of progress

    Returns
    -------
    FeatureBank, float32; memory-mapped where ``cache`` is given

    Raises
    ------
    OodlibError : no linear head, a shuffled loader, an unknown layer, logits not of the head
    """
    n = _count(data)
    name = model_name or type(model).__name__
    data_name = f"{data.name}-{data.split}" if isinstance(data, ImageSet) else "loader"
    meta = {"model": name, "data": data_name, "layers": list(layers), "rows": n}
    if cache is not None:
        fingerprint = fingerprint or getattr(getattr(data, "dataset", data), "fingerprint", None)
        if fingerprint is None:
            raise OodlibError(
                "extract: a cache needs fingerprint=, a string that names the data behind the "
                "loader (for example the checksum of its image list)."
            )
        meta |= {
            "weights": weights_hash(model),
            "fingerprint": fingerprint,
            "transform": repr((mean, std)),
            "code": f"{code_hash(__name__)} {model_code_hash(model)}",
        }
    run = partial(stream, model, data, mean=mean, std=std, layers=layers, batch_size=batch_size)
    run = partial(run, shard_rows=shard_rows, device=device, progress=progress)
    if cache is None:
        store = MemoryStore(n)
        for shard in run():
            store.write(shard)
        return FeatureBank.of_arrays(store.arrays, store.head, meta)
    path = Path(cache) / f"{name}-{data_name}-{key_of(meta)}"
    with locked(path.with_name(path.name + ".lock")):  # two notebooks may want the same bank
        if not (path / "bank.json").exists():
            disk = DiskStore(path.with_name(path.name + ".part"), n)
            for shard in run(start=disk.done):
                disk.write(shard)
            disk.finish(path, meta)
    return FeatureBank.load(path)


def stream(
    model: nn.Module,
    data: ImageSet | Iterable[Batch],
    *,
    mean: Stats | None = None,
    std: Stats | None = None,
    layers: Sequence[str] = (),
    batch_size: int = 250,
    shard_rows: int = 10_000,
    device: str | torch.device = "auto",
    progress: bool = True,
    start: int = 0,
) -> Iterator[FeatureBank]:
    """The same pass, bank by bank in the order of the data, from row ``start`` on.

    Parameters as in `extract`; ``shard_rows`` is the size of a bank, rounded up to whole batches
    (the last is smaller).

    Raises
    ------
    OodlibError : as `extract`, and where the data do not hold the announced number of rows
    """
    where, rows = pick_device(device), _count(data)
    title = f"{data.name}-{data.split}" if isinstance(data, ImageSet) else "images"
    parts: list[dict[str, NDArray[Any]]] = []
    done, waiting = start, 0
    head, head_name = Head(np.empty((0, 0)), np.empty(0)), None
    model.to(where)

    def bank() -> FeatureBank:
        return FeatureBank.of_arrays(
            {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}, head
        )

    hidden = None if progress else True
    bar = tqdm(total=rows, initial=start, desc=title, unit="img", disable=hidden)
    with eval_mode(model), bar:
        for x, y in batches(data, batch_size=batch_size, mean=mean, std=std, start=start):
            x = x.to(where, memory_format=torch.channels_last) if x.ndim == 4 else x.to(where)
            if head_name is None:
                head_name = find_head(model, x[:2])
                head = _read_head(model.get_submodule(head_name))
            with _Taps(model, head_name, layers) as taps, torch.inference_mode():
                values = {
                    "logits": model(x),
                    "features": taps.features,
                    "labels": y,
                    **{f"layer.{k}": v for k, v in taps.layers.items()},
                }
            arrays = {k: to_numpy(v if k == "labels" else v.float()) for k, v in values.items()}
            check_head(head, arrays["features"], arrays["logits"], rows=16)
            parts.append(arrays)
            waiting += len(x)
            bar.update(len(x))
            if waiting >= shard_rows:
                yield bank()
                done, parts, waiting = done + waiting, [], 0
        if parts:
            yield bank()
        if done + waiting != rows:
            raise OodlibError(
                f"extract: {title} announced {rows} rows but gave {done + waiting}. "
                "Check the loader's length and drop_last."
            )
