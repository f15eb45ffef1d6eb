"""Published figures to stand beside one's own: tables of the Emu3 paper (arXiv 2409.18869).

``+`` marks prompts that GPT-4V rewrote. Rows of other models are as that paper reports them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Row = Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """A benchmark's figures."""

    title: str
    columns: Mapping[str, str]
    """Keys of scores to what they are called."""
    rows: Mapping[str, Row]
    """Scores by model."""
    note: str = ""
    """How the paper measured."""


def _rows(columns: Mapping[str, str], text: str) -> dict[str, Row]:
    """Rows of ``model|value|...`` in the order of `columns`; ``-`` is not stated."""
    rows: dict[str, Row] = {}
    for line in text.strip().splitlines():
        model, *values = (part.strip() for part in line.split("|"))
        rows[model] = {
            key: float(value) for key, value in zip(columns, values, strict=True) if value not in ("", "-")
        }
    return rows


_CLIP = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "fid": "FID"}
_GENEVAL = {
    "overall": "overall", "single_object": "single object", "two_object": "two objects",
    "counting": "counting", "colors": "colours", "position": "position", "color_attr": "colour attribution",
}  # fmt: skip
_DPG = {
    "overall": "overall", "global": "global", "entity": "entity", "attribute": "attribute",
    "relation": "relation", "other": "other",
}  # fmt: skip
_VBENCH = {
    "total": "total", "motion_smoothness": "motion smoothness", "dynamic_degree": "dynamic degree",
    "aesthetic_quality": "aesthetic quality", "object_class": "object class",
    "multiple_objects": "multiple objects", "human_action": "human action",
    "spatial_relationship": "spatial relationship", "scene": "scene", "appearance_style": "appearance style",
    "subject_consistency": "subject consistency", "background_consistency": "background consistency",
}  # fmt: skip
_VLMEVAL = {
    "seed": "SEED-Bench", "ocrbench": "OCRBench", "mmvet": "MM-Vet", "pope": "POPE", "vqav2": "VQAv2",
    "gqa": "GQA", "sqa": "ScienceQA", "textvqa": "TextVQA", "chartqa": "ChartQA", "docvqa": "DocVQA",
    "infovqa": "InfoVQA", "ai2d": "AI2D", "rwqa": "RealWorldQA", "mmmu": "MMMU", "mmb": "MMBench",
}  # fmt: skip

TABLES: Mapping[str, Table] = {
    "prompts": Table(
        "Prompts of MS-COCO",
        _CLIP,
        _rows(
            _CLIP,
            """
            Emu3|.689|.313|12.8
            Emu3-DPO|.680|.312|19.3
            SDv1.5|.667|.302|9.93
            DALL-E 2|-|.314|10.93
            SDXL|.674|.310|-
            PixArt-a|-|-|7.32
            DALL-E 3|-|.320|-
            Emu|.656|.286|11.6
            Show-o|-|-|9.24
            Transfusion|-|-|6.78
            Chameleon|-|-|26.74
            """,
        ),
        "30,000 prompts, guidance 5.0, top-k 16384; CLIP-T by ViT-B, CLIP-I by ViT-L.",
    ),
    "geneval": Table(
        "GenEval",
        _GENEVAL,
        _rows(
            _GENEVAL,
            """
            Emu3|.54|.98|.71|.34|.81|.17|.21
            Emu3+|.66|.99|.81|.42|.80|.49|.45
            Emu3-DPO|.52|.98|.69|.33|.78|.15|.16
            Emu3-DPO+|.64|.99|.76|.38|.85|.45|.40
            SDv1.5|.43|-|-|-|-|-|-
            SDv2.1|.50|-|-|-|-|-|-
            SDXL|.55|-|-|-|-|-|-
            PixArt-a|.48|-|-|-|-|-|-
            DALL-E 2|.52|-|-|-|-|-|-
            DALL-E 3+|.67|-|-|-|-|-|-
            SD3|.74|-|-|-|-|-|-
            Show-o|.53|-|-|-|-|-|-
            Transfusion|.63|-|-|-|-|-|-
            Chameleon|.39|-|-|-|-|-|-
            LlamaGen|.32|-|-|-|-|-|-
            """,
        ),
        "Four pictures a prompt, guidance 5.5, top-k 16384; Emu3 at 512x512, Emu3-DPO at 720x720.",
    ),
    "dpg": Table(
        "DPG-Bench",
        _DPG,
        _rows(
            _DPG,
            """
            Emu3|80.60|85.21|86.68|86.84|90.22|83.15
            Emu3-DPO|81.60|87.54|87.17|86.33|90.61|89.75
            SDv1.5|63.18|-|-|-|-|-
            PixArt-a|71.11|-|-|-|-|-
            Lumina-Next|74.63|-|-|-|-|-
            SDXL|74.65|-|-|-|-|-
            Playground v2.5|75.47|-|-|-|-|-
            Hunyuan-DiT|78.87|-|-|-|-|-
            PixArt-Sigma|80.54|-|-|-|-|-
            DALL-E 3|83.50|-|-|-|-|-
            SD3 Medium|84.08|-|-|-|-|-
            Playground v3|87.04|-|-|-|-|-
            """,
        ),
        "Four pictures a prompt, guidance 5.0; judged by mPLUG-large.",
    ),
    "vbench": Table(
        "VBench",
        _VBENCH,
        _rows(
            _VBENCH,
            """
            Emu3|80.96|98.93|79.27|59.64|86.17|44.64|77.71|68.73|37.11|20.92|95.32|97.69
            OpenSora 1.2|79.76|98.50|42.39|56.85|82.22|51.83|91.20|68.56|42.44|23.95|96.75|97.61
            T2V-Turbo|81.01|97.34|49.17|63.04|93.96|54.65|95.20|38.67|55.58|24.42|96.28|97.02
            CogVideoX-5B|81.61|96.92|70.97|61.98|85.23|62.11|99.40|66.35|53.20|24.91|96.23|96.52
            Kling (2024-07)|81.85|99.40|46.94|61.21|87.24|68.05|93.40|73.03|50.86|19.62|98.33|97.60
            Gen-3|82.32|99.23|60.14|63.34|87.81|53.64|96.4|65.09|54.57|24.31|97.10|96.62
            """,
        ),
        "The paper's clips went through a stabilizer and super-resolution that are not released.",
    ),
    "vlmeval": Table(
        "Understanding of images",
        _VLMEVAL,
        _rows(
            _VLMEVAL,
            """
            Emu3|68.2|687|37.2|85.2|75.1|60.3|89.2|64.7|68.6|76.3|43.8|70.0|57.4|31.6|58.5
            LLaVA-1.6 HD 7B|64.7|532|43.9|86.5|81.8|64.2|70.2|64.9|54.8|74.4|37.1|66.6|57.8|35.1|67.4
            LLaVA-1.5 7B|64.3|318|30.5|85.9|78.5|62.0|66.8|46.1|18.2|28.1|25.8|54.8|54.8|35.3|64.3
            QwenVL-Chat|58.2|488|-|-|78.2|57.5|68.2|61.5|49.8|66.3|-|45.9|49.3|35.9|60.6
            ShareGPT4V|-|371|37.6|-|80.6|63.3|68.4|60.4|21.3|-|-|58.0|54.9|37.2|68.8
            EVE-7B HD|56.8|-|25.7|85.0|78.6|62.6|64.9|56.8|-|-|-|-|-|-|52.3
            Fuyu-8B HD|-|-|21.4|74.1|74.2|-|-|-|-|-|-|64.5|-|27.9|10.7
            Show-o|-|-|-|73.8|59.3|48.7|-|-|-|-|-|-|-|25.1|-
            """,
        ),
        "Of some sets related training pictures were seen (VQAv2, GQA, ScienceQA and others; see the paper).",
    ),
}
"""By suite."""
