"""What differs between model families, as data: one entry a family, and nothing else in the project names one.

The converter reads these entries to know which tensors and which layers there are, the exported code to know which
modules. This file imports neither torch nor transformers.
"""

from dataclasses import dataclass, replace

PREFIX = "shared_attention_"
"""Before the base's model type in that of a converted model."""

CLASS_PREFIX = "SharedAttention"
"""Before the base's class in that of a converted model."""


@dataclass(frozen=True)
class Stack:
    """Attention of one kind in a model that has several: encoder, decoder and cross-attention.

    name: as sharing maps name it ("decoder.cross"). layers: module path of the layers; attention: the attention
    module's path in a layer. heads, depth: config keys of the number of query heads and of layers. cross: its keys and
    values come from the encoder. caches: it keeps keys and values from one generated token to the next. query_input:
    the norm in a layer whose output only the queries read, if there is one.
    """

    name: str
    layers: str
    attention: str
    heads: str = "num_attention_heads"
    depth: str = "num_hidden_layers"
    cross: bool = False
    caches: bool = True
    query_input: str | None = None


@dataclass(frozen=True)
class Family:
    """One model type of transformers.

    model_type: as in config.json. config_class: exported by transformers. default_class: the class of models whose
    config.json names none under `architectures`; other heads on the same base convert, too.
    layers: module path of the decoder layers; attention: the attention module's path in a layer. heads, groups, depth:
        config keys of the number of query heads, of KV groups and of layers.
    stacks: given, the model has several kinds of attention, and layers, attention, heads and depth are theirs.
    text: config key of the language model's own config inside a multimodal model; files: how its layers are called in
        checkpoints, where that differs from `layers`.
    query, key, value, output: its projections; query_norm, key_norm: its norms of queries and keys, if any.
    output_outside: `output` is a path in the layer rather than in the attention module.
    fused: the projection that makes queries, keys and values at once, instead of query, key and value.
    fused_order: how its rows lie: "blocks" (all queries, all keys, all values) or "groups" (for each KV group its
        queries, its key and its value). transposed: projections hold (input, output), as Conv1D does.
    norm: how these norms hold their weights: "shared" (one for all heads), "rows" (a row per head), "list" (a module
        per head), or "joint" (over all heads together, so only whole layers can reuse).
    gate: what scales the attention's output before `output`: "query" (rows beside each head's query in `query`; needs
        plain_forward), or None.
    value_limit: config key of the bound that values are clamped to. output_norm: a norm before the output projection.
    sinks: name of the parameter with one attention sink per query head.
    mixed: only some layers have softmax attention; the others lack the projections.
    refuses: config key, the value of it that is refused, and why.
    bidirectional: tokens see later ones, and nothing is cached.
    sliding: which layers attend within a sliding window where config.json has no `layer_types` (see
        `sa_convert.read.geometry_of`): "none", "all", "periodic", "periodic_first", "from_max_window_layers",
        "alternate_below_max_window_layers", "without_rotary" or "chunked_with_rotary" (those that rotate attend within
        chunks).
    period, period_key: for "periodic", every period-th layer has full attention ("periodic_first": from the first on);
        the config key that overrides it.
    window, uses_window: what the family's config takes for a missing `sliding_window` and `use_sliding_window`.
    window_key: the config key of the window.
    rotary: which layers rotate queries and keys: "all", "none", "sliding" (only those, where the model has a window) or
        "no_rope_layers".
    exchange: how loans travel through the model's forward: as a keyword ("kwargs"), beside the rotary embeddings
        ("positions"), or, for families that pass on neither, in a variable of the thread ("context").
    plain_forward: use our own attention forward, for families whose own one fixes the number of heads.
    module: the class of ours (`shared_attention_modules`) that runs the attention of a family with special steps.
    interface: its own code calls the attention interface of transformers 5.
    transformers_5: the family shares attention in transformers 5 only; in 4 its code does not call the interface.
    tokenizer: the class that transformers 5 registers for the type (_PLAIN: tokenizer.json as it stands), None: none;
        tokenizer_wins: it is taken whatever tokenizer_config.json declares; vocabulary_tokenizer: the class that reads
        the vocabulary where there is no tokenizer.json, if it is another one. A test compares them with transformers.
    dropout: attribute of the attention module that holds the dropout probability (needed with plain_forward);
        output_dropout: the dropout module after `output`.
    """

    model_type: str
    config_class: str
    default_class: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    heads: str = "num_attention_heads"
    groups: str = "num_key_value_heads"
    depth: str = "num_hidden_layers"
    stacks: tuple[Stack, ...] = ()
    text: str | None = None
    files: str | None = None
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    output_outside: bool = False
    fused: str | None = None
    fused_order: str = "blocks"
    transposed: bool = False
    query_norm: str | None = None
    key_norm: str | None = None
    norm: str = "shared"
    gate: str | None = None
    value_limit: str | None = None
    output_norm: str | None = None
    sinks: str | None = None
    mixed: bool = False
    refuses: tuple[str, object, str] | None = None
    bidirectional: bool = False
    sliding: str = "none"
    period: int = 0
    period_key: str | None = None
    window: int | None = None
    window_key: str = "sliding_window"
    uses_window: bool = True
    rotary: str = "all"
    exchange: str = "kwargs"
    plain_forward: bool = False
    module: str | None = None
    interface: bool = True
    transformers_5: bool = False
    tokenizer: str | None = None
    tokenizer_wins: bool = False
    vocabulary_tokenizer: str | None = None
    dropout: str = "attention_dropout"
    output_dropout: str | None = None

    @property
    def granularity(self) -> str:
        """The smallest unit that can reuse: "head", or "layer" where queries are normalised over all heads together."""
        return "layer" if self.norm == "joint" else "head"

    @property
    def all_stacks(self) -> tuple[Stack, ...]:
        """The stacks, or the one without a name of a model with a single kind of attention."""
        single = Stack("", self.layers, self.attention, self.heads, self.depth, caches=not self.bidirectional)
        return self.stacks or (single,)

    @property
    def encoder_decoder(self) -> bool:
        return any(stack.cross for stack in self.stacks)

    @property
    def class_prefix(self) -> str:
        """What the name of its default class begins with: "Llama" of LlamaForCausalLM."""
        for suffix in sorted(HEADS, key=len, reverse=True):
            if self.default_class.endswith(suffix):
                return self.default_class.removesuffix(suffix)
        raise ValueError(f"{self.default_class} ends with none of {', '.join(HEADS)}")


HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "MTModel": "AutoModelForSeq2SeqLM",
    "EncoderModel": "AutoModelForTextEncoding",
    "Model": "AutoModel",
}
"""How the names of model classes end, and the auto class that loads them; in multimodal models,
ForConditionalGeneration is loaded by AutoModelForImageTextToText."""


_MULTIMODAL_HEADS = {
    "ForConditionalGeneration": "AutoModelForImageTextToText",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "Model": "AutoModel",
}


def auto_class_of(family: Family, architecture: str) -> str | None:
    """The auto class of transformers for a model class of this family, or None where it is no class of the family."""
    # Of the language model inside of a multimodal one, the config's name begins those of all classes but the default.
    of_config = architecture != family.default_class
    prefix = family.config_class.removesuffix("Config") if of_config else family.class_prefix
    if not architecture.startswith(prefix):
        return None
    head = architecture.removeprefix(prefix)
    if family.text:
        return _MULTIMODAL_HEADS.get(head)
    if head == "ForConditionalGeneration" and not family.encoder_decoder:
        return None
    return HEADS.get(head)


def auto_classes_of(family: Family, architecture: str) -> tuple[str, ...]:
    """As `auto_class_of`, with the others that load the same class: a multimodal model also generates from text."""
    found = auto_class_of(family, architecture)
    if found == "AutoModelForImageTextToText":
        return found, "AutoModelForCausalLM"
    return (found,) if found else ()


_PLAIN = "PreTrainedTokenizerFast"
_QK_NORM = {"query_norm": "q_norm", "key_norm": "k_norm"}
_QUERY_KEY_LAYERNORM = {"query_norm": "query_layernorm", "key_norm": "key_layernorm"}
_QK_LAYERNORM = {"query_norm": "q_layernorm", "key_norm": "k_layernorm"}
_GPT2 = {
    "layers": "transformer.h",
    "attention": "attn",
    "heads": "n_head",
    "depth": "n_layer",
    "output": "c_proj",
    "rotary": "none",
    "plain_forward": True,
    "dropout": "attn_dropout",
    "output_dropout": "resid_dropout",
}
_BERT = {
    "attention": "attention.self",
    "query": "query",
    "key": "key",
    "value": "value",
    "output": "attention.output.dense",
    "output_outside": True,
    "rotary": "none",
    "bidirectional": True,
    "exchange": "context",
    "plain_forward": True,
    "dropout": "dropout",
}
_T5 = {
    "stacks": (
        Stack("encoder", "encoder.block", "layer.0.SelfAttention", "num_heads", "num_layers", caches=False),
        Stack("decoder", "decoder.block", "layer.0.SelfAttention", "num_heads", "num_decoder_layers"),
        Stack(
            "decoder.cross",
            "decoder.block",
            "layer.1.EncDecAttention",
            "num_heads",
            "num_decoder_layers",
            cross=True,
            query_input="layer.1.layer_norm",
        ),
    ),
    "query": "q",
    "key": "k",
    "value": "v",
    "output": "o",
    "rotary": "none",
    "module": "t5",
    "exchange": "context",
    "plain_forward": True,
    "dropout": "dropout",
}
_BART = {
    "stacks": (
        Stack(
            "encoder", "model.encoder.layers", "self_attn", "encoder_attention_heads", "encoder_layers", caches=False
        ),
        Stack("decoder", "model.decoder.layers", "self_attn", "decoder_attention_heads", "decoder_layers"),
        Stack(
            "decoder.cross",
            "model.decoder.layers",
            "encoder_attn",
            "decoder_attention_heads",
            "decoder_layers",
            cross=True,
        ),
    ),
    "output": "out_proj",
    "rotary": "none",
    "module": "encoder_decoder",
    "exchange": "context",
    "plain_forward": True,
    "dropout": "dropout",
}
# Norms come before attention, not after it.
_MBART = _BART | {
    "stacks": (*_BART["stacks"][:2], replace(_BART["stacks"][2], query_input="encoder_attn_layer_norm")),
}
_DECODER_OF_BART = {key: value for key, value in _BART.items() if key != "stacks"}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaConfig", "LlamaForCausalLM", vocabulary_tokenizer="LlamaTokenizer"),
        Family(
            "mistral",
            "MistralConfig",
            "MistralForCausalLM",
            sliding="all",
            window=4096,
            tokenizer=_PLAIN,
            vocabulary_tokenizer="LlamaTokenizer",
        ),
        Family(
            "mixtral",
            "MixtralConfig",
            "MixtralForCausalLM",
            sliding="all",
            tokenizer=_PLAIN,
            vocabulary_tokenizer="LlamaTokenizer",
        ),
        Family(
            "ministral",
            "MinistralConfig",
            "MinistralForCausalLM",
            sliding="all",
            window=4096,
            tokenizer=_PLAIN,
            vocabulary_tokenizer="LlamaTokenizer",
        ),
        Family(
            "qwen2",
            "Qwen2Config",
            "Qwen2ForCausalLM",
            sliding="from_max_window_layers",
            window=4096,
            uses_window=False,
            tokenizer="Qwen2Tokenizer",
            tokenizer_wins=True,
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeConfig",
            "Qwen2MoeForCausalLM",
            sliding="alternate_below_max_window_layers",
            window=4096,
            uses_window=False,
            exchange="positions",
            plain_forward=True,
            tokenizer="Qwen2Tokenizer",
        ),
        Family(
            "qwen3",
            "Qwen3Config",
            "Qwen3ForCausalLM",
            **_QK_NORM,
            sliding="from_max_window_layers",
            window=4096,
            uses_window=False,
            tokenizer="Qwen2Tokenizer",
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeConfig",
            "Qwen3MoeForCausalLM",
            **_QK_NORM,
            sliding="all",
            window=4096,
            uses_window=False,
            tokenizer="Qwen2Tokenizer",
        ),
        Family("gemma", "GemmaConfig", "GemmaForCausalLM", tokenizer="GemmaTokenizer"),
        Family(
            "gemma2",
            "Gemma2Config",
            "Gemma2ForCausalLM",
            sliding="periodic",
            period=2,
            window=4096,
            tokenizer="GemmaTokenizer",
        ),
        Family(
            "gemma3_text",
            "Gemma3TextConfig",
            "Gemma3ForCausalLM",
            **_QK_NORM,
            sliding="periodic",
            period=6,
            period_key="sliding_window_pattern",
            window=4096,
            tokenizer="GemmaTokenizer",
        ),
        Family("olmo2", "Olmo2Config", "Olmo2ForCausalLM", **_QK_NORM, norm="joint", tokenizer=_PLAIN),
        Family(
            "olmo3",
            "Olmo3Config",
            "Olmo3ForCausalLM",
            **_QK_NORM,
            norm="joint",
            sliding="periodic",
            period=4,
            window=4096,
            tokenizer=_PLAIN,
        ),
        Family(
            "granite", "GraniteConfig", "GraniteForCausalLM", tokenizer=_PLAIN, vocabulary_tokenizer="GPT2Tokenizer"
        ),
        Family("cohere", "CohereConfig", "CohereForCausalLM", **_QK_NORM, norm="rows", tokenizer="CohereTokenizer"),
        Family(
            "cohere2",
            "Cohere2Config",
            "Cohere2ForCausalLM",
            sliding="periodic",
            period=4,
            period_key="sliding_window_pattern",
            window=4096,
            rotary="sliding",
            tokenizer="CohereTokenizer",
        ),
        Family(
            "smollm3",
            "SmolLM3Config",
            "SmolLM3ForCausalLM",
            sliding="without_rotary",
            uses_window=False,
            rotary="no_rope_layers",
        ),
        Family("starcoder2", "Starcoder2Config", "Starcoder2ForCausalLM", sliding="all", tokenizer="GPT2Tokenizer"),
        Family(
            "stablelm",
            "StableLmConfig",
            "StableLmForCausalLM",
            **_QK_LAYERNORM,
            norm="list",
            exchange="positions",
            plain_forward=True,
            tokenizer=_PLAIN,
        ),
        Family("phi", "PhiConfig", "PhiForCausalLM", **_QK_LAYERNORM, output="dense", tokenizer="GPT2Tokenizer"),
        Family(
            "nemotron",
            "NemotronConfig",
            "NemotronForCausalLM",
            exchange="positions",
            plain_forward=True,
            tokenizer=_PLAIN,
        ),
        Family("glm4", "Glm4Config", "Glm4ForCausalLM", tokenizer=_PLAIN),
        Family(
            "exaone4",
            "Exaone4Config",
            "Exaone4ForCausalLM",
            **_QK_NORM,
            sliding="periodic",
            period=4,
            period_key="sliding_window_pattern",
            window=4096,
            rotary="sliding",
            vocabulary_tokenizer="GPT2Tokenizer",
        ),
        Family(
            "opt",
            "OPTConfig",
            "OPTForCausalLM",
            layers="model.decoder.layers",
            output="out_proj",
            rotary="none",
            plain_forward=True,
            dropout="dropout",
            tokenizer="GPT2Tokenizer",
        ),
        Family("gpt_oss", "GptOssConfig", "GptOssForCausalLM", sinks="sinks", sliding="periodic", period=2, window=128),
        # Of the same make as those above, in transformers 5.23.
        Family("apertus", "ApertusConfig", "ApertusForCausalLM", **_QK_NORM),
        Family("arcee", "ArceeConfig", "ArceeForCausalLM", vocabulary_tokenizer="LlamaTokenizer"),
        Family("aria_text", "AriaTextConfig", "AriaTextForCausalLM"),
        Family("bitnet", "BitNetConfig", "BitNetForCausalLM", output_norm="attn_sub_norm"),
        Family("ernie4_5", "Ernie4_5Config", "Ernie4_5ForCausalLM", tokenizer=_PLAIN),
        Family("ernie4_5_moe", "Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM", tokenizer=_PLAIN),
        Family("flex_olmo", "FlexOlmoConfig", "FlexOlmoForCausalLM", **_QK_NORM, norm="joint", tokenizer=_PLAIN),
        Family("glm", "GlmConfig", "GlmForCausalLM", tokenizer=_PLAIN),
        Family("glm4_moe", "Glm4MoeConfig", "Glm4MoeForCausalLM", **_QK_NORM, tokenizer=_PLAIN),
        Family(
            "granitemoe",
            "GraniteMoeConfig",
            "GraniteMoeForCausalLM",
            transformers_5=True,
            tokenizer=_PLAIN,
            vocabulary_tokenizer="GPT2Tokenizer",
        ),
        Family(
            "granitemoeshared",
            "GraniteMoeSharedConfig",
            "GraniteMoeSharedForCausalLM",
            transformers_5=True,
            tokenizer=_PLAIN,
            vocabulary_tokenizer="GPT2Tokenizer",
        ),
        Family("helium", "HeliumConfig", "HeliumForCausalLM"),
        Family("hunyuan_v1_dense", "HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", **_QUERY_KEY_LAYERNORM),
        Family("hunyuan_v1_moe", "HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM", **_QUERY_KEY_LAYERNORM),
        Family("hy_v3", "HYV3Config", "HYV3ForCausalLM", **_QK_NORM),
        Family("hyperclovax", "HyperCLOVAXConfig", "HyperCLOVAXForCausalLM", tokenizer=_PLAIN),
        Family("jais2", "Jais2Config", "Jais2ForCausalLM", tokenizer="GPT2Tokenizer"),
        Family("minimax_m2", "MiniMaxM2Config", "MiniMaxM2ForCausalLM", **_QK_NORM, norm="joint", tokenizer=_PLAIN),
        Family("ministral3", "Ministral3Config", "Ministral3ForCausalLM", sliding="all", tokenizer=_PLAIN),
        Family("nanochat", "NanoChatConfig", "NanoChatForCausalLM", **_QK_NORM),
        Family("olmo", "OlmoConfig", "OlmoForCausalLM", value_limit="clip_qkv", tokenizer="GPTNeoXTokenizer"),
        Family(
            "olmoe",
            "OlmoeConfig",
            "OlmoeForCausalLM",
            **_QK_NORM,
            norm="joint",
            transformers_5=True,
            value_limit="clip_qkv",
            tokenizer="GPTNeoXTokenizer",
        ),
        Family(
            "phimoe",
            "PhimoeConfig",
            "PhimoeForCausalLM",
            sliding="all",
            transformers_5=True,
            tokenizer=_PLAIN,
            vocabulary_tokenizer="LlamaTokenizer",
        ),
        Family("seed_oss", "SeedOssConfig", "SeedOssForCausalLM"),
        Family("solar_open", "SolarOpenConfig", "SolarOpenForCausalLM"),
        Family("dots1", "Dots1Config", "Dots1ForCausalLM", **_QK_NORM, sliding="from_max_window_layers", window=4096),
        Family("mellum", "MellumConfig", "MellumForCausalLM", **_QK_NORM, window=1024),
        Family(
            "exaone_moe",
            "ExaoneMoeConfig",
            "ExaoneMoeForCausalLM",
            **_QK_NORM,
            sliding="periodic",
            period=4,
            period_key="sliding_window_pattern",
            window=4096,
            rotary="sliding",
        ),
        Family(
            "kolibri1",
            "Kolibri1Config",
            "Kolibri1ForCausalLM",
            **_QK_NORM,
            sliding="periodic",
            period=5,
            window=513,
            rotary="sliding",
        ),
        Family(
            "cohere_compass_text",
            "CohereCompassTextConfig",
            "CohereCompassForCausalLM",
            window=4096,
            rotary="sliding",
        ),
        Family("cwm", "CwmConfig", "CwmForCausalLM", sliding="periodic_first", period=4, window=8192),
        Family(
            "llama4_text",
            "Llama4TextConfig",
            "Llama4ForCausalLM",
            sliding="chunked_with_rotary",
            rotary="no_rope_layers",
        ),
        # Positions are learned or sines.
        Family(
            "biogpt",
            "BioGptConfig",
            "BioGptForCausalLM",
            layers="biogpt.layers",
            output="out_proj",
            rotary="none",
            plain_forward=True,
            dropout="dropout",
            tokenizer="BioGptTokenizer",
        ),
        Family(
            "xglm",
            "XGLMConfig",
            "XGLMForCausalLM",
            **_DECODER_OF_BART,
            heads="attention_heads",
            depth="num_layers",
            interface=False,
            tokenizer="XGLMTokenizer",
        ),
        Family(
            "trocr",
            "TrOCRConfig",
            "TrOCRForCausalLM",
            **_DECODER_OF_BART,
            layers="model.decoder.layers",
            heads="decoder_attention_heads",
            depth="decoder_layers",
            interface=False,
            tokenizer="XLMRobertaTokenizer",
        ),
        # Queries, keys and values in one projection.
        Family(
            "phi3",
            "Phi3Config",
            "Phi3ForCausalLM",
            fused="qkv_proj",
            plain_forward=True,
            sliding="all",
            tokenizer=_PLAIN,
        ),
        Family(
            "gpt2",
            "GPT2Config",
            "GPT2LMHeadModel",
            **_GPT2,
            fused="c_attn",
            transposed=True,
            module="gpt2",
            tokenizer="GPT2Tokenizer",
        ),
        Family(
            "gpt_bigcode",
            "GPTBigCodeConfig",
            "GPTBigCodeForCausalLM",
            **_GPT2,
            fused="c_attn",
            fused_order="groups",
            tokenizer=_PLAIN,
        ),
        Family(
            "gpt_neox",
            "GPTNeoXConfig",
            "GPTNeoXForCausalLM",
            layers="gpt_neox.layers",
            attention="attention",
            fused="query_key_value",
            fused_order="groups",
            output="dense",
            plain_forward=True,
            tokenizer="GPTNeoXTokenizer",
        ),
        Family(
            "persimmon",
            "PersimmonConfig",
            "PersimmonForCausalLM",
            **_QK_LAYERNORM,
            fused="query_key_value",
            fused_order="groups",
            output="dense",
            plain_forward=True,
            tokenizer=_PLAIN,
        ),
        # With attention code of their own.
        Family(
            "falcon",
            "FalconConfig",
            "FalconForCausalLM",
            layers="transformer.h",
            attention="self_attention",
            fused="query_key_value",
            fused_order="groups",
            output="dense",
            module="falcon",
            interface=False,
            exchange="context",
            plain_forward=True,
            dropout="attention_dropout",
        ),
        Family(
            "bloom",
            "BloomConfig",
            "BloomForCausalLM",
            layers="transformer.h",
            attention="self_attention",
            heads="n_head",
            depth="n_layer",
            fused="query_key_value",
            fused_order="groups",
            output="dense",
            rotary="none",
            module="bloom",
            interface=False,
            exchange="context",
            plain_forward=True,
        ),
        Family(
            "gptj",
            "GPTJConfig",
            "GPTJForCausalLM",
            layers="transformer.h",
            attention="attn",
            heads="n_head",
            depth="n_layer",
            output="out_proj",
            output_dropout="resid_dropout",
            module="gptj",
            interface=False,
            exchange="context",
            plain_forward=True,
            dropout="attn_dropout",
            tokenizer="GPT2Tokenizer",
        ),
        # Encoders.
        Family(
            "bert",
            "BertConfig",
            "BertForMaskedLM",
            **_BERT,
            layers="bert.encoder.layer",
            tokenizer="BertTokenizer",
        ),
        Family(
            "roberta",
            "RobertaConfig",
            "RobertaForMaskedLM",
            **_BERT,
            layers="roberta.encoder.layer",
            tokenizer="RobertaTokenizer",
        ),
        Family(
            "xlm-roberta",
            "XLMRobertaConfig",
            "XLMRobertaForMaskedLM",
            **_BERT,
            layers="roberta.encoder.layer",
            tokenizer="XLMRobertaTokenizer",
        ),
        Family(
            "camembert",
            "CamembertConfig",
            "CamembertForMaskedLM",
            **_BERT,
            layers="roberta.encoder.layer",
            tokenizer="CamembertTokenizer",
        ),
        Family(
            "electra",
            "ElectraConfig",
            "ElectraForMaskedLM",
            **_BERT,
            layers="electra.encoder.layer",
            tokenizer="BertTokenizer",
        ),
        Family(
            "ernie",
            "ErnieConfig",
            "ErnieForMaskedLM",
            **_BERT,
            layers="ernie.encoder.layer",
            tokenizer="BertTokenizer",
        ),
        Family(
            "megatron-bert",
            "MegatronBertConfig",
            "MegatronBertForMaskedLM",
            **_BERT,
            layers="bert.encoder.layer",
            interface=False,
            tokenizer="BertTokenizer",
        ),
        Family(
            "rembert",
            "RemBertConfig",
            "RemBertForMaskedLM",
            **_BERT,
            layers="rembert.encoder.layer",
            interface=False,
            tokenizer="RemBertTokenizer",
        ),
        Family(
            "roberta-prelayernorm",
            "RobertaPreLayerNormConfig",
            "RobertaPreLayerNormForMaskedLM",
            **_BERT,
            layers="roberta_prelayernorm.encoder.layer",
            tokenizer="RobertaTokenizer",
        ),
        Family(
            "roc_bert",
            "RoCBertConfig",
            "RoCBertForMaskedLM",
            **_BERT,
            layers="roc_bert.encoder.layer",
            tokenizer="RoCBertTokenizer",
        ),
        Family(
            "data2vec-text",
            "Data2VecTextConfig",
            "Data2VecTextForMaskedLM",
            **_BERT,
            layers="data2vec_text.encoder.layer",
            tokenizer="RobertaTokenizer",
        ),
        Family(
            "xlm-roberta-xl",
            "XLMRobertaXLConfig",
            "XLMRobertaXLForMaskedLM",
            **_BERT,
            layers="roberta.encoder.layer",
            tokenizer=_PLAIN,
        ),
        Family(
            "xmod",
            "XmodConfig",
            "XmodForMaskedLM",
            **_BERT,
            layers="roberta.encoder.layer",
            interface=False,  # it does, but its layers are told the language of every sequence
            tokenizer="XLMRobertaTokenizer",
        ),
        Family(
            "distilbert",
            "DistilBertConfig",
            "DistilBertForMaskedLM",
            layers="distilbert.transformer.layer",
            attention="attention",
            heads="n_heads",
            depth="n_layers",
            query="q_lin",
            key="k_lin",
            value="v_lin",
            output="out_lin",
            rotary="none",
            bidirectional=True,
            plain_forward=True,
            transformers_5=True,
            dropout="dropout",
            tokenizer="BertTokenizer",
        ),
        Family(
            "modernbert",
            "ModernBertConfig",
            "ModernBertForMaskedLM",
            layers="model.layers",
            attention="attn",
            fused="Wqkv",
            output="Wo",
            bidirectional=True,
            sliding="periodic_first",
            period=3,
            period_key="global_attn_every_n_layers",
            window=128,
            window_key="local_attention",
            plain_forward=True,
            transformers_5=True,
            output_dropout="out_drop",
            tokenizer=_PLAIN,
        ),
        # Encoder-decoders.
        Family(
            "t5",
            "T5Config",
            "T5ForConditionalGeneration",
            **_T5,
            tokenizer="T5Tokenizer",
        ),
        Family(
            "mt5",
            "MT5Config",
            "MT5ForConditionalGeneration",
            **_T5,
            transformers_5=True,
            tokenizer="T5Tokenizer",
        ),
        Family(
            "bart",
            "BartConfig",
            "BartForConditionalGeneration",
            **_BART,
            tokenizer="RobertaTokenizer",
        ),
        Family(
            "mbart",
            "MBartConfig",
            "MBartForConditionalGeneration",
            **_MBART,
            tokenizer="MBartTokenizer",
        ),
        Family(
            "marian",
            "MarianConfig",
            "MarianMTModel",
            **_BART,
            tokenizer="MarianTokenizer",
        ),
        Family(
            "pegasus",
            "PegasusConfig",
            "PegasusForConditionalGeneration",
            **_MBART,
            tokenizer="PegasusTokenizer",
        ),
        Family(
            "blenderbot",
            "BlenderbotConfig",
            "BlenderbotForConditionalGeneration",
            **_MBART,
            tokenizer="BlenderbotTokenizer",
        ),
        Family(
            "blenderbot-small",
            "BlenderbotSmallConfig",
            "BlenderbotSmallForConditionalGeneration",
            **_BART,
            tokenizer="BlenderbotSmallTokenizer",
        ),
        Family(
            "plbart",
            "PLBartConfig",
            "PLBartForConditionalGeneration",
            **_BART,
            tokenizer="PLBartTokenizer",
        ),
        Family(
            "m2m_100",
            "M2M100Config",
            "M2M100ForConditionalGeneration",
            **_MBART,
            tokenizer="M2M100Tokenizer",
        ),
        Family(
            "mvp",
            "MvpConfig",
            "MvpForConditionalGeneration",
            **_BART,
            interface=False,
            refuses=("use_prompt", True, "prompts take part in the attention of every layer"),
            tokenizer="MvpTokenizer",
        ),
        # Softmax attention in some layers only.
        Family(
            "qwen3_next",
            "Qwen3NextConfig",
            "Qwen3NextForCausalLM",
            **_QK_NORM,
            gate="query",
            mixed=True,
            plain_forward=True,
            tokenizer="Qwen2Tokenizer",
        ),
        Family(
            "jamba",
            "JambaConfig",
            "JambaForCausalLM",
            mixed=True,
            rotary="none",
            transformers_5=True,
            tokenizer=_PLAIN,
        ),
        Family(
            "recurrent_gemma",
            "RecurrentGemmaConfig",
            "RecurrentGemmaForCausalLM",
            attention="temporal_block",
            mixed=True,
            sliding="all",
            window_key="attention_window_size",
            window=2048,
            transformers_5=True,
            tokenizer="GemmaTokenizer",
        ),
        Family(
            "qwen3_5_text",
            "Qwen3_5TextConfig",
            "Qwen3_5ForCausalLM",
            **_QK_NORM,
            gate="query",
            mixed=True,
            plain_forward=True,
            tokenizer="Qwen3_5Tokenizer",
        ),
        Family(
            "qwen3_5_moe_text",
            "Qwen3_5MoeTextConfig",
            "Qwen3_5MoeForCausalLM",
            **_QK_NORM,
            gate="query",
            mixed=True,
            plain_forward=True,
            tokenizer="Qwen3_5Tokenizer",
            tokenizer_wins=True,
        ),
        Family("lfm2", "Lfm2Config", "Lfm2ForCausalLM", **_QK_LAYERNORM, output="out_proj", mixed=True),
        Family("lfm2_moe", "Lfm2MoeConfig", "Lfm2MoeForCausalLM", **_QK_LAYERNORM, output="out_proj", mixed=True),
        Family(
            "olmo_hybrid",
            "OlmoHybridConfig",
            "OlmoHybridForCausalLM",
            **_QK_NORM,
            norm="joint",
            mixed=True,
            tokenizer=_PLAIN,
        ),
        Family("minimax", "MiniMaxConfig", "MiniMaxForCausalLM", mixed=True),
        Family("bamba", "BambaConfig", "BambaForCausalLM", mixed=True),
        Family(
            "granitemoehybrid",
            "GraniteMoeHybridConfig",
            "GraniteMoeHybridForCausalLM",
            mixed=True,
            transformers_5=True,
            tokenizer=_PLAIN,
        ),
        # Language models inside of multimodal ones.
        Family(
            "gemma3",
            "Gemma3Config",
            "Gemma3ForConditionalGeneration",
            layers="model.language_model.layers",
            files="language_model.model.layers",
            transformers_5=True,
            text="text_config",
            **_QK_NORM,
            sliding="periodic",
            period=6,
            period_key="sliding_window_pattern",
            window=4096,
            tokenizer="GemmaTokenizer",
        ),
        Family(
            "qwen2_5_vl",
            "Qwen2_5_VLConfig",
            "Qwen2_5_VLForConditionalGeneration",
            layers="model.language_model.layers",
            files="model.layers",
            transformers_5=True,
            text="text_config",
            sliding="from_max_window_layers",
            window=4096,
            uses_window=False,
            tokenizer="Qwen2Tokenizer",
        ),
        Family("vaultgemma", "VaultGemmaConfig", "VaultGemmaForCausalLM", sliding="periodic", period=2, window=4096),
    )
}
