"""Greedy tokens in optimum-onnx; run by `tests.runtimes` in an environment that has it.

python optimum_onnx.py FOLDER PROMPTS TOKENS        prints what comes after each prompt as JSON; 0 is padding
"""

import json
import sys
from importlib import metadata

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main(folder: str, prompts: str, count: str) -> None:
    model = ORTModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(json.loads(prompts))
    found = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=int(count), do_sample=False)
    print(json.dumps({"version": metadata.version("optimum-onnx"), "tokens": {"": found[:, ids.shape[1] :].tolist()}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
