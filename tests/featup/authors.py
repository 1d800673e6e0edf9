"""State dicts of timm models in the names and shapes that the authors of the weights publish them with.

Each function turns the state dict of a timm model into the authors' one, as their own model definitions have it. What
only training used is added with random values, so that a test sees it ignored.
"""

import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]


def renamed(state: Mapping[str, Tensor], *rules: tuple[str, str]) -> State:
    """The state with regular expressions replaced in its names, one after the other."""
    result = {}
    for key, value in state.items():
        name = key
        for pattern, text in rules:
            name = re.sub(pattern, text, name)
        result[name] = value
    return result


def some(*shape: int) -> Tensor:
    return torch.randn(shape)


def dino(state: State) -> State:
    """dino_deitsmall16_pretrain.pth: the teacher's backbone; timm kept the names of this code."""
    return dict(state)


def dino_full(state: State) -> dict[str, Any]:
    """dino_deitsmall16_pretrain_full_checkpoint.pth: both networks with projection heads, optimiser and options."""
    head = {
        "head.mlp.0.weight": some(8, 8),
        "head.last_layer.weight_g": some(8, 1),
        "head.last_layer.weight_v": some(8),
    }
    student = {f"module.backbone.{key}": torch.zeros_like(value) for key, value in state.items()}
    return {
        "student": student | {f"module.{key}": value for key, value in head.items()},
        "teacher": {f"backbone.{key}": value for key, value in state.items()} | head,
        "optimizer": {"state": {0: {"exp_avg": some(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 3,
        "args": Namespace(arch="vit_small", patch_size=16),
        "dino_loss": {"center": some(1, 8)},
    }


def dinov2(state: State) -> State:
    """dinov2_vits14_pretrain.pth, dinov2_vitg14_pretrain.pth (SwiGLU), dinov2_vits14_reg4_pretrain.pth."""
    state = dict(state)
    width = state["cls_token"].shape[-1]
    if "reg_token" in state:
        # The authors add a position embedding to the class token; timm has the sum.
        first = some(1, 1, width)
        state["cls_token"] = state["cls_token"] - first
        state["pos_embed"] = torch.cat([first, state["pos_embed"]], 1)
        state["register_tokens"] = state.pop("reg_token")
        return state | {"mask_token": some(1, width)}
    swiglu = any(value.shape[0] != 4 * width for key, value in state.items() if key.endswith("mlp.fc1.bias"))
    names = ((r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")) if swiglu else ()
    return renamed(state, *names) | {"mask_token": some(1, width)}


def dinov2_training(state: State) -> dict[str, Any]:
    """teacher_checkpoint.pth of DINOv2's training: the backbone beside two heads."""
    heads = {"dino_head.mlp.0.weight": some(4, 4), "ibot_head.last_layer.weight_v": some(4, 4)}
    return {"teacher": {f"backbone.{key}": value for key, value in dinov2(state).items()} | heads}


def dinov3(state: State) -> State:
    """dinov3_vits16_pretrain_lvd1689m: rotary periods, storage tokens, a bias of q, k and v with the mask of k's."""
    result: State = {"mask_token": some(1, state["cls_token"].shape[-1]), "rope_embed.periods": some(16)}
    for key, value in renamed(state, ("gamma_([12])", r"ls\1.gamma"), ("reg_token", "storage_tokens")).items():
        if key.endswith("v_bias"):
            continue
        if key.endswith("q_bias"):
            bias = torch.cat([value, torch.zeros_like(value), state[key.replace("q_bias", "v_bias")]])
            result[key.replace("q_bias", "qkv.bias")] = bias
            continue
        result[key] = value
        if key.endswith("qkv.weight"):
            width = value.shape[1]
            result.setdefault(key.replace("weight", "bias"), torch.zeros(3 * width))
            mask = torch.cat([torch.ones(width), torch.zeros(width), torch.ones(width)])
            result[key.replace("weight", "bias_mask")] = mask
    return result


CLIP_NAMES = (
    (r"^patch_embed\.proj", "conv1"),
    (r"^pos_embed", "positional_embedding"),
    (r"^cls_token", "class_embedding"),
    (r"^norm_pre", "ln_pre"),
    (r"^norm\.", "ln_post."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm([12])", r".ln_\1"),
    (r"attn\.qkv\.", "attn.in_proj_"),
    (r"attn\.proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
)


def clip(state: State) -> State:
    """The state dict of OpenAI's ViT-B-16.pt, and of OpenCLIP's own ViTs: image and text tower."""
    visual = renamed({key: value for key, value in state.items() if not key.startswith("head.")}, *CLIP_NAMES)
    visual["positional_embedding"] = visual["positional_embedding"][0]
    visual["class_embedding"] = visual["class_embedding"][0, 0]
    visual["proj"] = state["head.weight"].t()
    text = {
        "positional_embedding": some(7, 8),
        "text_projection": some(8, 8),
        "logit_scale": torch.tensor(4.6),
        "transformer.resblocks.0.ln_1.weight": some(8),
        "token_embedding.weight": some(9, 8),
        "ln_final.weight": some(8),
        "input_resolution": torch.tensor(224),
        "context_length": torch.tensor(7),
        "vocab_size": torch.tensor(9),
    }
    return {f"visual.{key}": value for key, value in visual.items()} | text


def open_clip_trunk(state: State) -> State:
    """open_clip_pytorch_model.bin of a CLIP or SigLIP with a timm image tower."""
    text = {
        "text.token_embedding.weight": some(9, 8),
        "text.transformer.resblocks.0.ln_1.weight": some(8),
        "logit_scale": torch.tensor(4.6),
        "logit_bias": torch.tensor(-16.0),
    }
    return {f"visual.trunk.{key}": value for key, value in state.items()} | text


def open_clip_training(state: State) -> dict[str, Any]:
    """epoch_32.pt of OpenCLIP's training script."""
    wrapped = {f"module.{key}": value for key, value in clip(state).items()}
    return {"epoch": 32, "name": "run", "state_dict": wrapped, "optimizer": {"state": {}, "param_groups": []}}


def mae(state: State) -> dict[str, Any]:
    """mae_visualize_vit_base.pth: encoder and decoder; mae_pretrain_vit_base.pth is the encoder alone."""
    decoder = {
        "mask_token": some(1, 1, 8),
        "decoder_pos_embed": some(1, 197, 8),
        "decoder_embed.weight": some(8, 8),
        "decoder_blocks.0.attn.qkv.weight": some(24, 8),
        "decoder_norm.weight": some(8),
        "decoder_pred.weight": some(768, 8),
    }
    return {"model": state | decoder}


def deit3(state: State) -> dict[str, Any]:
    """deit_3_small_224_21k.pth."""
    return {"model": renamed(state, (r"ls([12])\.gamma", r"gamma_\1"))}


def swin(state: State) -> dict[str, Any]:
    """swin_tiny_patch4_window7_224.pth: each stage ends with its downsampling, and buffers are saved."""
    names = renamed(
        state,
        (r"layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample"),
        (r"head\.fc", "head"),
    )  # type: ignore[arg-type]
    tables = [key for key in names if key.endswith("relative_position_bias_table")]
    index = {key.replace("bias_table", "index"): torch.zeros(49, 49, dtype=torch.long) for key in tables}
    return {"model": names | index | {"layers.0.blocks.1.attn_mask": some(64, 49, 49)}}


def convnext(state: State) -> dict[str, Any]:
    """convnext_tiny_1k_224_ema.pth."""
    rules = (
        (r"^stem\.", "downsample_layers.0."),
        (r"stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"(stages\.\d+)\.blocks", r"\1"),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc([12])", r"pwconv\1"),
        (r"head\.norm", "norm"),
        (r"head\.fc", "head"),
    )
    return {"model": renamed(state, *rules)}


def beit(state: State) -> dict[str, Any]:
    """beitv2_base_patch16_224_pt1k_ft21k.pth: as DeepSpeed saves it, with the buffers."""
    tables = [key for key in state if key.endswith("relative_position_bias_table")]
    return {"module": state | {key.replace("bias_table", "index"): torch.zeros(197, 197).long() for key in tables}}


def transformers_dinov2(state: State) -> State:
    """model.safetensors of facebook/dinov2-small, as far as a test of its refusal needs it."""
    return {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "encoder.layer.0.attention.attention.query.weight": some(64, 64),
        "layernorm.weight": state["norm.weight"],
    }


def google_vit(state: State, heads: int) -> dict[str, np.ndarray]:
    """ViT-B_16.npz of Google's vision_transformer: JAX's names, kernels [in, out], heads as an axis of their own."""
    width = state["cls_token"].shape[-1]
    per_head = (heads, width // heads)
    out: dict[str, Tensor] = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": some(width, 3),
        "head/bias": some(3),
    }
    for block in sorted({key.split(".")[1] for key in state if key.startswith("blocks.")}):
        ours, theirs = f"blocks.{block}.", f"Transformer/encoderblock_{block}/"
        for norm, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{theirs}{name}/scale"] = state[f"{ours}{norm}.weight"]
            out[f"{theirs}{name}/bias"] = state[f"{ours}{norm}.bias"]
        weights, biases = state[f"{ours}attn.qkv.weight"].chunk(3), state[f"{ours}attn.qkv.bias"].chunk(3)
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            out[f"{attention}{name}/kernel"] = weight.t().reshape(width, *per_head)
            out[f"{attention}{name}/bias"] = bias.reshape(per_head)
        out[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].t().reshape(*per_head, width)
        out[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for number in (0, 1):
            dense = f"{theirs}MlpBlock_3/Dense_{number}/"
            out[f"{dense}kernel"] = state[f"{ours}mlp.fc{number + 1}.weight"].t()
            out[f"{dense}bias"] = state[f"{ours}mlp.fc{number + 1}.bias"]
    return {key: value.contiguous().numpy() for key, value in out.items()}
