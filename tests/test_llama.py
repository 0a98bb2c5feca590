"""Tests of the Llama family in gpt.py: the same numbers as `transformers`, in both directions, or refused by name."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CONTEXT, V, close, exits, ragged, random_ids, random_pairs, right_padded, with_end
from safetensors.torch import load_file, save_file

import gpt
from data import checkpoints, task
from data.runs import rng

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("tiny_vocabulary")

CLASSES = {"gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SMOLLM2 = os.environ.get("SMOLLM2_DIR")
needs_smollm2 = pytest.mark.skipif(
    not SMOLLM2 or not Path(SMOLLM2, "model.safetensors").is_file(),
    reason="SMOLLM2_DIR names no folder made by tests/smollm2.py",
)


def hugging_face(family="llama", **settings):
    """A random model of transformers, with weights far from their initial values."""
    if family == "gpt2":
        sizes = {"n_positions": CONTEXT, "n_layer": 2, "n_head": 4, "n_embd": 32}
    else:
        sizes = {"max_position_embeddings": CONTEXT, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}  # fmt: skip
    config = getattr(transformers, CLASSES[family] + "Config")(
        # "task" is a tokenizer that needs no files.
        **{"vocab_size": V, "tokenizer": "task", "pad_token_id": None, "eos_token_id": 2, **sizes, **settings}
    )
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(1.0 if "norm" in name or "ln_" in name and name.endswith("weight") else 0, 0.3)
    return model


def both(folder, *args, **settings):
    """(theirs, ours): a random model of transformers, and what gpt.py loads from its files."""
    theirs = hugging_face(*args, **settings)
    theirs.save_pretrained(folder)
    return theirs, gpt.load_model(str(folder)).requires_grad_(False)


def edit(folder, **settings):
    """Change a config.json; None removes a setting."""
    config = json.loads((folder / "config.json").read_text()) | settings
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


# --- equal logits ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CLASSES)
def test_logits_equal_those_of_transformers(tmp_path, family, tied):
    """At once, in pieces with a cache, padded on the left."""
    theirs, ours = both(tmp_path, family, tie_word_embeddings=tied)
    ids = random_ids(3, CONTEXT)
    expected = theirs(ids).logits
    assert expected.std() > 1  # else equality would mean little
    close(ours(ids), expected, 1e-4)
    cache = gpt.Cache(ours.config, 3, CONTEXT, "cpu", torch.float32)
    close(torch.cat([ours(piece, cache=cache) for piece in ids.split([5, 1, 1, 9, 8], 1)], 1), expected, 1e-4)
    prompts = ragged(6)
    P = max(map(len, prompts))
    ids, valid = random_ids(6, P, seed=99), torch.zeros(6, P, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, P - len(prompt) :], valid[row, P - len(prompt) :] = torch.tensor(prompt), True
    padded = ours(ids, valid)
    for row, prompt in enumerate(prompts):
        close(padded[row, P - len(prompt) :], theirs(torch.tensor([prompt])).logits[0], 1e-4)
    assert (ours.lm_head is None) == tied


@pytest.mark.parametrize("family", CLASSES)
def test_packed_answers_equal_answers_alone(tmp_path, family):
    """Answers that share the row of their prompt have the positions right behind it: a rotation by the place in the row
    would be another one. The gradients are equal too."""
    theirs, ours = both(tmp_path, family)
    prompts = [[1, 2, 3]] * 3 + [[7, 8, 9, 10, 11]] * 2
    answers = [[4, 5], [6], [9, 8, 7, 6], [1, 2, 3], [30]]
    for model in (theirs, ours):
        model.requires_grad_()
    logps, mask = gpt.completion_logps(ours, prompts, answers)
    alone = []
    for p, c in zip(prompts, answers):
        logits = theirs(torch.tensor([p + c])).logits[0].log_softmax(-1)
        alone.append(logits[range(len(p) - 1, len(p + c) - 1), c])
    close(logps[mask], torch.cat(alone), 1e-4)
    logps.sum().backward()
    torch.cat(alone).sum().backward()
    _, found = checkpoints.to_hugging_face(ours.config, {name: p.grad for name, p in ours.named_parameters()})
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for name in expected:
        close(found[name], expected[name], 1e-3 * expected[name].abs().max())


def test_heads_need_not_fill_the_width(tmp_path):
    """Qwen3 has heads of 128 channels, whatever the width; Llama's files need not name the size of a head."""
    ids = random_ids(2, CONTEXT)
    theirs, ours = both(tmp_path / "a", "qwen3", head_dim=20, num_attention_heads=3, num_key_value_heads=1)
    close(ours(ids), theirs(ids).logits, 1e-4)
    theirs, _ = both(tmp_path / "b")
    edit(tmp_path / "b", head_dim=None)
    close(gpt.load_model(str(tmp_path / "b"))(ids), theirs(ids).logits, 1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
        LLAMA3,
    ],
)
def test_rope_in_both_spellings(tmp_path, rope):
    """New files have rope_parameters; old ones rope_theta and rope_scaling, with the type under either name."""
    theirs, ours = both(tmp_path, rope_parameters=rope)
    ids = random_ids(2, CONTEXT)
    expected = theirs(ids).logits
    close(ours(ids), expected, 1e-4)
    assert (both(tmp_path / "default")[1](ids) - expected).abs().max() > 0.01  # the settings matter
    theta, scaling = rope["rope_theta"], {k: v for k, v in rope.items() if k != "rope_theta"}
    if rope["rope_type"] == "default":
        scaling = None
    edit(tmp_path, rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
    close(gpt.load_model(str(tmp_path))(ids), expected, 1e-4)
    if scaling:
        edit(tmp_path, rope_scaling={"type" if k == "rope_type" else k: v for k, v in scaling.items()})
        close(gpt.load_model(str(tmp_path))(ids), expected, 1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_bfloat16_files_and_shards(tmp_path, family):
    """The usual form of a large model. Computed in float32, as transformers does if asked to."""
    theirs = hugging_face(family).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids, ours = random_ids(2, CONTEXT), gpt.load_model(str(tmp_path))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    close(ours(ids), theirs(ids).logits, 1e-4)


def test_bfloat16_autocast_is_near(tmp_path):
    """The computation in bfloat16 differs by rounding, not by a wrong type somewhere: also with a cache."""
    _, ours = both(tmp_path, "qwen3")
    prompts = ragged(5)
    ids, exact = gpt.sample(ours, prompts, 8, [V], generator=rng("bfloat16"))
    ours.bfloat16 = True
    scored, mask = gpt.completion_logps(ours, prompts, ids)
    assert (scored[mask] - torch.cat(exact)).abs().mean() < 0.1
    _, sampled = gpt.sample(ours, prompts, 8, [V], generator=rng("bfloat16"))
    assert torch.cat(sampled).isfinite().all()


def test_greedy_sampling_equals_generate(tmp_path):
    theirs, ours = both(tmp_path)
    for prompt in ragged(4):
        ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert gpt.sample(ours, [prompt], 10, [V], temperature=0)[0][0] == ids[0, len(prompt) :].tolist()


# --- saving ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CLASSES)
def test_what_is_saved_opens_in_transformers(tmp_path, family, tied):
    theirs, ours = both(tmp_path / "theirs", family, tie_word_embeddings=tied)
    ours.save(tmp_path / "ours")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again) is type(theirs)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = random_ids(2, CONTEXT)
    close(again.eval()(ids).logits.detach(), theirs(ids).logits, 1e-5)
    reloaded = gpt.load_model(str(tmp_path / "ours"))
    assert torch.equal(reloaded(ids), ours(ids)) and reloaded.config == ours.config
    # Nothing is renamed, added or lost on the way.
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert first.keys() - {"lm_head.weight"} == second.keys() - {"lm_head.weight"}
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}, LLAMA3])
def test_scaled_rope_is_saved(tmp_path, rope):
    theirs, ours = both(tmp_path / "theirs", rope_parameters=rope)
    ours.save(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = random_ids(2, CONTEXT)
    close(again(ids).logits.detach(), theirs(ids).logits, 1e-5)
    # Older versions of transformers read the other spelling.
    edit(tmp_path / "ours", rope_parameters=None)
    close(gpt.load_model(str(tmp_path / "ours"))(ids), theirs(ids).logits, 1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_reward_model_opens_in_transformers(tmp_path, family, tied):
    """It has no output layer over the vocabulary, also if the language model had one."""
    _, ours = both(tmp_path / "theirs", family, tie_word_embeddings=tied)
    torch.manual_seed(0)
    scorer = gpt.Scorer(ours).requires_grad_(False)
    scorer.mean, scorer.std = 0.7, 1.9
    scorer.save(tmp_path / "ours")
    prompts, answers, _ = random_pairs(8, seed=23)
    prompts, answers = with_end(prompts, answers)
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(again).__name__ == CLASSES[family] + "ForSequenceClassification"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids, _, seen = right_padded(prompts, answers)
    found = again.eval()(ids.masked_fill(seen == 0, V - 1), attention_mask=seen).logits.detach()[:, 0]
    scores = gpt.final_scores(scorer, prompts, answers)
    assert scores.std() > 0.2
    close(found, scores * 1.9 + 0.7, 1e-4)
    close(gpt.final_scores(gpt.load_scorer(str(tmp_path / "ours")), prompts, answers).detach(), scores)
    exits(gpt.load_model, str(tmp_path / "ours"), match="cannot generate")


def test_a_llama_can_be_made_from_scratch(tmp_path):
    """The five choices are settings like any other: also a tiny model of today's kind learns and is saved."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = gpt.GPT(gpt.GPTConfig(V, CONTEXT, 2, 4, 32, norm="rms", rope=rope, mlp="swiglu", biases="none"))
    optimizer, ids = gpt.make_optimizer(model, 1e-2), random_ids(4, 12)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    model.save(tmp_path)
    assert torch.equal(gpt.load_model(str(tmp_path))(ids), model(ids))
    odd = gpt.GPT(gpt.GPTConfig(V, CONTEXT, 2, 4, 32, norm="rms"))
    with pytest.raises(ValueError, match="no model of Hugging Face"):
        odd.save(tmp_path)


# --- refused by name ---


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("llama", {"model_type": "mistral"}),
        ("llama", {"model_type": "gemma3_text"}),
        ("qwen2", {"model_type": "qwen2_moe"}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"attention_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"add_cross_attention": True}),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, family, setting):
    """One line with the setting's name. Ignoring it would give other logits without a word."""
    hugging_face(family).save_pretrained(tmp_path)
    gpt.load_model(str(tmp_path))
    edit(tmp_path, **setting)
    name = [*setting][0]
    name = {"rope_parameters": "rope|partial_rotary_factor", "rope_scaling": "rope"}.get(name, name)
    exits(gpt.load_model, str(tmp_path), match=f"({name}).* is not supported, only")


def test_tied_weights_that_differ_are_refused(tmp_path):
    theirs = hugging_face(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, tie_word_embeddings=True)
    exits(gpt.load_model, str(tmp_path), match="lm_head.* is not supported")
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    assert gpt.load_model(str(tmp_path)).lm_head is None


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(tmp_path, name):
    hugging_face(tie_word_embeddings=False).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    exits(gpt.load_model, str(tmp_path), match=f"cannot|can be read: KeyError: '{name}'")


def test_a_llama_without_a_tokenizer_is_refused(tmp_path):
    hugging_face().save_pretrained(tmp_path)
    edit(tmp_path, tokenizer=None)
    exits(gpt.load_model, str(tmp_path), match="tokenizer.json is missing")


# --- a real model ---

QUESTIONS = [
    "What is the capital of France?", "Write a haiku about the sea.", "What is 17 + 25?", "Name three colors.",
    "Translate 'good morning' into Spanish.", "Why is the sky blue?", "Who wrote Hamlet?", "What do bees make?",
    "Give me a recipe for pancakes.", "Is 7 a prime number?", "How many legs does a spider have?", "Tell me a joke.",
    "What is the largest planet?", "Explain gravity to a child.", "List the days of the week.", "What is tea?",
]  # fmt: skip


@needs_smollm2
def test_smollm2_is_the_same_model_as_in_transformers():
    """Logits on short and long texts, and 48 greedy tokens of 20 answers."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).requires_grad_(False)
    args = SimpleNamespace(device="cpu", dtype="float32")
    ours, tok = gpt.load_model(SMOLLM2, args.device), gpt.Tokenizer(SMOLLM2)
    questions = QUESTIONS + [p.text for p in task.problems(4, 0, "test")]
    prompts = [tok.prompt(q) for q in questions]
    for ids in (prompts[0], sum(prompts, [])[:500]):
        close(ours(torch.tensor([ids])).detach(), theirs(torch.tensor([ids])).logits, 1e-3)
    found, _ = gpt.sample(ours, prompts, 48, [tok.end], temperature=0)
    for prompt, ids in zip(prompts, found):
        # Their greedy text is ours if each of our tokens is their most likely one after the tokens before it.
        logits = theirs(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == ids
        assert len(ids) == 48 or ids[-1] == theirs.config.eos_token_id
    assert "Paris" in tok.decode(found[0])


@needs_smollm2
def test_smollm2_saved_opens_in_transformers_with_its_tokenizer(tmp_path):
    ours = gpt.load_model(SMOLLM2)
    ours.save(tmp_path / "model")
    again = gpt.load_model(str(tmp_path / "model"))
    tok = gpt.Tokenizer(again.config.tokenizer)
    assert again.config.chat and tok.vocab_size == again.config.vocab_size == 49152
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "model").apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True, return_dict=False
    )
    assert ids == tok.prompt(QUESTIONS[0])
    assert (theirs.config.eos_token_id, theirs.config.pad_token_id) == (tok.end, tok.pad)
    with torch.no_grad():
        close(again(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, 1e-3)
