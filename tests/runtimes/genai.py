"""Greedy tokens in onnxruntime-genai, with its own adapters; run by `tests.runtimes` in an environment that has it.

python genai.py FOLDER BATCHES TOKENS [NAME=FILE ...]        prints what comes after each prompt as JSON

It sees padding, of the pad token, behind a prompt and not before it.
"""

import json
import sys

import numpy
import onnxruntime_genai as og


def main(folder: str, batches: str, count: str, *files: str) -> None:
    model = og.Model(folder)
    given = dict(file.split("=", 1) for file in files)
    adapters = og.Adapters(model) if given else None
    for name, file in given.items():
        adapters.load(file, name)
    found = {
        name: [row for prompts in json.loads(batches) for row in tokens(model, prompts, int(count), adapters, name)]
        for name in ("", *given)
    }
    print(json.dumps({"version": og.__version__, "tokens": found}))


def tokens(model, prompts: list[list[int]], count: int, adapters, name: str) -> list[list[int]]:
    longest = max(map(len, prompts))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=longest + count, batch_size=len(prompts), do_sample=False)
    generator = og.Generator(model, params)
    if name:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(numpy.array([[*row, *[0] * (longest - len(row))] for row in prompts], numpy.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(n).tolist()[longest:] for n in range(len(prompts))]


if __name__ == "__main__":
    main(*sys.argv[1:])
