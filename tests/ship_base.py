"""Make data/base, the base model that comes with the repository, from the reader's own: python gpt.py first.

    python gpt.py && python tests/ship_base.py

The weights are stored in half precision, 1.4 MB. gpt.base_model says when they are used.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors.torch import load_file, save_file

import gpt
from data import lessons, runs

FLAGS = ("n_layer", "n_embd", "block_size", "steps", "batch", "length", "lr")


def main():
    run = runs.Run(runs.parse("gpt", gpt.parser(), []))
    if not run.finished():
        sys.exit("runs/base is missing or was made by other code: python gpt.py")
    gpt.SHIPPED.mkdir(exist_ok=True)
    weights = {name: w.half() for name, w in load_file(run.folder / "model" / "model.safetensors").items()}
    save_file(weights, gpt.SHIPPED / "model.safetensors", {"format": "pt"})
    config = runs.read_json(run.folder / "model" / "config.json")
    (gpt.SHIPPED / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tok = gpt.Tokenizer("task")
    made = {"fingerprint": lessons.fingerprint(tok), "loss": gpt.first_loss(gpt.load_model(str(gpt.SHIPPED)), tok)}
    made["flags"] = {name: run.config[name] for name in FLAGS}
    text = json.dumps(config | {"made": made}, indent=2)
    (gpt.SHIPPED / "config.json").write_text(text + "\n", encoding="utf-8")
    print(f"{gpt.SHIPPED}: {sum(f.stat().st_size for f in gpt.SHIPPED.iterdir()) / 1e6:.2f} MB, {made}")


if __name__ == "__main__":
    main()
