"""Pools as tables: what is written is read, every fault is one error, and the shipped tables hold
their facts.
"""

import fnmatch
import re
from collections import Counter

import pytest
from helpers import refuses

from oodlib.studies.vits.pool_table import PoolRow, find_pool, read_pool, write_pool

HEADER = (
    "name,network,weights,pretraining,objective,aug,weight_decay,dropout,stochastic_depth,ft_lr,"
    "head,penalty,resolution,seed,role"
)
ROW = "a,net,,in1k,sigmoid,none,0.1,0.0,0.0,0.01,raw,0.0,224,0,"
AUGREG = re.compile(
    r"augreg/(?P<arch>\w+?)-(?P<data>i1k|i21k)-300ep-lr_0.001-aug_(?P<aug>\w+)-wd_(?P<wd>[\d.]+)-"
    r"do_(?P<do>[\d.]+)-sd_(?P<sd>[\d.]+)--imagenet2012-steps_20k-lr_(?P<lr>[\d.]+)-res_(?P<res>\d+)\.npz"
)


def table(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


# Reading and writing


def test_rows_survive_writing_and_reading(tmp_path):
    rows = (
        PoolRow(name="a", network="net"),
        PoolRow(
            name="b",
            network="net",
            weights="w.npz",
            pretraining="in21k",
            objective="sigmoid",
            aug="light1",
            weight_decay=0.1,
            dropout=0.0,
            stochastic_depth=0.1,
            ft_lr=1e-6,
            head="unit",
            penalty=0.5,
            resolution=384,
            seed=3,
            role="member",
        ),
    )
    write_pool(tmp_path / "pool.csv", rows)
    assert read_pool(tmp_path / "pool.csv") == rows


def test_order_of_columns_does_not_matter(tmp_path):
    names, cells = HEADER.split(","), ROW.split(",")
    path = table(tmp_path / "pool.csv", ",".join(reversed(names)), ",".join(reversed(cells)))
    assert read_pool(path) == read_pool(table(tmp_path / "same.csv", HEADER, ROW))


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        (
            (HEADER.replace(",ft_lr", ""), ROW),
            ("the column ft_lr is missing", "A pool has the columns name, network"),
        ),
        ((HEADER + ",colour", ROW + ",red"), ("the column 'colour' is unknown",)),
        (
            (HEADER, ROW.replace("0.01", "small")),
            ("line 2: ft_lr must be a number or empty, got 'small'",),
        ),
        (
            (HEADER, ROW.replace("224", "22.4")),
            ("line 2: resolution must be a number or empty, got '22.4'",),
        ),
        ((HEADER, ROW, ROW[1:]), ("line 3: a model needs a name and a network",)),
        ((HEADER, ROW.replace("net", "")), ("line 2: a model needs a name and a network",)),
        ((HEADER, ROW, ROW), ("duplicate name a",)),
        ((HEADER,), ("the pool has no row",)),
        ((), ("the column name is missing",)),
        ((HEADER, "a,net"), ("line 2: 15 cells are needed",)),
        ((HEADER, ROW + ",1"), ("line 2: 15 cells are needed",)),
        ((HEADER, "a/b" + ROW[1:]), ("line 2: the name 'a/b' is not a valid file name",)),
    ],
)
def test_faulty_tables(tmp_path, lines, parts):
    path = table(tmp_path / "pool.csv", *lines)
    with refuses(path, *parts):
        read_pool(path)


def test_file_that_is_no_text(tmp_path):
    (tmp_path / "pool.csv").write_bytes(b"\xff\xfe\x00")
    with refuses("pool.csv", "cannot be read"):
        read_pool(tmp_path / "pool.csv")


def test_pool_that_is_not_there():
    with refuses("no pool 'imagenett'", "imagenet, imagenet_b32, imagenet_timm"):
        find_pool("imagenett")


def test_pool_is_found_by_stem_and_by_path():
    assert read_pool("imagenet") == read_pool(find_pool("imagenet"))


# The shipped tables


@pytest.mark.parametrize(
    ("pool", "arch", "patch"), [("imagenet", "B_16", 16), ("imagenet_b32", "B_32", 32)]
)
def test_augreg_rows_say_what_their_file_names_say(pool, arch, patch):
    rows = [row for row in read_pool(pool) if not row.role]
    for row in rows:
        facts = AUGREG.fullmatch(row.weights)
        assert facts and facts["arch"] == arch, row.name
        assert row.network == f"vit_base_patch{patch}_{facts['res']}" and row.resolution == int(
            facts["res"]
        )
        assert (row.pretraining, row.objective, row.aug) == (
            {"i1k": "in1k", "i21k": "in21k"}[facts["data"]],
            "sigmoid",
            facts["aug"],
        )
        assert (row.weight_decay, row.dropout, row.stochastic_depth, row.ft_lr) == tuple(
            float(facts[key]) for key in ("wd", "do", "sd", "lr")
        )
        assert row.name == (
            f"B{patch}-{facts['data']}-{row.aug}-wd{row.weight_decay}-do{row.dropout}-ft{row.ft_lr}-r{row.resolution}"
        )


@pytest.mark.parametrize("pool", ["imagenet", "imagenet_b32"])
def test_augreg_rows_are_the_whole_grid(pool):
    """28 pretrainings x 2 data sets, each finetuned with 2 learning rates at 2 resolutions."""
    rows = [row for row in read_pool(pool) if not row.role]
    cells = Counter((row.pretraining, row.aug, row.weight_decay, row.dropout) for row in rows)
    finetunes = {(row.ft_lr, row.resolution) for row in rows}
    assert len(cells) == 2 * 7 * 2 * 2 and set(cells.values()) == {4}
    assert finetunes == {(lr, side) for lr in (0.01, 0.03) for side in (224, 384)}


@pytest.mark.parametrize("pool", ["imagenet", "imagenet_b32"])
def test_finetunes_of_one_checkpoint_share_it(pool):
    checkpoints = Counter(row.checkpoint for row in read_pool(pool) if not row.role)
    assert len(checkpoints) == 56 and set(checkpoints.values()) == {4}


@pytest.mark.parametrize("pool", ["imagenet", "imagenet_b32"])
def test_soups_are_the_72_released_files(pool):
    rows, soups = read_pool(pool), [row for row in read_pool(pool) if row.role == "member"]
    assert len(rows) == 296 and [row.weights for row in soups] == [
        f"model-soups/model_{i}.pt" for i in range(72)
    ]
    assert {(row.head, row.pretraining, row.objective, row.resolution) for row in soups} == {
        ("unit", "clip-openai", "cosine", 224)
    }
    assert len({row.checkpoint for row in soups}) == 1
    rates = [row.ft_lr for row in soups]
    assert rates[0] is None and all(1e-6 <= rate <= 1e-4 for rate in rates[1:])  # the note's range


def test_timm_rows_are_the_patterns_of_the_note_and_tags_that_timm_knows():
    from timm.models import get_pretrained_cfg

    from oodlib.models.timm_checks import check_timm_name

    counts = {
        "vit_*.augreg_in21k_ft_in1k": 19,
        "vit_*.augreg2_in21k_ft_in1k": 2,
        "vit_*.orig_in21k_ft_in1k": 4,
        "vit_*.augreg_in1k": 6,
        "vit_base_patch*_224.sam_in1k": 2,
        "vit_base_patch16_224_miil.in21k_ft_in1k": 1,
        "vit_*clip*.*_ft_in1k": 10,
        "vit_*clip*.*_ft_in12k_in1k": 14,
        "deit3_*.fb_in1k": 8,
        "deit3_*.fb_in22k_ft_in1k": 8,
    }
    rows = read_pool("imagenet_timm")
    assert {
        pattern: sum(fnmatch.fnmatch(row.network, pattern) for row in rows) for pattern in counts
    } == counts
    assert len(rows) == sum(counts.values())
    for row in rows:
        check_timm_name(row.network, tag_needed=True)
        config = get_pretrained_cfg(row.network)
        assert row.resolution == config.input_size[-1] and config.num_classes == 1000, row.name
        cell = (
            f"aug_{row.aug}-wd_{row.weight_decay}-do_{row.dropout}-sd_{row.stochastic_depth}"
            f"--imagenet2012-steps_20k-lr_{row.ft_lr}-"
        )
        assert ("augreg" in config.url) == (row.ft_lr is not None) == (cell in config.url), row.name
