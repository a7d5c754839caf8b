"""Tiny random models of every family, and maps that they can run."""

import json
import random
import sys
from pathlib import Path

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.families.table import FAMILIES

DEPTH = 6
# Whatever of these a family's config knows. Windows are shorter than the test sequences, groups have two heads.
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 8,
    "query_pre_attn_scalar": 16,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "intermediate_size_mlp": 96,
    # Layers without softmax attention.
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_chunk_size": 8,
    # Encoders and encoder-decoders.
    "d_model": 64,
    "d_kv": 8,
    "d_ff": 96,
    "num_heads": 8,
    "attention_heads": 8,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "decoder_start_token_id": 2,
}
_MIXED = ["sliding_attention", "sliding_attention", "full_attention"] * 2
_LINEAR = ["linear_attention", "full_attention", "full_attention"] * 2
# Options that bring out what is special in a family.
SPECIAL = {
    "llama": {"attention_bias": True},
    "cohere": {"use_qk_norm": True},
    "stablelm": {"qk_layernorm": True, "use_qkv_bias": True},
    "phi": {"qk_layernorm": True},
    "opt": {"num_key_value_heads": 8},
    "exaone4": {"sliding_window_pattern": 2},
    "gemma3_text": {"layer_types": _MIXED},
    "olmo": {"clip_qkv": 0.3},
    "olmoe": {"clip_qkv": 0.3},
    "glm4_moe": {"use_qk_norm": True},
    "helium": {"head_dim": 8},
    "falcon": {"head_dim": None},
    "t5": {"decoder_start_token_id": 0},
    "mt5": {"decoder_start_token_id": 0},
    "qwen2_5_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gptj": {"rotary_dim": 4},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "qwen3_next": {"layer_types": _LINEAR},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "mellum": {"layer_types": _MIXED},
    "exaone_moe": {"sliding_window_pattern": 2},
    "kolibri1": {"layer_types": _MIXED},
    "cohere_compass_text": {
        "layer_types": _MIXED,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "llama4_text": {
        # Positions of the test sequences lie beyond where queries begin to be scaled by position.
        "attention_chunk_size": 8,
        "floor_scale": 4,
        "no_rope_layer_interval": 2,
        "num_experts_per_tok": 1,
    },
    "qwen3_5_text": {"layer_types": _LINEAR},
    "qwen3_5_moe_text": {"layer_types": _LINEAR},
    "lfm2": {"layer_types": ["conv", "full_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"] * 2},
    "olmo_hybrid": {"layer_types": _LINEAR},
    # transformers counts MiniMax's cached tokens in the first layer.
    "minimax": {"layer_types": ["full_attention", "linear_attention", "full_attention"] * 2, "block_size": 8},
    "bamba": {"attn_layer_indices": [1, 2, 4, 5]},
    "granitemoehybrid": {"layer_types": _LINEAR, "shared_intermediate_size": 32},
    "persimmon": {"qk_layernorm": True},
    "plbart": {"decoder_start_token_id": 2},
    "xmod": {"default_language": "en_XX"},
    "gpt_oss": {
        # The default stretches positions beyond this tiny model's.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
# Other shapes of the same family, each converted with a map of single heads.
VARIANTS = {
    "falcon": [
        {"multi_query": False},
        {"new_decoder_architecture": True, "num_kv_heads": 4},
        {"alibi": True},
        {"parallel_attn": False, "bias": True},
    ],
    "gpt_bigcode": [{"multi_query": False}],
    "gpt2": [{"scale_attn_weights": False}],
    "gpt_neox": [{"use_parallel_residual": False, "attention_bias": False}],
    "phi3": [{"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}],
    "bloom": [{"num_attention_heads": 6, "hidden_size": 48}],  # slopes of a number of heads that is no power of two
    "t5": [{"is_gated_act": True, "feed_forward_proj": "gated-gelu"}, {"num_layers": 2, "num_decoder_layers": 4}],
    "modernbert": [{"attention_bias": True, "global_attn_every_n_layers": 3}],
    "qwen3_next": [{"attention_bias": True}],
    "bert": [{"is_decoder": False, "hidden_size": 48, "num_attention_heads": 6}],
}
# What is around the language model of a multimodal one.
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PARTS = {
    "gemma3": {"vision_config": {**_VISION, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
    "qwen2_5_vl": {"vision_config": {"hidden_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}},
}


def tiny_config(model_type: str, **changes):
    """A small config of this type."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(model_type)
    text = FAMILIES[model_type].text if model_type in FAMILIES else None
    inner = getattr(known, text) if text else known
    sizes = {key: value for key, value in SIZES.items() if hasattr(inner, key)}
    sizes |= {**SPECIAL.get(model_type, {}), **changes}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    return AutoConfig.for_model(model_type, **({text: sizes, **PARTS.get(model_type, {})} if text else sizes))


def save_tiny(model_type: str, folder: Path, seed: int = 0, max_shard_size: str = "100KB", **changes):
    """Save a random model with every weight, bias and norm away from its initial value; returns it in eager mode."""
    import torch
    import transformers

    torch.manual_seed(seed)
    entry = FAMILIES[model_type]
    config = tiny_config(model_type, **changes)
    model = getattr(transformers, entry.default_class)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    # As it is loaded: sinusoidal positions are not saved.
    return type(model).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def with_cache(model, cache):
    """What a model is called with to fill this cache, under the name that this release of transformers has for it."""
    from sa_convert.models.arguments import cache_keyword

    return {cache_keyword(model): cache, "use_cache": True}


def attentions_of(model, entry):
    """The attention modules of all layers, in the order in which layers are numbered; None if there is none."""
    found = []
    for stack in entry.all_stacks:
        for layer in model.get_submodule(stack.layers):
            try:
                module = layer.get_submodule(stack.attention)
            except AttributeError:
                module = None
            found.append(module if hasattr(module, entry.modules.fused or entry.modules.value) else None)
    return found


def code_of(model, name):
    """A module of the code that a converted model came with."""
    return sys.modules[f"{type(model).__module__.rpartition('.')[0]}.{name}"]


def forms_used(model):
    """For each call of a layer that lends, whether it lent weights."""
    used = []
    shares = {id(one): one for module in model.modules() if hasattr(module, "plan") for one in module.plan.treatments}
    for share in shares.values():
        original = share._lends_weights

        def note(*args, original=original):
            used.append(original(*args))
            return used[-1]

        share._lends_weights = note
    return used


def classes_of_layers(geometry: ModelGeometry) -> list[list[int]]:
    """Layers that can share with each other."""
    classes: dict = {}
    for index, layer in enumerate(geometry.layers):
        if layer.heads:
            classes.setdefault((layer.stack, layer.attention, layer.window, layer.rotary), []).append(index)
    return list(classes.values())


def make_map(kind: str, geometry: ModelGeometry, seed: int = 0) -> dict[int, list]:
    """A random map: "span" (whole layers, same heads), "layers" (whole layers, other heads), "groups" or "heads"."""
    chance = random.Random(f"{kind}{seed}")
    rows: dict[int, list] = {}
    for layers in classes_of_layers(geometry):
        first, rest = layers[0], layers[1:]
        for index in rest:
            layer = geometry.layers[index]
            if kind in ("span", "layers"):
                if index == rest[0] and len(rest) > 2:
                    continue  # stays a possible source
                heads = range(layer.heads)
                rows[index] = [[first, head if kind == "span" else (3 * head + 1) % layer.heads] for head in heads]
                continue
            own = [(at, head) for at in layers if at < index for head in range(layer.heads)]
            own = [source for source in own if source[0] not in rows or rows[source[0]][source[1]] is None]
            row: list = [None] * layer.heads
            for group in range(layer.groups):
                for head in layer.heads_of(group) if kind == "heads" or chance.random() < 0.6 else ():
                    if kind == "groups" or chance.random() < 0.6:
                        row[head] = list(chance.choice(own))
            if any(row):
                rows[index] = row
    return rows


THOROUGH = (
    "llama", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3_text", "olmo2", "olmo3", "granite", "cohere", "cohere2", "smollm3", "starcoder2", "stablelm", "phi",
    "nemotron", "glm4", "exaone4", "opt", "gpt_oss",
)  # fmt: skip
"""They stand for all, converted with maps of every kind; the rest, with the most demanding kind."""


def kinds_of(model_type: str) -> list[str]:
    kinds = ["span", "layers"] if FAMILIES[model_type].granularity == "layer" else ["span", "layers", "groups", "heads"]
    if model_type in THOROUGH:
        return kinds
    modules = FAMILIES[model_type].modules
    return [kinds[0], kinds[-1]] if modules.output_norm or modules.value_limit else kinds[-1:]


def write_recipe(path: Path, rows: dict[int, list], stacks: tuple = (), **keys) -> Path:
    """A recipe with an explicit map (JSON is YAML). stacks: names and depths, if a model has several."""
    content = {}
    for layer, row in rows.items():
        name, first = "", 0
        for stack, depth in stacks:
            if layer >= first:
                name, start = f"{stack}.", first
            first += depth
        start = start if stacks else 0
        content[f"{name}{layer - start}"] = [source and [source[0] - start, source[1]] for source in row]
    path.write_text(json.dumps({"sharing": {"map": content}, **keys}))
    return path


def save_tokenizer(folder: Path, words: int = 120) -> None:
    """A small tokenizer that splits any text into known pieces, saved as transformers does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "The quick brown fox jumps over the lazy dog while forty words of English are counted here. " * 3
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=words, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    ).save_pretrained(folder)


def geometry_of_folder(folder: Path) -> ModelGeometry:
    """The geometry of a saved model."""
    from sa_convert.read.family_of import family_of
    from sa_convert.read.folder import open_folder
    from sa_convert.read.geometry_of import geometry_of

    checkpoint = open_folder(folder)
    return geometry_of(checkpoint, family_of(checkpoint.config, checkpoint.tensors))


def load_converted(folder: Path, **options):
    """Load by the folder's own code, and refuse missing, unexpected or mismatched weights."""
    import transformers

    config = json.loads((folder / "config.json").read_text())
    own = f"modeling_shared_attention.{config['architectures'][0]}"
    auto_class = getattr(transformers, next(name for name, found in config["auto_map"].items() if found == own))
    model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **options)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not any(info.values()), info
    return model.eval()
