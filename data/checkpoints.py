"""Checkpoint files in Hugging Face's layout: found, read and written, or refused by the name of what is not supported.

A published model is a folder: config.json with its settings, model.safetensors with its weights (or several files with
an index), and the files of its tokenizer (data/vocabularies.py). The tables below translate names of settings and of
weights, in both directions.
"""

import json
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data import make_vocab, runs, vocabularies

HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OTHERS = {"adapter_config.json": "an adapter (LoRA) without its model", "pytorch_model.bin": "a pickle file"}
ERRORS = (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError)

# model_type in config.json: the name of Hugging Face's classes, and the settings of gpt.GPTConfig that it stands for.
FAMILIES = {
    "gpt2": ("GPT2", {"norm": "layer", "mlp": "gelu", "biases": "all", "qk_norm": False}),
    "llama": ("Llama", {"norm": "rms", "mlp": "swiglu", "biases": "none", "qk_norm": False}),
    "qwen2": ("Qwen2", {"norm": "rms", "mlp": "swiglu", "biases": "qkv", "qk_norm": False}),
    "qwen3": ("Qwen3", {"norm": "rms", "mlp": "swiglu", "biases": "none", "qk_norm": True}),
}
# Names of sizes: ours, GPT-2's, and those of the other families.
SIZES = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "block_size": ("n_positions", "max_position_embeddings"),
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_embd": ("n_embd", "hidden_size"),
    "n_inner": ("n_inner", "intermediate_size"),
    "norm_eps": ("layer_norm_epsilon", "rms_norm_eps"),
    "n_kv_head": (None, "num_key_value_heads"),
    "head_dim": (None, "head_dim"),
}
# What a size is where config.json does not name it. None: as in GPTConfig.
DEFAULTS = {"layer_norm_epsilon": 1e-5, "rms_norm_eps": 1e-6} | dict.fromkeys(
    ("n_inner", "num_key_value_heads", "head_dim")
)
# Other settings that change the logits, with the values that gpt.GPT computes with; the first one is the default.
SUPPORTED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # GPT-2's
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "hidden_act": ("silu", "swish"),  # those of the other families
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}
# The values of vocab_size that fit a tokenizer of ours. An id beyond the tokenizer's has no text but could be sampled,
# and a token without a row would be an IndexError. (To a file of GPT-2's size gpt.load_model adds four rows.)
VOCABULARIES = {"gpt2": (50257, 50261), "task": (len(make_vocab.read_ranks()) + 4,)}
ROPE = ("default", "linear", "llama3")
# Names of weights, in families other than GPT-2. Ours can be several of theirs, one below the other.
LAYERS = {
    "wte": ["model.embed_tokens"],
    "ln_f": ["model.norm"],
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
# GPT-2's names are ours, but its linear layers are stored transposed (Conv1D).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


# --- reading ---------------------------------------------------------------------------------


def read(where):
    """(config, weights, tokenizer) of a model's folder, of a run's folder, or of a hub name: a dict of settings, a
    dict of tensors by name, and {file name: bytes} of a published tokenizer. config["tokenizer"] is then its folder.
    Exits with one line if there is no such checkpoint or gpt.GPT would compute something else."""
    config_path, *paths = files(where)
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        weights, tokenizer = {}, {}
        for path in paths:
            weights |= load_file(path)
            runs.READ[str(path)] = runs.checksum(path)
        if config.get("tokenizer") not in vocabularies.OURS:
            tokenizer = vocabularies.files(config_path.parent)
            is_gpt2 = config.get("model_type", "gpt2") == "gpt2" and not tokenizer
            config["tokenizer"] = "gpt2" if is_gpt2 else str(config_path.parent)
        refuse_unsupported(where, config, weights)
    except ERRORS as error:
        unreadable(where, error)
    return config, weights, tokenizer


def unreadable(where, error):
    cause = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
    sys.exit(f"{where} is not a checkpoint that can be read: {type(error).__name__}: {cause}")


def files(where):
    """Paths of config.json and of the weights: one model.safetensors, or several files with an index."""
    folder = Path(where) / "model" if (Path(where) / "report.json").is_file() else Path(where)
    if not folder.is_dir() and (where in HUB or re.fullmatch(r"[\w.-]+/[\w.-]+", str(where))):
        folder = download(where)
    names = [CONFIG, WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        index = runs.read_json(folder / INDEX)
        names = [CONFIG, *sorted(set(index.get("weight_map", {}).values()))]
    elif not (folder / WEIGHTS).is_file():
        for name, what in OTHERS.items():
            if (folder / name).is_file():
                sys.exit(f"{where} holds {name}, {what}, which is not supported: save the model as {WEIGHTS}")
    for name in names:
        if not (folder / name).is_file():
            sys.exit(f"no model in {where}: {name} is missing. Names on the hub: {', '.join(HUB)}, or OWNER/NAME")
    return [folder / name for name in names]


def download(where):
    """The folder that a model of the hub is downloaded to, once."""
    from huggingface_hub import snapshot_download

    # GPT-2's tokenizer comes with tiktoken.
    patterns = [CONFIG, WEIGHTS] if where in HUB else [CONFIG, "model*.safetensors", INDEX, *vocabularies.FILES]
    try:
        return Path(snapshot_download(HUB.get(where, where), allow_patterns=patterns))
    except Exception as error:  # a dozen kinds; most mean "no network, and not in the cache"
        sys.exit(
            f"no model in {where}: there is no such folder, and from the hub it could not be downloaded "
            f"({type(error).__name__}). Give --load a folder with config.json and model.safetensors, or train from "
            "scratch (see --help)."
        )


def refuse_unsupported(where, config, weights):
    """Exit if the checkpoint computes something else than gpt.GPT does. Ignoring a setting would give wrong logits."""

    def refuse(what, supported):
        sys.exit(f"{where}: {what} is not supported, only {supported}")

    family = config.get("model_type", "gpt2")
    if family not in FAMILIES:
        refuse(f"model_type {family!r}", ", ".join(FAMILIES))
    for name, values in SUPPORTED.items():
        if config.get(name, values[0]) not in values:
            refuse(f"{name} {str(config[name])[:60]!r}", repr(values[0]))
    if "sliding_attention" in (config.get("layer_types") or ()):
        refuse("sliding_attention in layer_types", "full attention")
    if family != "gpt2":
        settings = rope(config)
        if settings["rope_type"] not in ROPE or any(isinstance(value, dict) for value in settings.values()):
            refuse(f"rope {str(settings)[:80]}", f"rope_type {', '.join(ROPE)}")
        if settings.get("partial_rotary_factor", 1) != 1:
            refuse(f"partial_rotary_factor {settings['partial_rotary_factor']}", "1")
    name, size = config["tokenizer"], config["vocab_size"]
    if size not in VOCABULARIES.get(name, (size,)):
        refuse(f"vocab_size {size}", f"{' or '.join(map(str, VOCABULARIES[name]))} with the tokenizer {name}")
    if config["tokenizer"] == "gpt2" and "chat" not in config and config["vocab_size"] > 50257:
        # GPT-2's tokenizer has no text for the other ids, and they could be sampled.
        refuse(f"vocab_size {config['vocab_size']} without a tokenizer.json", "GPT-2's 50257 tokens")
    names = ("transformer.wte.weight", "wte.weight") if family == "gpt2" else ("model.embed_tokens.weight",)
    embedding = weights[next((name for name in names if name in weights), names[-1])]
    if is_tied(config) and not torch.equal(weights.get("lm_head.weight", embedding), embedding):
        refuse("an output layer (lm_head) that differs from the embedding although both are tied", "equal ones")


def is_tied(config):
    """Is the output layer the embedding? Not in reward models, which have no such layer: there it does not matter."""
    return config.get("tie_word_embeddings", config.get("model_type", "gpt2") == "gpt2")


def rope(config):
    """The settings of rotary positions. New files have them in `rope_parameters`, old ones in `rope_theta` and
    `rope_scaling`, where the type may be called `type`."""
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    return {"rope_theta": config.get("rope_theta", 10000.0), **settings, "rope_type": kind}


# --- translating -----------------------------------------------------------------------------


def settings(config):
    """The arguments of gpt.GPTConfig for a config.json."""
    family = config.get("model_type", "gpt2")
    found = {
        "tokenizer": config["tokenizer"],
        "chat": config.get("chat", False),
        "rope": None if family == "gpt2" else rope(config),
        "tied": is_tied(config),
        **FAMILIES[family][1],
    }
    for ours, names in SIZES.items():
        theirs = names[family != "gpt2"]
        if theirs:
            found[ours] = config.get(theirs, DEFAULTS[theirs]) if theirs in DEFAULTS else config[theirs]
    return found


def parts(name, family):
    """Hugging Face's names of the tensors that our tensor `name` is made of.

    >>> parts("h.2.mlp.c_fc.weight", "llama")
    ['model.layers.2.mlp.gate_proj.weight', 'model.layers.2.mlp.up_proj.weight']
    """
    if name == "lm_head.weight":
        return [name]
    if family == "gpt2":
        return ["transformer." + name]
    block, layer, kind = re.fullmatch(r"(h\.\d+\.)?(.+)\.(weight|bias)", name).groups()
    where = block.replace("h.", "model.layers.") if block else ""
    return [f"{where}{theirs}.{kind}" for theirs in LAYERS[layer]]


def from_hugging_face(config, loaded, names):
    """{our name: tensor} for all names, from Hugging Face's tensors. A reward model has no output layer."""
    family, weights = family_of(config), {}
    for name in names:
        if name == "lm_head.weight" and "score.weight" in loaded:
            weights[name] = loaded[parts("wte.weight", family)[0]]
            continue
        # Published GPT-2 files lack the prefix; files written by `transformers` have it.
        found = [loaded[part if part in loaded else part.removeprefix("transformer.")] for part in parts(name, family)]
        w = torch.cat(found) if len(found) > 1 else found[0]
        weights[name] = w.t() if family == "gpt2" and name.endswith(TRANSPOSED) else w
    return weights


def family_of(config):
    """The model_type that has the settings of a GPTConfig. Raises ValueError if there is none."""
    for family, (_, settings) in FAMILIES.items():
        if all(getattr(config, k) == v for k, v in settings.items()) and (family == "gpt2") == (config.rope is None):
            return family
    raise ValueError("no model of Hugging Face has these settings of norm, positions, MLP and biases")


def to_hugging_face(config, weights, scorer=False):
    """(config.json, tensors) in Hugging Face's names, for a GPTConfig and its weights."""
    family = family_of(config)
    classes, _ = FAMILIES[family]
    found = {
        "model_type": family,
        "architectures": [classes + ("ForSequenceClassification" if scorer else "LMHeadModel" if family == "gpt2"
                                     else "ForCausalLM")],
        **{names[family != "gpt2"]: getattr(config, ours) for ours, names in SIZES.items() if names[family != "gpt2"]},
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": config.vocab_size - 2 if config.end is None else config.end,
        "pad_token_id": config.vocab_size - 1 if config.pad is None else config.pad,
        "chat": config.chat,
    }  # fmt: skip
    if config.tokenizer in vocabularies.OURS:  # a published one is found by its files
        found["tokenizer"] = config.tokenizer
    if family == "gpt2":
        found |= {"activation_function": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        found |= {"hidden_act": "silu", "rope_parameters": config.rope, "rope_theta": config.rope["rope_theta"]}
        if config.rope["rope_type"] != "default":
            found["rope_scaling"] = config.rope  # where older versions of `transformers` look
    tensors = {}
    for name, w in weights.items():
        if name == "lm_head.weight" and scorer:
            continue
        w = w.detach().t() if family == "gpt2" and name.endswith(TRANSPOSED) else w.detach()
        names = parts(name, family)
        heads = [config.n_head, config.n_kv_head, config.n_kv_head]
        sizes = [n * config.head_dim for n in heads] if len(names) == 3 else len(w) // len(names)
        tensors |= dict(zip(names, map(torch.Tensor.contiguous, w.split(sizes))))
    return found, tensors


# --- writing ---------------------------------------------------------------------------------


def write(folder, config, weights, tokenizer):
    """Write a model's folder: settings, tensors, and the {file name: bytes} of a published tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**tokenizer, CONFIG: json.dumps(config, indent=2).encode()}.items():
        runs.write_atomically(folder / name, lambda path, content=content: path.write_bytes(content))
    runs.write_atomically(folder / WEIGHTS, lambda path: save_file(weights, path, {"format": "pt"}))
