"""A run beside OpenOOD v1.5: averages over its sets, its leaderboard, what differs."""

from types import SimpleNamespace

import numpy as np

from oodlib.experiments.openood import (
    near_and_far,
    openood_departures,
    openood_published,
    openood_sets,
)
from oodlib.metrics import Board


def bed(id_name="cifar10", **sizes):
    return SimpleNamespace(
        id_name=id_name,
        ood={name.replace("_", "-"): range(n) for name, n in sizes.items()},
        clean_val={"patch_shuffled": None, "notmnist": None},
        test=SimpleNamespace(accuracy=0.93),
        notes={"dtd": "incomplete"},
    )


SIZES = {"cifar100": 4, "mnist": 4, "fashion_mnist": 4}


def test_averages_are_over_openood_s_sets_and_seeds_have_a_spread():
    rng = np.random.default_rng(0)
    scores = {
        name: {"msp": {k: rng.normal(size=4) for k in ("id", "cifar100", "mnist", "fashion-mnist")}}
        for name in ("net:0", "net:1", "other")
    }
    group = {"cifar100": "near", "mnist": "far", "fashion-mnist": "far"}
    board = Board(scores=scores, group=dict.fromkeys(scores, group))
    beds = dict.fromkeys(scores, bed(**SIZES))
    assert openood_sets(beds["other"]) == ["cifar100", "mnist"]
    table = near_and_far(board, beds, ["msp"])
    assert list(table.network) == ["net", "other"] and list(table.seeds) == [2, 1]
    far = [100 * board.on(f"net:{i}").only("mnist").value("msp") for i in (0, 1)]
    assert table["far AUROC"][0] == f"{np.mean(far):.2f} ± {np.std(far):.2f}"
    assert table["far AUROC"][1] == f"{100 * board.on('other').only('mnist').value('msp'):.2f}"


def test_leaderboard_of_the_id_sets():
    table = openood_published({"net": bed("latin", greek=3)}, ["KNN", "MSP"])
    assert list(table.method) == ["KNN", "MSP"] and set(table.id_dataset) == {"cifar10"}
    assert table["near AUROC"][0] == "90.64 ± 0.20"


def test_departures_name_what_is_missing_and_how_many_images_there_are():
    rows = {what: (here, there) for what, here, there in openood_departures({"n": bed(**SIZES)})}
    assert rows["images of cifar100"] == ("4", "9,000")
    assert rows["images of fashion-mnist"] == ("4", "not tested")
    assert rows["not available"][0] == "svhn, dtd, places365" and rows["ID accuracy"][0] == "93.0 %"
    assert rows["real outliers"][0] == "notmnist" and rows["note on dtd"] == ("incomplete", "")
    assert rows["tested, but not in the averages"][0] == "fashion-mnist"
    (what, here, _), *_ = openood_departures({"n": bed("latin", greek=3)})
    assert what == "everything else" and here.startswith("ID latin")
