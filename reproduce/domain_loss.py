"""Validation loss by domain, the numbers of Table 6: a trained model on held-out documents of each domain.

    python -m reproduce.domain_loss --model FOLDER --tokenizer gpt2 --text data/text/domains --length 8192 \\
        --out FILE.json

Every DOMAIN.jsonl of the folder is a domain; its lines have a text.  Documents are joined by the tokenizer's end of
text and cut into sequences; the loss is the mean over tokens, in nat/token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opus_bench.files import replacing
from opus_bench.gradients import sample_losses

SEQUENCES = 64  # of a domain at most


def sequences_of(path: Path, tokenizer: Any, length: int, most: int = SEQUENCES) -> Tensor:
    """LongTensor (n, length), n at most ``most``: consecutive pieces of the documents in their order.

    Raises:
        ValueError: a line that has no text, or fewer tokens than one sequence.
    """
    tokens: list[int] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if len(tokens) >= most * length:
            break
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no JSON object with a text") from error
        tokens += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    count = min(most, len(tokens) // length)
    if count < 1:
        raise ValueError(f"{path} has {len(tokens)} tokens, a sequence has {length}; give more text or lower --length")
    return torch.tensor(tokens[: count * length]).view(count, length)


def domain_losses(model: Any, tokenizer: Any, folder: Path, length: int) -> Iterator[tuple[str, float, int]]:
    """(domain, loss in nat/token, sequences) of every DOMAIN.jsonl, by name; the model is put in eval mode.

    Raises:
        ValueError: no such file in the folder, and as `sequences_of`.
    """
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise ValueError(f"{folder} has no DOMAIN.jsonl; put held-out documents of each domain there")
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        for path in paths:
            rows = sequences_of(path, tokenizer, length)
            losses = [sample_losses(model, row[None].to(device)).double().cpu() for row in rows]
            yield path.stem, torch.cat(losses).mean().item(), len(rows)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, 2 after one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="that save_pretrained wrote")
    parser.add_argument("--tokenizer", required=True, metavar="WHERE", help="folder or hub id")
    parser.add_argument("--text", type=Path, required=True, metavar="FOLDER", help="holds DOMAIN.jsonl files")
    parser.add_argument("--length", type=int, required=True, metavar="N",
                        help="tokens of a sequence; the paper's validation: 32,768 for Large, 8,192 for XL")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="gets the losses")
    options = parser.parse_args(arguments)
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import opus_bench.model  # noqa: F401 makes the paper's GPT-2 known to transformers

    try:
        if options.length < 2:
            raise ValueError(f"--length must be at least 2, got {options.length}")
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        model = AutoModelForCausalLM.from_pretrained(options.model, use_safetensors=True)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        losses = tqdm(domain_losses(model, tokenizer, options.text, options.length), desc="domains")
        found = {name: {"loss": loss, "sequences": n, "length": options.length} for name, loss, n in losses}
        with replacing(options.out) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
