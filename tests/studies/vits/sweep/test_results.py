"""What the notebook gets of a sweep: what is done counts wherever it was done, the rest needs
images.
"""

from pathlib import Path

import pytest
from sweep_pool import TinySource

from oodlib import OodlibError
from oodlib.studies.vits.sweep import results
from oodlib.studies.vits.sweep.results import swept_models


def test_images_have_to_be_somewhere(tmp_path: Path) -> None:
    with pytest.raises(OodlibError, match="Give data_root"):
        swept_models(["imagenet_timm"], data_root="", output=str(tmp_path))


def test_an_empty_folder_is_no_imagenet(tmp_path: Path) -> None:
    with pytest.raises(OodlibError, match="the images of no split are available"):
        swept_models(
            ["vit_base_patch16_224.augreg_in21k_ft_in1k"],
            data_root=str(tmp_path),
            output=str(tmp_path / "o"),
        )


def test_a_damaged_table_is_no_timm_model(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("name,network\na,b\n")
    with pytest.raises(OodlibError, match=r"mine\.csv: the column weights is missing"):
        swept_models([str(tmp_path / "mine.csv")], data_root="")
    with pytest.raises(OodlibError, match=r"There is no pool '.*absent\.csv'"):
        swept_models([str(tmp_path / "absent.csv")], data_root="")


def test_what_is_done_counts_where_neither_images_nor_weights_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object) -> str:
        raise OodlibError("the folder is missing.")

    monkeypatch.setattr(results, "ImagenetSource", lambda *_: TinySource(tmp_path))
    there = swept_models(["a"], data_root="there", output=str(tmp_path), device="cpu")
    monkeypatch.setattr(TinySource, "manifest", absent)
    monkeypatch.setattr(TinySource, "weights", lambda *_: "")
    here = swept_models(["a"], data_root="", output=str(tmp_path), device="cpu")
    assert here[0].table.equals(there[0].table) and here[0].record == there[0].record
    assert set(here[0].record["sets"]) == {"fit", "id", "odd"} and not here.missing
