"""Loads exported folders where ecospa_fx cannot be imported: ``python reloading.py FOLDER…``, results as JSON.

Beside each folder NAME stands ``NAME.pt`` with (Auto class, arguments, output, weights).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def loaded(folder: Path, auto: str) -> Any:
    """The folder's model, its weights in memory of their own.

    Weights that are read are maps of the file, often at odd addresses, where a product may be rounded otherwise.
    """
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def result(folder: Path) -> dict[str, object]:
    auto, call, want, state = torch.load(folder.with_suffix(".pt"))
    with torch.no_grad():
        model = loaded(folder, auto)
        error = float((model(**call).logits - want).abs().max())
        weights = model.state_dict()
        base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
        again = folder.with_name(f"{folder.name}-again")
        model.save_pretrained(again)
        error_again = float((loaded(again, auto)(**call).logits - want).abs().max())
        tokens = []
        if auto == "AutoModelForCausalLM":
            options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            tokens = [
                model.generate(call["input_ids"], use_cache=cached, **options).tolist() for cached in (True, False)
            ]
    return {
        "error": error,
        "error_again": error_again,
        "same_weights": {*weights} == {*state} and all(torch.equal(weights[name], state[name]) for name in state),
        "same_tokens": not tokens or tokens[0] == tokens[1],
        "kind": type(model).__name__,
        "base": type(base).__name__,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in the tests: products that are shared out otherwise are rounded otherwise
    sys.modules["ecospa_fx"] = None  # type: ignore[assignment]  # any import of it fails
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    sys.stdout.write(json.dumps({Path(path).name: result(Path(path)) for path in sys.argv[1:]}))
