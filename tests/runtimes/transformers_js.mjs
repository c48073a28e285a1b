// Greedy tokens in transformers.js; run by `tests.runtimes` in a folder with its node modules.
//
//     node transformers_js.mjs MODULES FOLDER PROMPTS TOKENS     prints what comes after each prompt as JSON; 0 is padding
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [modules, folder, prompts, count] = process.argv.slice(2);
const found = createRequire(path.join(modules, "any.js")).resolve("@huggingface/transformers");
const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = await import(pathToFileURL(found));
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const name = path.basename(folder);
const model = await AutoModelForCausalLM.from_pretrained(name);
const rows = JSON.parse(prompts);
const int64 = (values) => new Tensor("int64", BigInt64Array.from(values.flat().map(BigInt)), [rows.length, rows[0].length]);
const input_ids = int64(rows);
const attention_mask = int64(rows.map((row) => row.map((token) => (token ? 1 : 0))));
const tokens = await model.generate({ input_ids, attention_mask, max_new_tokens: Number(count), do_sample: false });
const tokenizer = await AutoTokenizer.from_pretrained(name).catch((error) => error);
const text = tokenizer instanceof Error ? `${tokenizer}` : tokenizer.decode(tokens.tolist()[0], { skip_special_tokens: true });
console.log(JSON.stringify({ version: env.version, tokens: { "": tokens.tolist().map((row) => row.slice(rows[0].length).map(Number)) }, text }));
