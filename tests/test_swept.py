"""What is asked of a sweep's models before anything is opened."""

from pathlib import Path

import pytest

from oodlib import OodlibError
from oodlib.vits.swept import swept_models


def test_images_have_to_be_somewhere() -> None:
    with pytest.raises(OodlibError, match="give data_root"):
        swept_models(["imagenet_timm"], data_root="")


def test_an_empty_folder_is_no_imagenet(tmp_path: Path) -> None:
    with pytest.raises(OodlibError, match="the images of no split are at hand"):
        swept_models(["vit_base_patch16_224.augreg_in21k_ft_in1k"], data_root=str(tmp_path), output=str(tmp_path / "o"))
