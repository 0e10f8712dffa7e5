"""The suite's flows: their image sets, training and scoring that go on after a kill, shipped
folders, names.
"""

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from oodlib import OodlibError
from oodlib.__main__ import main
from oodlib.data import EMBEDDED, ImageSet, assert_disjoint
from oodlib.data.public.prepare import DatasetNotFound
from oodlib.files import sha256
from oodlib.models.shipped import SPECS
from oodlib.models.training.flow import FlowRecipe
from oodlib.studies.flows import runs, specs
from oodlib.studies.flows.runs import FlowRun, flow_run, run_flow, train_and_ship
from oodlib.studies.flows.score_images import SCORES, VARIANTS, dequantised, group_bits
from oodlib.studies.flows.specs import FLOWS, flow_sets, flow_spec
from oodlib.suite import doctor

pytestmark = pytest.mark.filterwarnings("ignore:Glow.initialise. .* images are few")
SHIPPED = sorted(
    path.parent
    for path in (Path(__file__).resolve().parents[3] / "data" / "checkpoints").glob(
        "*_glow_s*/run.json"
    )
)
TINY = replace(
    FLOWS["latin_glow"],
    steps=1,
    hidden=4,
    n_train=60,
    n_validation=20,
    n=20,
    ood=("digits",),
    recipe=FlowRecipe((0, 2, 4), batch_size=20, warmup=1, n_initialise=40),
    shipped=(2, 4),
)
STEPS = (0, 2, 4)  # 2 steps are an epoch


def make(folder: Path, spec=TINY) -> None:
    run_flow(spec, 0, folder, device="cpu", progress=False)


def tables(folder: Path) -> pd.DataFrame:
    return pd.concat(
        [pd.read_parquet(path) for path in sorted(folder.glob("scores_*.parquet"))],
        ignore_index=True,
    )


def results(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.glob("*_*.*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder)
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of that folder."""
    return Path(shutil.copytree(whole, tmp_path / "finished"))


@pytest.fixture
def trained(whole, tmp_path, monkeypatch):
    """A repository where the tiny flow is called latin_glow and has been trained; its path."""
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    monkeypatch.setitem(FLOWS, "latin_glow", TINY)
    shutil.copytree(whole, tmp_path / "data" / "training" / "latin_glow_s0")
    return tmp_path


@pytest.fixture
def library(monkeypatch):
    """Real sets made of noise instead: 40 images of the set's usual size, and which splits were
    asked for.
    """
    asked = []

    def load(name, split):
        asked.append(f"{name}/{split}")
        if name == "svhn":
            raise DatasetNotFound("svhn/test is not available: nowhere.")
        shape = (1, 28, 28) if name in ("omniglot", "kmnist") else (3, 32, 32)
        pixels = np.random.default_rng(len(name)).integers(0, 256, (40, *shape), dtype=np.uint8)
        return ImageSet(name, split, pixels, np.arange(40))

    monkeypatch.setattr("oodlib.data.load", load)
    return asked


# --- image sets


@pytest.mark.parametrize("name", ["latin_glow", "textures_glow"])
def test_fit_id_and_training_images_are_disjoint(name):
    spec = replace(FLOWS[name], ood=(), n_train=300, n_validation=100)
    sets = flow_sets(spec, n_fit=60, n_test=50, n_ood=1)
    training = [
        ImageSet("training", part, x.numpy(), np.zeros(len(x)))
        for part, x in zip(("images", "validation"), spec.training_images(), strict=True)
    ]
    assert [len(x) for x in (*training, *sets.values())] == [200, 100, 60, 50]
    assert_disjoint(*training, *sets.values())


def test_sets_have_the_sizes_and_the_shape_of_the_flow(library):
    spec = replace(FLOWS["fashion_glow"], ood=("cifar10", "kmnist"))
    sets = flow_sets(spec, n_fit=5, n_test=6, n_ood=7)
    assert {name: images.images.shape for name, images in sets.items()} == {
        "fit": (5, 1, 28, 28),
        "id": (6, 1, 28, 28),
        "cifar10": (7, 1, 28, 28),
        "kmnist": (7, 1, 28, 28),
    }
    assert sets["fit"].split == "fit" != sets["id"].split  # each set has noise of its own


def test_too_few_id_images_are_refused(library):
    with pytest.raises(OodlibError, match=r"40 test images, fewer than n_fit \+ n_test = 41"):
        flow_sets(replace(FLOWS["fashion_glow"], ood=()), n_fit=21, n_test=20, n_ood=1)


def test_a_set_that_is_not_at_hand_is_left_out_and_named(library, capsys):
    sets = flow_sets(
        replace(FLOWS["cifar10_glow"], ood=("svhn", "cifar100")), n_fit=5, n_test=5, n_ood=5
    )
    assert list(sets) == ["fit", "id", "cifar100"]
    assert capsys.readouterr().out == "skipped: svhn/test is not available: nowhere.\n"


def test_an_unknown_set_is_an_error():
    with pytest.raises(OodlibError, match="nonsense"):
        flow_sets(replace(TINY, ood=("nonsense",)), n_fit=2, n_test=2, n_ood=2)


def test_omniglot_is_inverted_and_other_sets_are_not(library):
    from oodlib.data import load

    sets = flow_sets(
        replace(FLOWS["mnist_glow"], ood=("omniglot", "kmnist")), n_fit=5, n_test=5, n_ood=9
    )
    for name, split in (("omniglot", "background"), ("kmnist", "test")):
        assert f"{name}/{split}" in library
        original = load(name, split).sample(9, seed=0).images
        np.testing.assert_array_equal(
            sets[name].images, 255 - original if name == "omniglot" else original
        )


def test_a_pooled_flow_trains_on_nothing_that_it_is_validated_or_tested_on(library):
    spec = replace(
        FLOWS["notmnist_glow16"], ood=("omniglot", "cifar10"), n=5, n_validation=4, n_train=20
    )
    sets = flow_sets(spec, n_fit=5, n_test=5, n_ood=3)
    training, validation = (
        ImageSet("x", "", x.numpy(), np.zeros(len(x))) for x in spec.training_images()
    )
    assert {x.images.shape[1:] for x in (training, validation, *sets.values())} == {(1, 16, 16)}
    assert [len(x) for x in (training, validation, *sets.values())] == [20, 4, 5, 5, 3, 3]
    assert {"notmnist/test", "omniglot/evaluation", "cifar10/test"} == set(
        library
    )  # one split for all its parts
    assert_disjoint(training, validation, sets["fit"], sets["id"])
    with pytest.raises(OodlibError, match=r"behind the first 10 of notmnist; n_fit \+ n_test = 11"):
        flow_sets(spec, n_fit=6, n_test=5, n_ood=3)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_jpeg_copies_are_those_of_pillow(shape):
    from io import BytesIO

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    copies = specs._jpeg(ImageSet("cifar10", "test", pixels, np.arange(3)))
    assert (
        copies.name == "cifar10-jpeg"
        and copies.images.shape == pixels.shape
        and copies.labels.tolist() == [0, 1, 2]
    )
    for original, copy in zip(pixels, copies.images, strict=True):
        file = BytesIO()
        picture = original[0] if len(original) == 1 else np.moveaxis(original, 0, 2)
        Image.fromarray(picture).save(file, "JPEG", quality=75)
        decoded = np.asarray(Image.open(file))
        np.testing.assert_array_equal(
            copy[0] if len(copy) == 1 else np.moveaxis(copy, 0, 2), decoded
        )
        assert (copy != original).mean() > 0.5


def test_jpeg_copies_come_from_id_images_that_are_not_tested_otherwise(library):
    spec = replace(FLOWS["cifar10_glow"], ood=("cifar10-jpeg",))
    sets = flow_sets(spec, n_fit=10, n_test=12, n_ood=8)
    everything = flow_sets(spec, n_fit=22, n_test=8, n_ood=1)
    assert (
        sets["cifar10-jpeg"].labels.tolist() == everything["id"].labels.tolist()
    )  # labels number the images
    assert len(np.unique(np.concatenate([images.labels for images in sets.values()]))) == 30


def test_no_id_image_left_for_jpeg_copies_is_an_error(library):
    with pytest.raises(OodlibError, match="cifar10/test: the set is empty"):
        flow_sets(
            replace(FLOWS["cifar10_glow"], ood=("cifar10-jpeg",)), n_fit=20, n_test=20, n_ood=8
        )


# --- training and scoring


def test_a_run_keeps_weights_and_scores_at_every_step(whole):
    assert {path.name for path in whole.iterdir()} == {"resume.pt", "run.json"} | {
        f"{kind}_{step:07d}.{suffix}"
        for step in STEPS
        for kind, suffix in (("step", "safetensors"), ("step", "json"), ("scores", "parquet"))
    }


def test_the_table_has_every_set_at_every_step_and_variants_at_two(whole):
    table = tables(whole)
    assert table.groupby(["step", "set", "group_size"]).size().to_dict() == {
        (step, name, size): 20 // size
        for step in STEPS
        for name in ("id", "digits")
        for size in (1, 5)
    }
    assert not table[list(SCORES)].isna().to_numpy().any()
    for name in VARIANTS:  # after one epoch, and at the last step
        assert table[~table[name].isna()].step.unique().tolist() == [2, 4]


def test_the_record_says_what_was_done(whole):
    record = json.loads((whole / "run.json").read_text())
    sets = flow_sets(TINY, n_fit=20, n_test=20, n_ood=20)
    assert record["sets"] == {
        name: {"n": 20, "fingerprint": s.fingerprint} for name, s in sets.items()
    }
    assert (
        record["flow"] == "latin_glow"
        and record["n_train"] == 40
        and record["network"]["hidden"] == 4
    )
    assert [row["step"] for row in record["history"]] == list(STEPS)
    assert record["weights"] == sha256(whole / "step_0000004.safetensors")


def test_only_what_is_missing_is_made_again(finished, monkeypatch):
    before, scored = results(finished), []
    monkeypatch.setattr(
        runs,
        "score_flow",
        lambda *given, real=runs.score_flow, **options: (
            scored.append(options["variants"]),
            real(*given, **options),
        )[1],
    )
    (finished / "scores_0000002.parquet").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in finished.glob("*_*.*")}
    make(finished)
    assert scored == [True] and results(finished) == before
    assert all((finished / name).stat().st_mtime_ns == time for name, time in times.items())


def test_scores_of_other_sets_are_made_again(finished):
    make(finished, replace(TINY, ood=("greek",)))
    assert set(tables(finished)["set"]) == {"id", "greek"} and len(tables(finished)) == 3 * 2 * (
        20 + 4
    )


def kill_while_writing(folder: str) -> None:
    """Killed by SIGKILL when half of the second table is written."""
    real, count = pd.DataFrame.to_parquet, iter(range(9))

    def write(table, path, **options):
        real(table, path, **options)
        if next(count) == 1:
            os.truncate(path, 1000)
            os.kill(os.getpid(), signal.SIGKILL)

    pd.DataFrame.to_parquet = write
    make(Path(folder), replace(TINY, ood=()))


def test_a_run_killed_while_scoring_completes_with_the_same_table(whole, tmp_path, killed_process):
    killed_process("test_runs", f"kill_while_writing({str(tmp_path)!r})")
    assert [path.name for path in tmp_path.glob("scores_*")] == ["scores_0000000.parquet"]
    assert len(list(tmp_path.glob(".scores_*"))) == 1  # the half that nobody reads
    make(tmp_path, replace(TINY, ood=()))
    known = (
        tables(whole).query("set == 'id'").reset_index(drop=True)
    )  # not changed by the OOD sets beside them
    pd.testing.assert_frame_equal(tables(tmp_path), known)


def test_damaged_weights_are_named(finished):
    path = finished / "step_0000002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (finished / "scores_0000002.parquet").unlink()
    with pytest.raises(OodlibError, match=r"step_0000002\.safetensors is damaged.*Restore it"):
        make(finished)


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_a_damaged_record_of_weights_is_named(finished):
    half(finished / "step_0000002.json")
    (finished / "scores_0000002.parquet").unlink()
    with pytest.raises(OodlibError, match=r"step_0000002\.json is damaged.*Restore it"):
        make(finished)


def test_damaged_scores_are_named_and_made_again_once_deleted(finished, whole):
    path = finished / "scores_0000002.parquet"
    half(path)
    with pytest.raises(
        OodlibError, match=r"scores_0000002\.parquet is missing or damaged.*delete it"
    ):
        make(finished)
    path.unlink()
    make(finished)
    assert results(finished) == results(whole)


def test_scores_without_the_variants_of_their_moment_are_made_again(finished, whole):
    path = finished / "scores_0000004.parquet"
    pd.read_parquet(path).drop(columns=list(VARIANTS)).to_parquet(path, index=False)
    make(finished)
    pd.testing.assert_frame_equal(tables(finished), tables(whole))


def test_a_full_size_flow_has_the_variants_after_ten_epochs_too(tmp_path, monkeypatch):
    spec = replace(
        TINY, name="paper_cifar10_glow", n=10, recipe=replace(TINY.recipe, snapshots=(0, 2, 20, 22))
    )
    asked: dict[int, bool] = {}
    monkeypatch.setattr(
        runs,
        "score_flow",
        lambda *given, variants, progress: (
            asked.update({len(asked): variants}),
            pd.DataFrame({"group_size": [1], "set": ["id"]}),
        )[1],
    )
    make(tmp_path, spec)
    assert list(asked.values()) == [False, True, True, True]


# --- runs by name


def test_an_unknown_flow_names_the_known_ones():
    for call in (flow_spec, lambda name: flow_run(f"{name}:0"), train_and_ship):
        with pytest.raises(
            OodlibError, match=r"no flow 'latin_flow'.*latin_glow, .*paper_imagenet32_glow"
        ):
            call("latin_flow")


@pytest.mark.parametrize("name", ["latin_glow", "latin_glow:", "latin_glow:x", "latin_glow:-1"])
def test_a_run_needs_a_seed(name):
    with pytest.raises(
        OodlibError, match="needs a seed or live behind the colon: latin_glow:0 or latin_glow:live"
    ):
        flow_run(name)


def test_a_seed_that_is_not_there_says_the_command(trained):
    with pytest.raises(OodlibError, match="python -m oodlib train latin_glow --seed 77"):
        flow_run("latin_glow:77")


def test_a_run_that_was_trained_here_is_found(trained, whole):
    run = flow_run("latin_glow:0")
    assert isinstance(run, FlowRun) and (run.name, run.seed, run.spec) == ("latin_glow:0", 0, TINY)
    assert run.weights == list(
        STEPS
    ) == run.history.step.tolist() and run.history.epoch.tolist() == [0, 1, 2]
    pd.testing.assert_frame_equal(run.scores, tables(whole))
    model, kept = run.model(4), load_file(whole / "step_0000004.safetensors")
    assert not model.training and all(
        torch.equal(v, kept[name]) for name, v in model.state_dict().items()
    )


@pytest.mark.parametrize("name", ["run.json", "scores_0000002.parquet"])
@pytest.mark.parametrize("damage", [half, Path.unlink, lambda path: path.write_text("{}")])
def test_a_damaged_or_missing_file_of_a_run_is_named(trained, name, damage):
    flow_run("latin_glow:0")
    damage(trained / "data" / "training" / "latin_glow_s0" / name)
    with pytest.raises(
        OodlibError, match=f"{name} is (missing or damaged|damaged|incomplete)|neither shipped nor"
    ):
        flow_run("latin_glow:0")


def test_scores_of_steps_outside_the_history_do_not_count(trained, whole):
    folder = trained / "data" / "training" / "latin_glow_s0"
    shutil.copy(folder / "scores_0000004.parquet", folder / "scores_0000008.parquet")
    pd.testing.assert_frame_equal(flow_run("latin_glow:0").scores, tables(whole))


def test_weights_of_a_step_that_was_not_kept_name_those_that_were(trained):
    with pytest.raises(
        OodlibError, match=r"Present: step_0000000, step_0000002, step_0000004.*train latin_glow"
    ):
        flow_run("latin_glow:0").model(3)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_live_flow_is_trained_once_by_one_thread(tmp_path, monkeypatch, two_threads):
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    monkeypatch.setitem(
        FLOWS, "latin_glow", replace(TINY, ood=(), recipe=replace(TINY.recipe, snapshots=(0, 1)))
    )
    used: list[int] = []
    monkeypatch.setattr(
        runs,
        "run_flow",
        lambda *given, real=runs.run_flow, **options: (
            used.append(torch.get_num_threads()),
            real(*given, **options, progress=False),
        ),
    )
    first, again = (
        flow_run("latin_glow:live", n_fit=10, n_test=10, device="cpu") for _ in range(2)
    )
    assert used == [1] and torch.get_num_threads() == 2
    assert first.folder == again.folder and first.scores.equals(again.scores)
    assert flow_run("latin_glow:live", n_fit=11, n_test=10, device="cpu").folder != first.folder


@pytest.mark.parametrize("id_set", ["cifar10", "svhn", "celeba", "gtsrb", "imagenet32"])
def test_epochs_of_full_size_flows_are_those_of_their_images(id_set):
    spec = FLOWS[f"paper_{id_set}_glow"]
    epoch = (
        spec.n_train - spec.n_validation
    ) // spec.recipe.batch_size  # as `train_flow` counts them
    assert {epoch, 10 * epoch, 250 * epoch} <= set(spec.recipe.snapshots) and spec.recipe.snapshots[
        -1
    ] == 250 * epoch


def test_networks_follow_the_seed():
    one, same, other = (
        TINY.network(seed).state_dict()["levels.0.steps.0.mix.lower"] for seed in (3, 3, 4)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


# --- shipping


def test_shipped_weights_are_half_precision_and_give_the_same_likelihoods(trained, whole):
    target = train_and_ship("latin_glow", device="cpu")
    assert target == trained / "data" / "checkpoints" / "latin_glow_s0"
    state = load_file(target / "step_0000004.safetensors")
    assert {v.dtype for name, v in state.items() if name != "initialised"} == {torch.float16}
    run = flow_run("latin_glow:0")
    assert run.folder == target and run.weights == [2, 4] and run.model(4).initialised
    pd.testing.assert_frame_equal(run.scores, tables(whole))
    assert nll_error(run, 4) < 0.02
    assert not list(target.glob("resume*"))


def test_of_a_full_size_flow_nothing_is_shipped(trained, monkeypatch):
    monkeypatch.setitem(FLOWS, "paper_cifar10_glow", replace(TINY, name="paper_cifar10_glow"))
    (trained / "data" / "training" / "latin_glow_s0").rename(
        trained / "data" / "training" / "paper_cifar10_glow_s0"
    )
    assert train_and_ship("paper_cifar10_glow", device="cpu").parent.name == "training"
    assert not (trained / "data" / "checkpoints").exists()


def nll_error(run: FlowRun, step: int) -> float:
    """Largest difference between the stored bits per dim of "id" images and those of the weights at
    hand.
    """
    sizes = {name: entry["n"] for name, entry in run.record["sets"].items()}
    images = flow_sets(replace(run.spec, ood=()), n_fit=sizes["fit"], n_test=sizes["id"], n_ood=1)[
        "id"
    ]
    assert images.fingerprint == run.record["sets"]["id"]["fingerprint"]
    table = run.scores
    rows = table[
        (table.step == step) & (table["set"] == "id") & (table.group_size == 1)
    ].sort_values("index")
    found = group_bits(run.model(step), dequantised(images)) / np.prod(run.spec.image_shape)
    return float(np.abs(found - rows.nll.to_numpy()).max())


def shipped_run(folder: Path) -> FlowRun:
    name, _, seed = folder.name.rpartition("_s")
    return flow_run(f"{name}:{seed}")


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_folder_is_complete(folder):
    run = shipped_run(folder)
    recipe, sets = run.spec.recipe, {**run.record["sets"]}
    assert {"decay": "none"} | run.record["recipe"] == json.loads(json.dumps(asdict(recipe)))
    assert run.history.step.tolist() == sorted(run.scores.step.unique()) == list(recipe.snapshots)
    del sets["fit"]
    assert {name.removesuffix("-incomplete") for name in sets} - {"id"} <= set(run.spec.ood)
    assert run.scores.groupby(["step", "set", "group_size"]).size().to_dict() == {
        (step, name, size): entry["n"] // size
        for step in recipe.snapshots
        for name, entry in sets.items()
        for size in (1, 5)
    }
    assert not run.scores[list(SCORES)].isna().to_numpy().any()
    assert set(run.scores[~run.scores.density_released.isna()].step) >= {recipe.snapshots[-1]}
    assert run.weights == (sorted(run.spec.shipped) if run.seed == 0 else [])
    for step in run.weights:
        run.model(step)


@pytest.mark.parametrize(
    "folder",
    [folder for folder in SHIPPED if list(folder.glob("step_*"))],
    ids=lambda folder: folder.name,
)
def test_shipped_weights_reproduce_the_stored_likelihoods(folder):
    run = shipped_run(folder)
    if run.spec.id_set not in EMBEDDED:
        pytest.skip("the images are not embedded")
    assert max(nll_error(run, step) for step in run.weights) < 0.02


# --- the command line


def test_an_unknown_recipe_names_flows_and_classifiers(capsys):
    assert main(["train", "latin_glow", "nonsense"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "'nonsense'" in shown
    assert all(name in shown for name in (*SPECS, *FLOWS))


@pytest.mark.parametrize("place", ["omniglot", "omniglot/raw"])
@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("images_background.zip", "background"),
        ("images_background_small1.zip", "background"),
        ("images_evaluation.zip", "evaluation"),
    ],
)
def test_doctor_sees_the_zips_of_omniglot_in_the_mirror(tmp_path, monkeypatch, place, file, split):
    (tmp_path / "mirror" / place).mkdir(parents=True)
    (tmp_path / "mirror" / place / file).touch()
    monkeypatch.setenv("OODLIB_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("OODLIB_DATA", str(tmp_path / "data"))
    present, missing = doctor._image_sets()
    assert present == [f"omniglot/{split}"] and len(missing) > 10
