"""Names of backbones outside timm, mapped to timm's: those of torch.hub, Hugging Face, OpenCLIP and FeatUp.

Every alias stands for the same published weights under timm's name. Where two libraries differ in the details of the
architecture, the timm model is the one that computes what the weights were trained with: OpenAI's CLIP has QuickGELU.
The features of an alias are timm's patch tokens, before any projection into a space shared with text.

Imports nothing but the standard library, so that options and command lines start fast.
"""

import re

__all__ = ["BACKBONE_ALIASES", "REFUSED_NAMES", "resolve_backbone"]

# timm's name of the model and its weights, and what others call it.
_NAMES: dict[str, tuple[str, ...]] = {
    # DINO: torch.hub facebookresearch/dino, FeatUp, Hugging Face.
    "vit_small_patch16_224.dino": ("dino_vits16", "dino16", "facebook/dino-vits16"),
    "vit_small_patch8_224.dino": ("dino_vits8", "dino8", "facebook/dino-vits8"),
    "vit_base_patch16_224.dino": ("dino_vitb16", "facebook/dino-vitb16"),
    "vit_base_patch8_224.dino": ("dino_vitb8", "facebook/dino-vitb8"),
    # DINOv2: torch.hub facebookresearch/dinov2, FeatUp, Hugging Face.
    "vit_small_patch14_dinov2.lvd142m": ("dinov2_vits14", "dinov2", "facebook/dinov2-small"),
    "vit_base_patch14_dinov2.lvd142m": ("dinov2_vitb14", "facebook/dinov2-base"),
    "vit_large_patch14_dinov2.lvd142m": ("dinov2_vitl14", "facebook/dinov2-large"),
    "vit_giant_patch14_dinov2.lvd142m": ("dinov2_vitg14", "facebook/dinov2-giant"),
    "vit_small_patch14_reg4_dinov2.lvd142m": ("dinov2_vits14_reg", "facebook/dinov2-with-registers-small"),
    "vit_base_patch14_reg4_dinov2.lvd142m": ("dinov2_vitb14_reg", "facebook/dinov2-with-registers-base"),
    "vit_large_patch14_reg4_dinov2.lvd142m": ("dinov2_vitl14_reg", "facebook/dinov2-with-registers-large"),
    "vit_giant_patch14_reg4_dinov2.lvd142m": ("dinov2_vitg14_reg", "facebook/dinov2-with-registers-giant"),
    # DINOv3: torch.hub facebookresearch/dinov3, Hugging Face. Its projection biases are zero; timm omits them.
    "vit_small_patch16_dinov3.lvd1689m": ("dinov3_vits16", "facebook/dinov3-vits16-pretrain-lvd1689m"),
    "vit_small_plus_patch16_dinov3.lvd1689m": ("dinov3_vits16plus", "facebook/dinov3-vits16plus-pretrain-lvd1689m"),
    "vit_base_patch16_dinov3.lvd1689m": ("dinov3_vitb16", "facebook/dinov3-vitb16-pretrain-lvd1689m"),
    "vit_large_patch16_dinov3.lvd1689m": ("dinov3_vitl16", "facebook/dinov3-vitl16-pretrain-lvd1689m"),
    "vit_large_patch16_dinov3.sat493m": ("facebook/dinov3-vitl16-pretrain-sat493m",),
    "vit_huge_plus_patch16_dinov3.lvd1689m": ("dinov3_vith16plus", "facebook/dinov3-vith16plus-pretrain-lvd1689m"),
    "vit_7b_patch16_dinov3.lvd1689m": ("dinov3_vit7b16", "facebook/dinov3-vit7b16-pretrain-lvd1689m"),
    "vit_7b_patch16_dinov3.sat493m": ("facebook/dinov3-vit7b16-pretrain-sat493m",),
    "convnext_tiny.dinov3_lvd1689m": ("dinov3_convnext_tiny", "facebook/dinov3-convnext-tiny-pretrain-lvd1689m"),
    "convnext_small.dinov3_lvd1689m": ("dinov3_convnext_small", "facebook/dinov3-convnext-small-pretrain-lvd1689m"),
    "convnext_base.dinov3_lvd1689m": ("dinov3_convnext_base", "facebook/dinov3-convnext-base-pretrain-lvd1689m"),
    "convnext_large.dinov3_lvd1689m": ("dinov3_convnext_large", "facebook/dinov3-convnext-large-pretrain-lvd1689m"),
    # CLIP: OpenAI's package, OpenCLIP (there with pretrained="openai"), FeatUp, Hugging Face.
    "vit_base_patch16_clip_quickgelu_224.openai": ("ViT-B/16", "ViT-B-16", "clip", "openai/clip-vit-base-patch16"),
    "vit_base_patch32_clip_quickgelu_224.openai": ("ViT-B/32", "ViT-B-32", "openai/clip-vit-base-patch32"),
    "vit_large_patch14_clip_quickgelu_224.openai": ("ViT-L/14", "ViT-L-14", "openai/clip-vit-large-patch14"),
    "vit_large_patch14_clip_quickgelu_336.openai": (
        "ViT-L/14@336px",
        "ViT-L-14-336",
        "openai/clip-vit-large-patch14-336",
    ),
    "resnet50_clip.openai": ("RN50",),
    "resnet101_clip.openai": ("RN101",),
    "resnet50x4_clip.openai": ("RN50x4",),
    "resnet50x16_clip.openai": ("RN50x16",),
    "resnet50x64_clip.openai": ("RN50x64",),
    "vit_base_patch16_clip_224.laion2b": ("laion/CLIP-ViT-B-16-laion2B-s34B-b88K",),
    "vit_base_patch32_clip_224.laion2b": ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K",),
    "vit_large_patch14_clip_224.laion2b": ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K",),
    "vit_huge_patch14_clip_224.laion2b": ("ViT-H-14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "vit_base_patch16_clip_224.datacompxl": ("laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",),
    "vit_large_patch14_clip_224.datacompxl": ("laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",),
    # SigLIP and SigLIP 2: OpenCLIP, Hugging Face.
    "vit_base_patch16_siglip_224.webli": ("ViT-B-16-SigLIP", "google/siglip-base-patch16-224"),
    "vit_base_patch16_siglip_256.webli": ("ViT-B-16-SigLIP-256", "google/siglip-base-patch16-256"),
    "vit_base_patch16_siglip_256.webli_i18n": (
        "ViT-B-16-SigLIP-i18n-256",
        "google/siglip-base-patch16-256-multilingual",
    ),
    "vit_base_patch16_siglip_384.webli": ("ViT-B-16-SigLIP-384", "google/siglip-base-patch16-384"),
    "vit_base_patch16_siglip_512.webli": ("ViT-B-16-SigLIP-512", "google/siglip-base-patch16-512"),
    "vit_large_patch16_siglip_256.webli": ("ViT-L-16-SigLIP-256", "google/siglip-large-patch16-256"),
    "vit_large_patch16_siglip_384.webli": ("ViT-L-16-SigLIP-384", "google/siglip-large-patch16-384"),
    "vit_so400m_patch14_siglip_224.webli": ("ViT-SO400M-14-SigLIP", "google/siglip-so400m-patch14-224"),
    "vit_so400m_patch14_siglip_384.webli": ("ViT-SO400M-14-SigLIP-384", "google/siglip-so400m-patch14-384"),
    "vit_base_patch32_siglip_256.v2_webli": ("ViT-B-32-SigLIP2-256", "google/siglip2-base-patch32-256"),
    "vit_base_patch16_siglip_224.v2_webli": ("ViT-B-16-SigLIP2", "google/siglip2-base-patch16-224"),
    "vit_base_patch16_siglip_256.v2_webli": ("ViT-B-16-SigLIP2-256", "google/siglip2-base-patch16-256"),
    "vit_base_patch16_siglip_384.v2_webli": ("ViT-B-16-SigLIP2-384", "google/siglip2-base-patch16-384"),
    "vit_base_patch16_siglip_512.v2_webli": ("ViT-B-16-SigLIP2-512", "google/siglip2-base-patch16-512"),
    "vit_large_patch16_siglip_256.v2_webli": ("ViT-L-16-SigLIP2-256", "google/siglip2-large-patch16-256"),
    "vit_large_patch16_siglip_384.v2_webli": ("ViT-L-16-SigLIP2-384", "google/siglip2-large-patch16-384"),
    "vit_large_patch16_siglip_512.v2_webli": ("ViT-L-16-SigLIP2-512", "google/siglip2-large-patch16-512"),
    "vit_so400m_patch14_siglip_224.v2_webli": ("ViT-SO400M-14-SigLIP2", "google/siglip2-so400m-patch14-224"),
    "vit_so400m_patch14_siglip_378.v2_webli": ("ViT-SO400M-14-SigLIP2-378", "google/siglip2-so400m-patch14-384"),
    "vit_so400m_patch16_siglip_256.v2_webli": ("ViT-SO400M-16-SigLIP2-256", "google/siglip2-so400m-patch16-256"),
    "vit_so400m_patch16_siglip_384.v2_webli": ("ViT-SO400M-16-SigLIP2-384", "google/siglip2-so400m-patch16-384"),
    "vit_so400m_patch16_siglip_512.v2_webli": ("ViT-SO400M-16-SigLIP2-512", "google/siglip2-so400m-patch16-512"),
    "vit_giantopt_patch16_siglip_256.v2_webli": ("ViT-gopt-16-SigLIP2-256", "google/siglip2-giant-opt-patch16-256"),
    "vit_giantopt_patch16_siglip_384.v2_webli": ("ViT-gopt-16-SigLIP2-384", "google/siglip2-giant-opt-patch16-384"),
    "naflexvit_base_patch16_siglip.v2_webli": ("google/siglip2-base-patch16-naflex",),
    "naflexvit_so400m_patch16_siglip.v2_webli": ("google/siglip2-so400m-patch16-naflex",),
    # MAE: facebookresearch/mae, Hugging Face.
    "vit_base_patch16_224.mae": ("mae_vit_base_patch16", "facebook/vit-mae-base"),
    "vit_large_patch16_224.mae": ("mae_vit_large_patch16", "facebook/vit-mae-large"),
    "vit_huge_patch14_224.mae": ("mae_vit_huge_patch14", "facebook/vit-mae-huge"),
}

BACKBONE_ALIASES = {alias: name for name, aliases in _NAMES.items() for alias in aliases}
"""timm's name by alias, as the alias is usually written; :func:`resolve_backbone` ignores case."""

_BY_LOWER_CASE = {alias.lower(): name for alias, name in BACKBONE_ALIASES.items()}

REFUSED_NAMES = {
    "maskclip": "MaskCLIP's features are the value projections of CLIP's last block, which timm does not return; give "
    "'ViT-B/16' for the patch tokens of the same weights",
    "vit": "it is ambiguous; FeatUp's 'vit' is 'vit_small_patch16_224'",
    "siglip": "it is ambiguous; give a size as well, 'ViT-B-16-SigLIP' or 'google/siglip-base-patch16-224'",
    "siglip2": "it is ambiguous; give a size as well, 'ViT-B-16-SigLIP2' or 'google/siglip2-base-patch16-224'",
    "mae": "it is ambiguous; give a size as well, 'mae_vit_base_patch16' or 'mae_vit_large_patch16' (FeatUp's)",
    "dino": "it is ambiguous; give a size as well, 'dino_vits16' or 'dino_vits8'",
    "dinov3": "it is ambiguous; give a size as well, 'dinov3_vits16' or 'dinov3_vitb16'",
}
"""Names in use that stand for no single timm model, in lower case, and what to give instead."""


def resolve_backbone(name: str) -> str:
    """timm's name of the backbone ``name``.

    Aliases are resolved in any case, and ``timm/NAME``, as the Hugging Face hub writes timm's models, becomes ``NAME``.
    Every other name is returned as it is, also one that timm does not know; :func:`featup.create_backbone` refuses it.
    """
    name = re.sub(r"^(?:hf[-_]hub:)?timm/", "", name)
    return _BY_LOWER_CASE.get(name.removeprefix("hf-hub:").removeprefix("hf_hub:").lower(), name)
