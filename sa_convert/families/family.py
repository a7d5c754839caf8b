"""What differs between model families: the frozen data that `sa_convert.families.table` reads from models/*.json.

Every default is what Llama does. This file imports neither torch nor transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

PREFIX = "shared_attention_"
"""Before the base's model type in that of a converted model."""

CLASS_PREFIX = "SharedAttention"
"""Before the base's class in that of a converted model."""


def changed(entry: Any, *left_out: str) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, but for those left out."""
    found = {each.name: (getattr(entry, each.name), each.default) for each in fields(entry)}
    return {name: value for name, (value, usual) in found.items() if name not in left_out and value != usual}


@dataclass(frozen=True)
class Stack:
    """Attention of one kind in a model that has several: encoder, decoder and cross-attention."""

    name: str
    """As plans name it: "decoder.cross"."""
    layers: str
    """Module path of the layers."""
    attention: str
    """Path of the attention module in a layer."""
    heads: str = "num_attention_heads"
    """Config key of the number of query heads."""
    cross: bool = False
    """Keys and values come from the encoder."""
    query_input: str | None = None
    """The norm in a layer whose output only the queries read, if there is one."""

    # The converter alone reads these.
    depth: str = "num_hidden_layers"
    """Config key of the number of layers."""
    caches: bool = True
    """Keys and values are kept from one generated token to the next."""

    def to_json(self) -> dict[str, Any]:
        """What travels with a converted model: the fields that differ from their defaults."""
        return changed(self, "depth", "caches")


@dataclass(frozen=True)
class Modules:
    """What the code that travels has to know of a family. Converted models carry it in config.json."""

    layers: str = "model.layers"
    """Module path of the layers."""
    attention: str = "self_attn"
    """Path of the attention module in a layer."""
    heads: str = "num_attention_heads"
    """Config key of the number of query heads."""
    stacks: tuple[Stack, ...] = ()
    """If the model has several kinds of attention: all of them, instead of layers, attention and heads."""

    query: str = "q_proj"
    """The projection that makes queries."""
    key: str = "k_proj"
    """The projection that makes keys."""
    value: str = "v_proj"
    """The projection that makes values."""
    output: str = "o_proj"
    """The projection after attention."""
    output_outside: bool = False
    """`output` is a path in the layer rather than in the attention module."""
    fused: str | None = None
    """The projection that makes queries, keys and values at once, instead of query, key and value."""
    fused_order: str = "blocks"
    """How its rows lie: "blocks" (all queries, all keys, all values) or "groups" (for each KV group its queries, its
    key and its value)."""
    transposed: bool = False
    """Projections hold (input, output), as Conv1D does."""

    query_norm: str | None = None
    """The norm of queries, if there is one."""
    key_norm: str | None = None
    """The norm of keys, if there is one."""
    norm: str = "shared"
    """How these norms hold their weights: "shared" (one for all heads), "rows" (a row per head), "list" (a module per
    head) or "joint" (over all heads together, so that only whole layers can reuse)."""
    gate: str | None = None
    """What scales the attention's output before `output`: "query" (rows beside each head's query in `query`; needs
    plain_forward)."""
    value_limit: str | None = None
    """Config key of the bound that values are clamped to."""
    output_norm: str | None = None
    """The norm before `output`, if there is one."""
    sinks: str | None = None
    """The parameter with one attention sink per query head."""

    bidirectional: bool = False
    """Tokens see later ones, and nothing is cached."""
    rotary: str = "all"
    """Which layers rotate queries and keys: "all", "none", "sliding" (only those, if the model has a window) or
    "no_rope_layers"."""
    exchange: str = "keyword"
    """How loans travel through the model's forward: as a "keyword", beside the rotary embeddings ("positions"), or, if
    the family passes on neither, in a variable of the "thread"."""
    plain_forward: bool = False
    """Our own attention forward runs, since the family's own one fixes the number of heads."""
    module: str | None = None
    """The class of ours that runs the attention of a family with special steps."""
    interface: bool = True
    """The family's own code calls the attention interface of transformers 5."""
    dropout: str = "attention_dropout"
    """Attribute of the attention module that holds the dropout probability (needed with plain_forward)."""
    output_dropout: str | None = None
    """The dropout module after `output`."""

    @property
    def special_class(self) -> str | None:
        """The class in shared_attention_special.py that runs the family's attention; None if its own forward does."""
        if not self.plain_forward:
            return None
        if self.module is None:
            return "PlainAttention" if self.exchange == "keyword" else "ThreadedAttention"
        names = {"gpt2": "GPT2Attention", "gptj": "GPTJAttention", "t5": "T5Attention"}
        return names.get(self.module) or "".join(map(str.capitalize, self.module.split("_"))) + "Attention"

    def to_json(self) -> dict[str, Any]:
        """What travels with a converted model: the fields that differ from Llama's."""
        found = changed(self, "plain_forward", "module", "interface")
        return found | {"stacks": [stack.to_json() for stack in self.stacks]} if self.stacks else found


@dataclass(frozen=True)
class Windows:
    """Which layers attend within a sliding window, and how long it is, if config.json does not say so itself."""

    sliding: str = "none"
    """The layers that do, if there is no `layer_types`: "none", "all", "periodic", "periodic_first",
    "from_max_window_layers", "alternate_below_max_window_layers", "without_rotary" or "chunked_with_rotary" (those that
    rotate attend within chunks)."""
    period: int = 0
    """For "periodic", every period-th layer has full attention; for "periodic_first", from the first on."""
    period_key: str | None = None
    """Config key that overrides it."""
    size: int | None = None
    """Tokens in the window if its key is missing."""
    size_key: str = "sliding_window"
    """Config key of the number of tokens in the window."""
    used: bool = True
    """What a missing `use_sliding_window` means."""


@dataclass(frozen=True)
class StockWindows:
    """How a model is told by config.json alone which of its layers attend within a window: by `layer_types` and one
    `sliding_window`, in a class of transformers that engines know, too. Tests run what is written."""

    written_as: str | None = None
    """The model type of that class; None: the base's own."""
    needs: Mapping[str, Any] = field(default_factory=dict)
    """Config keys, and the values with which both types compute the same. A missing key has that value."""
    fills: Mapping[str, Any] = field(default_factory=dict)
    """Config keys that the base may leave out, and what its type takes then; the other type takes something else."""
    sets: Mapping[str, Any] = field(default_factory=dict)
    """Config keys that are written besides."""
    drops: tuple[str, ...] = ()
    """Config keys that the other type does not have."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Command-line options that an engine needs, by its name."""
    why: str = ""
    """What is particular about it."""
    refused: str | None = None
    """Why it cannot be, of a type for which one would expect it."""


@dataclass(frozen=True)
class StockBlocks:
    """How engines are told which layers have no attention: by `block_configs`, in a class of theirs that computes what
    the family does but for that. transformers has no such class, and runs the code in the folder. Tests run both."""

    architecture: str
    """The name of that class."""
    norm: str
    """The norm before attention, which layers without it lack there."""
    fills: Mapping[str, Any] = field(default_factory=dict)
    """Config keys that are told layer by layer there, and what the family takes if they are missing."""


@dataclass(frozen=True)
class Tokenizer:
    """How transformers reads the family's tokenizer files. Tests compare it with transformers."""

    registered: str | None = None
    """The class that transformers 5 registers for the type, if there is one. PreTrainedTokenizerFast takes
    tokenizer.json as it stands."""
    wins: bool = False
    """That class is taken whatever tokenizer_config.json declares."""
    vocabulary: str | None = None
    """The class that reads the vocabulary if there is no tokenizer.json, if it is another one."""
    mistral_common: bool = False
    """tekken.json is read by mistral-common, if that is installed."""
    corrected: bool = False
    """`fix_mistral_regex` corrects a tokenizer.json that transformers 4 has saved."""


@dataclass(frozen=True)
class Processor:
    """The classes that AutoProcessor takes for the family, if no file names them. Tests compare with transformers."""

    main: str | None = None
    """The processor, which holds the others and a tokenizer."""
    images: str | None = None
    """What reads images."""
    videos: str | None = None
    """What reads videos."""


@dataclass(frozen=True)
class Family:
    """One model type of transformers. Other heads on the same base than `default_class` convert, too."""

    model_type: str
    """As in config.json; the name of the data file."""
    config_class: str
    """Name of the configuration class in transformers."""
    default_class: str
    """The model class, if config.json names none under `architectures`."""
    modules: Modules = Modules()
    """What travels with a converted model."""
    windows: Windows = Windows()
    """Sliding windows."""
    stock_windows: StockWindows | None = field(default=None, hash=False)
    """How config.json says which layers have one; None: it cannot, in a class that transformers and engines know."""
    stock_blocks: StockBlocks | None = field(default=None, hash=False)
    """How config.json says which layers have no attention; None: no engine has such a class."""
    tokenizer: Tokenizer = Tokenizer()
    """Classes of tokenizers."""
    processor: Processor = Processor()
    """Classes of processors, in multimodal families."""

    text: str | None = None
    """Config key of the language model's own config in a multimodal model."""
    files: str | None = None
    """What checkpoints call the path `modules.layers`, if it is not the same."""
    depth: str = "num_hidden_layers"
    """Config key of the number of layers, unless stacks have their own."""
    groups: str = "num_key_value_heads"
    """Config key of the number of KV groups."""
    groups_if: str | None = None
    """Config key without which `groups` is not read."""
    one_group: str | None = None
    """Config key that makes one KV group of all heads, unless it is false or `groups` is read by `groups_if`."""
    mixed: bool = False
    """Only some layers have softmax attention; the others lack the projections."""
    refuses: tuple[str, object, str] | None = None
    """A config key, the value of it that is refused, and why."""
    taken_for: tuple[str, str] | None = None
    """A config key, and the type that transformers takes the model for if config.json has it."""
    turning: str | None = None
    """Why keys cannot be cached before they are turned by position, if they cannot."""
    merging: str | None = None
    """Why layers cannot have fewer KV groups, if they cannot: the two numbers of a key that turn together must lie half
    a head apart, and all must turn."""
    transformers_5: bool = False
    """Attention is shared in transformers 5 only: in 4 the family's code does not call the attention interface."""

    @property
    def told_positions(self) -> bool:
        """Whether decoding tells positions, as generate() does: Bamba counts from 0 in every pass that is not told."""
        return self.mixed and self.modules.rotary != "none"

    @property
    def granularity(self) -> str:
        """The smallest unit that can reuse: "layer" if queries are normalised over all heads together, else "head"."""
        return "layer" if self.modules.norm == "joint" else "head"

    @property
    def all_stacks(self) -> tuple[Stack, ...]:
        """The stacks, or the one without a name of a model with a single kind of attention."""
        own = self.modules
        return own.stacks or (
            Stack("", own.layers, own.attention, own.heads, depth=self.depth, caches=not own.bidirectional),
        )

    @property
    def encoder_decoder(self) -> bool:
        """Whether a stack attends to the output of another."""
        return any(stack.cross for stack in self.modules.stacks)
