"""Which row of the zoo the routers of transformers' models are: the last table of docs/zoo.md.

A test walks the installed models: a router class that is missing here fails it, and each that is here is compared
with its row, choice and weights bit for bit.
"""

from __future__ import annotations

from itertools import groupby

RELEASE = "5.24"
"""Of transformers: the release whose classes these are. Older ones choose in the block here and there."""

_CLASSES = {
    "smoe": """
        dbrx.DbrxFFN hunyuan_v1_moe.HunYuanMoEV1Gate lara_mini.LaraMiniTopKRouter mellum.MellumTopKRouter
        minimax.MiniMaxTopKRouter mixtral.MixtralTopKRouter qwen3_5_moe.Qwen3_5MoeTopKRouter
        qwen3_next.Qwen3NextTopKRouter qwen3_omni_moe.Qwen3OmniMoeTextTopKRouter
        qwen3_omni_moe.Qwen3OmniMoeThinkerTextTopKRouter qwen3_vl_moe.Qwen3VLMoeTextTopKRouter
        qwen4_exp.Qwen4ExpTextTopKRouter olmoe.OlmoeTopKRouter qwen3_moe.Qwen3MoeTopKRouter
    """,
    "olmoe": """
        flex_olmo.FlexOlmoTopKRouter jamba.JambaTopKRouter olmoe.OlmoeTopKRouter qwen2_moe.Qwen2MoeTopKRouter
        qwen3_moe.Qwen3MoeTopKRouter qwen3_omni_moe.Qwen3OmniMoeTalkerTextTopKRouter
        deepseek_v2.DeepseekV2TopkRouter deepseek_ocr2.DeepseekOcr2TextTopkRouter
        unlimited_ocr.UnlimitedOcrTextTopkRouter
    """,
    "granite": """
        aria.AriaTextTopKRouter cohere2_moe.Cohere2MoeTopKRouter granitemoe.GraniteMoeTopKRouter
        granitemoe_swa.GraniteMoeSWATopKRouter granitemoehybrid.GraniteMoeHybridTopKRouter
        granitemoeshared.GraniteMoeSharedTopKRouter jetmoe.JetMoeTopKGating
    """,
    "gpt-oss": "gpt_oss.GptOssTopKRouter",
    "privacy-filter": "openai_privacy_filter.OpenAIPrivacyFilterTopKRouter",
    "deepseek-v2": """
        deepseek_v2.DeepseekV2TopkRouter deepseek_ocr2.DeepseekOcr2TextTopkRouter
        unlimited_ocr.UnlimitedOcrTextTopkRouter
    """,
    "mistral-4": "mistral4.Mistral4TopkRouter mistral_large4.MistralLarge4TextTopkRouter",
    "deepseek-v3": """
        afmoe.AfmoeTokenChoiceRouter axk2.AXK2TopkRouter deepseek_v3.DeepseekV3TopkRouter
        dots3_note.Dots3NoteVisionTopKRouter hy_v3.HYV3TopKRouter inkling2.Inkling2TopKRouter
        inkling2_loop.Inkling2LoopTopKRouter minimax_m2.MiniMaxM2TopKRouter
        minimax_m3_vl.MiniMaxM3VLTopKRouter step3p7.Step3p7TopKRouter
    """,
    "deepseek-v3-groups": """
        axk1.AXK1TopkRouter bailing_hybrid.BailingHybridTopkRouter beam.BeamTopKRouter
        deepseek_v3.DeepseekV3TopkRouter deepseek_v32.DeepseekV32TopkRouter dots1.Dots1TopkRouter
        dots3_note.Dots3NoteTextTopkRouter exaone_moe.ExaoneMoeTopkRouter glm4_moe.Glm4MoeTopkRouter
        glm4_moe_lite.Glm4MoeLiteTopkRouter glm4v_moe.Glm4vMoeTextTopkRouter glm5_next.Glm5NextTextTopkRouter
        glm_moe_dsa.GlmMoeDsaTopkRouter hy_v4.HYV4TopkRouter hy_v4_vl.HYV4VLTopkRouter
        kimi_linear.KimiLinearTopkRouter mimo_v2_flash.MiMoV2FlashTopkRouter
        nemotron_h.NemotronHTopkRouter solar_open.SolarOpenTopkRouter
    """,
    "axk2": "axk2.AXK2TopkRouter",
    "deepseek-v4": "deepseek_v4.DeepseekV4TopKRouter",
    "deepseek-v4-table": "deepseek_v4.DeepseekV4HashRouter",
    "gemma-4": "gemma4.Gemma4TextRouter diffusion_gemma.DiffusionGemmaTextRouter",
    "longcat": "longcat_flash.LongcatFlashTopkRouter",
    "llama-4": "llama4.Llama4Router",
    "inkling": "inkling.InklingTopkRouter",
    "kolibri": "kolibri1.Kolibri1TopKRouter",
    "laguna": "laguna.LagunaTopKRouter",
    "muse-spark": "muse_spark.MuseSparkTopkRouter",
    "flint": "flint.FlintTopKRouter cohere2_moe.Cohere2MoeTopKRouter",
    "ernie": "ernie4_5_moe.Ernie4_5_MoeTopKRouter ernie4_5_vl_moe.Ernie4_5_VLMoeMoeTopKRouter",
    "lfm2": "lfm2_moe.Lfm2MoeTopKRouter",
    "dbrx": "dbrx.DbrxFFN",
    "doge": "doge.DogeCDMoE",
    "hunyuan": "hunyuan_v1_moe.HunYuanMoEV1Gate",
    "sparsemixer": "phimoe.PhimoeTopKRouter",
    "eda": "zaya.ZayaRouter",
    "switch": "switch_transformers.SwitchTransformersTop1Router",
    "gshard": "nllb_moe.NllbMoeTop2Router",
}
"""Row -> `family.Class` of transformers. A class under several rows is each of them at some of its options."""

WITHOUT_ROW = {
    "dbrx.DbrxRouter": "scores alone; the choice is `DbrxFFN`'s",
    "granite_docling.GraniteDoclingDensityRouter": "chooses a resolution per image, no experts",
}
"""`family.Class` -> why no row is it."""

DIFFERENCES = {
    "beam.BeamTopKRouter": "the scale multiplies the block's output",
    "doge.DogeCDMoE": "one token at a time: with more, transformers' reshape mixes the tokens' scores",
    "laguna.LagunaTopKRouter": "the scale multiplies the block's output",
    "minimax_m3_vl.MiniMaxM3VLTopKRouter": "the scale multiplies the block's output",
    "nllb_moe.NllbMoeTop2Router": "outside training, within capacity: all first choices queue first there",
    "phimoe.PhimoeTopKRouter": "outside training; in training its noise is ours",
    "step3p7.Step3p7TopKRouter": "the scale multiplies the block's output",
    "zaya.ZayaRouter": "the state is a fused multiply-add here; bit for bit where that is a product and a sum",
    "switch_transformers.SwitchTransformersTop1Router": "outside training, within capacity: it is per sequence there",
}
"""`family.Class` -> where the comparison holds, or what stands elsewhere in the model."""


def rows_of_classes() -> dict[str, list[str]]:
    """`family.Class` -> its rows, families in order."""
    pairs = sorted((name, row) for row, names in _CLASSES.items() for name in names.split())
    return {name: [row for _, row in found] for name, found in groupby(pairs, key=lambda pair: pair[0])}


def table() -> list[dict[str, str]]:
    """Of every router class its family, its rows and a note, as the zoo's page shows them."""
    rows = {name: ", ".join(f"`{row}`" for row in found) for name, found in rows_of_classes().items()}
    rows |= dict.fromkeys(WITHOUT_ROW, "-")
    notes = DIFFERENCES | WITHOUT_ROW
    return [
        dict(zip(("family", "class"), name.split("."), strict=True))
        | {"rows": rows[name], "note": notes.get(name, "")}
        for name in sorted(rows)
    ]
