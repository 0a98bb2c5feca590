"""How much memory do two steps of training a 0.5B model take? Prints a table, kept in data/results/; it is not a test.

    python tests/memory.py SMOLLM2 DATA         about half an hour on two cores

The model has the sizes of Qwen2.5-0.5B, with its vocabulary of 151,936 tokens, and random weights: memory does not
depend on their values. Tokenizer and chat template are those of the folder SMOLLM2 (see smollm2.py). DATA is a folder
with gsm8k/train.jsonl and ultrafeedback/train.jsonl; the pairs are the longest ones that fit into 512 tokens, and the
answers of ppo.py and grpo.py may have 256. Every script runs in a process of its own, in float32. With --micro_batch 1
the size of the batch matters little to the memory, so the batches are small.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from measure import header, keep_table, row, trained
from transformers import Qwen2Config, Qwen2ForCausalLM

import gpt
from data import lessons, public

SIZES = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
ROLLOUTS = ["--data", "runs/problems.jsonl", "--max_steps", 2, "--problems", 2, "--prompts", 1]
FLAGS = {  # two steps, because the optimizer's state is there from the first one on
    "sft": ["--data", "runs/pairs.jsonl", "--steps", 2, "--batch", 2],
    "reward_model": ["--data", "runs/pairs.jsonl", "--steps", 2, "--batch", 2],
    "dpo": ["--data", "runs/pairs.jsonl", "--steps", 2, "--batch", 2],
    "grpo": [*ROLLOUTS, "--group", 4],
    "ppo": [*ROLLOUTS, "--answers", 4, "--epochs", 1],
}


def make_model(smollm2, folder):
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, folder)


def make_data(data, tok):
    """runs/pairs.jsonl: the longest twenty that fit into 512 tokens; runs/problems.jsonl: twenty of GSM8K."""
    pairs = lessons.clean(public.load_rows(data / "ultrafeedback/train.jsonl"), tok, lessons.pair_room(tok, 512))[0]
    pairs.sort(key=lambda row: -len(row["prompt"] + row["chosen"] + row["rejected"]))
    Path("runs/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs[:20]))
    problems = (data / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("runs/problems.jsonl").write_text("".join(problems[:20]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("smollm2", type=Path)
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    model = Path("runs/random-0.5B").absolute()
    model.mkdir(parents=True, exist_ok=True)
    make_model(args.smollm2, model)
    make_data(args.data, gpt.Tokenizer(str(model)))
    columns = ["", "peak GB", "seconds"]
    rows = []
    for script, flags in FLAGS.items():
        report = trained(script, "--load", model, *flags, "--micro_batch", 1)[-1].report
        rows.append([script, f"{report['peak_gb']:.1f}", f"{report['seconds']:.0f}"])
    header(*columns)
    for cells in rows:
        row(*cells)
    keep_table("memory", "Memory of a 0.5B model with 151,936 tokens, `--micro_batch 1`", columns, rows)


if __name__ == "__main__":
    main()
