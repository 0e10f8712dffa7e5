"""Published numbers of 44 ImageNet models as one table, in the form of our own pools.

They are of Mahalanobis++ (Mueller, Hein, arXiv 2505.18032, Tables 6, 11, 12 and 17), by the authors
of the study, and stand in for the study's own (arXiv 2405.17447), which could not be read.
"""

from __future__ import annotations

import numpy as np
from pandas import DataFrame

from oodlib.data.published import published

METHODS = {
    "MSP": "msp",
    "MaxLogit": "max_logit",
    "Energy": "energy",
    "Mahalanobis": "mahalanobis",
    "RelMahalanobis": "relative_mahalanobis",
    "Mahalanobis++": "mahalanobis++",
    "RelMahalanobis++": "relative_mahalanobis++",
    "ViM": "vim",
    "KNN": "knn",
}
_PAPER = "Mahalanobis++ (arXiv 2505.18032)"
_TABLES = {"Table 6": "/near/fpr", "Table 11": "/near/auroc", "Table 17": "/unit_tests/failed"}
_FEATURES = {
    "features unnormalised": "variance_deviation",
    "features L2-normalised": "variance_deviation++",
}
_GROUPS = {
    "in21k_sup": "supervised 21k",
    "in1k_sup": "supervised 1k",
    "in1k_supcon": "supervised 1k",
    "clip_laion2b>in12k": "CLIP-like",
    "siglip_webli": "CLIP-like",
}


def published_models() -> DataFrame:
    """One row per model, by name; fractions (accuracy, FPR95, AUROC) and counts, NaN where unknown.

    Returns
    -------
    DataFrame with the columns

    - pretraining (as in the source), group ("supervised 1k", "supervised 21k", "CLIP-like",
      "masked")
    - data: "1k" or "21k" images in all before the last finetuning, empty for the others
    - family: "ViT", "DeiT3", "EVA02" or another architecture
    - network: the name without its pretraining, equal for the 1k and the 21k version of one
      architecture and recipe (their resolutions may differ)
    - checkpoint: what intervals resample; augreg2 was finetuned from the pretrained weights of
      augreg, base size
    - accuracy, and "<score>/near/fpr", "<score>/near/auroc" on NINCO, "<score>/unit_tests/failed"
      of 17 (Mahalanobis and Mahalanobis++ alone), named as in `measures.flat`
    - variance_deviation, variance_deviation++ (11 models): not comparable with ours, see
      data/published/README.md
    """
    rows = published("vit_study")
    rows = rows[(rows["paper"] == _PAPER) & ~rows["aggregation"].str.startswith("printed mean")]
    accuracy = rows[rows["metric"] == "accuracy"].set_index("model")
    names, pretraining = accuracy.index.to_series(), accuracy["pretraining"]
    broad = names.str.contains("In21k").to_numpy()
    narrow = pretraining.str.contains("in1k").to_numpy()
    table = DataFrame(
        {
            "pretraining": pretraining,
            "group": pretraining.map(lambda p: _GROUPS.get(p, "masked")),
            "data": np.where(broad, "21k", np.where(narrow, "1k", "")),
            "family": names.str.split("-").str[0],
            "network": names.str.replace("-In21k", ""),
            "checkpoint": names.replace({"ViT-B16-In21k-augreg2": "ViT-B16-In21k-augreg"}),
            "accuracy": accuracy["value"] / 100,
        }
    )
    for name, suffix in _TABLES.items():
        part = rows[(rows["table"] == name) & rows["method"].isin(list(METHODS))]
        wide = part.pivot(index="model", columns="method", values="value")
        wide = wide.rename(columns=METHODS).add_suffix(suffix)
        table = table.join(wide if suffix.endswith("failed") else wide / 100)
    deviations = rows[rows["metric"] == "variance_deviation"]
    wide = deviations.pivot(index="model", columns="method", values="value")
    return table.join(wide.rename(columns=_FEATURES)).sort_index()
