"""Checkpoint files in Hugging Face's layout of GPT-2: found, read, or refused by the name of what is not supported."""

import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data import make_vocab, runs

HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OTHERS = {"adapter_config.json": "an adapter (LoRA) without its model", "pytorch_model.bin": "a pickle file"}
# Settings of GPT-2 checkpoints, with the values that gpt.GPT computes with; the first one is the default.
SUPPORTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
# The tokenizer that the config names, and the values of vocab_size that fit it. Files of others name none: there
# gpt.load_model adds four rows, and a file with more rows than GPT-2 has other tokens in them than ours. An id beyond
# the tokenizer's has no text but could be sampled, and a token without a row would be an IndexError.
VOCABULARIES = {None: (50257,), "gpt2": (50257, 50261), "task": (len(make_vocab.read_ranks()) + 4,)}
ERRORS = (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError)


def read(where):
    """(config, weights) of a model's folder, of a run's folder, or of a hub name: a dict of settings, and a dict of
    tensors by name. Exits with one line if there is no such checkpoint or gpt.GPT would compute something else."""
    config_path, *paths = files(where)
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        weights = {}
        for path in paths:
            weights |= load_file(path)
            runs.READ[str(path)] = runs.checksum(path)
        refuse_unsupported(where, config, weights)
    except ERRORS as error:
        unreadable(where, error)
    return config, weights


def unreadable(where, error):
    cause = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
    sys.exit(f"{where} is not a GPT-2 checkpoint that can be read: {type(error).__name__}: {cause}")


def files(where):
    """Paths of config.json and of the weights: one model.safetensors, or several files with an index."""
    if where in HUB and not Path(where).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            return [Path(hf_hub_download(HUB[where], name)) for name in (CONFIG, WEIGHTS)]
        except Exception as error:  # a dozen kinds; all mean "no network, and not in the cache"
            sys.exit(
                f"{where} could not be downloaded ({type(error).__name__}). Give --load a folder with "
                "config.json and model.safetensors, or train from scratch (see --help)."
            )
    folder = Path(where) / "model" if (Path(where) / "report.json").is_file() else Path(where)
    names = [CONFIG, WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        for name, what in OTHERS.items():
            if (folder / name).is_file():
                sys.exit(f"{where} holds {name}, {what}, which is not supported: save the model as {WEIGHTS}")
        if (folder / INDEX).is_file():
            index = runs.read_json(folder / INDEX)
            names = [CONFIG, *sorted(set(index.get("weight_map", {}).values()))]
    for name in names:
        if not (folder / name).is_file():
            sys.exit(f"no model in {where}: {name} is missing. Known names: {', '.join(HUB)}")
    return [folder / name for name in names]


def refuse_unsupported(where, config, weights):
    """Exit if the checkpoint computes something else than gpt.GPT does. Ignoring a setting would give wrong logits."""
    for name, supported in SUPPORTED.items():
        if config.get(name, supported[0]) not in supported:
            sys.exit(f"{where}: {name} {config[name]!r} is not supported, only {supported[0]!r}")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        sys.exit(f"{where}: n_inner {config['n_inner']} is not supported, only four times n_embd")
    name, size = config.get("tokenizer"), config["vocab_size"]
    if name not in VOCABULARIES:
        sys.exit(f"{where}: tokenizer {name!r} is not supported, only 'gpt2' and 'task'")
    if size not in VOCABULARIES[name]:
        sizes = " or ".join(map(str, VOCABULARIES[name]))
        sys.exit(f"{where}: vocab_size {size} is not supported, only {sizes} with the tokenizer {name or 'gpt2'}")
    embedding = weights["transformer.wte.weight" if "transformer.wte.weight" in weights else "wte.weight"]
    if "lm_head.weight" in weights and not torch.equal(weights["lm_head.weight"], embedding):
        sys.exit(f"{where}: an output layer of its own (lm_head) is not supported, only the tied embedding")
